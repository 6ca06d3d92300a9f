"""Plans as messages of guest.proto: nothing of a value is lost, and none has a field that no message has."""

from __future__ import annotations

import msgspec
import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from msgspec import inspect

from sandbox.guest import guest_pb2 as pb
from sandbox.plan import values
from sandbox.plan.encode import (
    encode_cgroup_files,
    encode_configuration,
    encode_container,
    encode_huge_directories,
)
from sandbox.spec import PidMode

MESSAGES: dict[type[msgspec.Struct], Descriptor] = {
    values.ContainerPlan: pb.Start.DESCRIPTOR,
    values.ProcessPlan: pb.Process.DESCRIPTOR,
    values.IdentityPlan: pb.Configure.DESCRIPTOR,
    values.NetworkPlan: pb.Configure.DESCRIPTOR,
    values.HugeDirectory: pb.HugeDirectory.DESCRIPTOR,
    values.CgroupFile: pb.CgroupFile.DESCRIPTOR,
}


def check_struct(type: inspect.Type, message: Descriptor) -> None:
    assert isinstance(type, inspect.StructType)
    fields = {field.name: field for field in message.fields}
    assert {field.name for field in type.fields} <= fields.keys(), message.name
    for field in type.fields:
        check_field(field.type, fields[field.name])


def check_field(type: inspect.Type, field: FieldDescriptor) -> None:
    assert isinstance(type, inspect.VarTupleType) == field.is_repeated, field.full_name
    item = type.item_type if isinstance(type, inspect.VarTupleType) else type
    match item:
        case inspect.StructType():
            assert field.message_type is not None
            check_struct(item, field.message_type)
        case inspect.EnumType():
            assert isinstance(field.enum_type, EnumDescriptor)
            missing = {each.name for each in item.cls} - set(field.enum_type.values_by_name)
            assert missing <= {PidMode.NODE.name}, "NODE is never given to a VM"
        case inspect.BytesType():
            assert field.type == FieldDescriptor.TYPE_BYTES, field.full_name


@pytest.mark.parametrize(("value", "message"), MESSAGES.items(), ids=[each.__name__ for each in MESSAGES])
def test_every_field_of_a_value_is_a_field_of_its_message(
    value: type[msgspec.Struct], message: Descriptor
) -> None:
    check_struct(inspect.type_info(value), message)


def test_container_plan_survives_its_file_and_its_message() -> None:
    plan = values.ContainerPlan(
        id="c1",
        rootfs="/r",
        process=values.ProcessPlan(
            argv=("sh",), env=(b"RAW=\xff\n",), groups=(1, 2), cap_bounding=1 << 40, seccomp=b"\0\1"
        ),
        pid_namespace=PidMode.TARGET,
        pid_target="c0",
        mounts=(values.MountPlan(source="proc", target="/proc", make=values.Make.DIRECTORY),),
        devices=(values.DevicePlan("/dev/null", 1, 3),),
    )
    assert msgspec.json.decode(msgspec.json.encode(plan), type=values.ContainerPlan) == plan
    message = encode_container(plan)
    assert (list(message.process.env), message.process.seccomp) == ([b"RAW=\xff\n"], b"\0\1")
    assert (message.pid_namespace, message.pid_target) == (pb.PidNamespace.TARGET, "c0")
    assert (message.mounts[0].make, message.devices[0].minor) == (pb.Mount.DIRECTORY, 3)
    assert message.log_stream == 0, "belongs to the connection"


def test_parts_of_a_configuration_make_one_message() -> None:
    identity = values.IdentityPlan(hostname="web", entropy=b"e", machine_id="0" * 32, wall_ns=5)
    network = values.NetworkPlan(sysctls=(values.Sysctl(path="a/b", value="1"),))
    message = encode_configuration(identity, network)
    assert (message.hostname, message.wall_ns, message.sysctls[0].value) == ("web", 5, "1")


def test_lists_keep_their_order() -> None:
    files = [values.CgroupFile(name="io.max", value=str(number)) for number in range(3)]
    assert [file.value for file in encode_cgroup_files(files)] == ["0", "1", "2"]
    directories = [values.HugeDirectory(name=name, mode=0o700, uid=7) for name in "ba"]
    assert [(each.name, each.uid) for each in encode_huge_directories(directories)] == [("b", 7), ("a", 7)]
