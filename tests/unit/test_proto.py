"""The wire is the CRI's of Kubernetes 1.37: its size, and the places where it is easy to go wrong."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.descriptor import Descriptor, EnumDescriptor

from cri.proto import runtime_v1_pb2 as pb

FILE = pb.DESCRIPTOR


def messages() -> Iterator[Descriptor]:
    """Without the entry types that map fields make."""
    waiting = list(FILE.message_types_by_name.values())
    while waiting:
        message = waiting.pop()
        waiting += message.nested_types
        if not message.GetOptions().map_entry:
            yield message


def enums() -> list[EnumDescriptor]:
    nested = [enum for message in messages() for enum in message.enum_types]
    return [*FILE.enum_types_by_name.values(), *nested]


def test_every_message_and_field_exists() -> None:
    assert FILE.package == "runtime.v1"
    assert len(list(messages())) == 175
    assert sum(len(message.fields) for message in messages()) == 478


def test_every_enum_and_value_exists() -> None:
    assert len(enums()) == 11
    assert sum(len(enum.values) for enum in enums()) == 95


def test_every_service_and_rpc_exists() -> None:
    services = FILE.services_by_name
    assert {name: len(service.methods) for name, service in services.items()} == {
        "RuntimeService": 37,
        "ImageService": 6,
    }
    rpcs = [method for service in services.values() for method in service.methods]
    assert len(rpcs) == 43
    assert sorted(rpc.name for rpc in rpcs if rpc.server_streaming) == [
        "GetContainerEvents",
        "StreamContainerStats",
        "StreamContainers",
        "StreamImages",
        "StreamPodSandboxMetrics",
        "StreamPodSandboxStats",
        "StreamPodSandboxes",
    ]
    assert not any(rpc.client_streaming for rpc in rpcs)


def test_irregular_names_and_numbers_are_the_cris() -> None:
    assert pb.ContainerConfig.DESCRIPTOR.fields_by_name["CDI_devices"].number == 17
    assert pb.Mount.DESCRIPTOR.fields_by_name["uidMappings"].number == 6
    assert pb.PsiStats.DESCRIPTOR.fields_by_name["Full"].number == 1
    assert pb.PsiStats.DESCRIPTOR.fields_by_name["Some"].number == 2
    assert pb.Namespace.DESCRIPTOR.fields_by_name["options"].number == 2
    assert pb.ImageSpec.DESCRIPTOR.fields_by_name["user_specified_image"].number == 18
    assert pb.SecurityProfile.Localhost == 2
    assert pb.Strict == 1
    assert pb.SIGNAL_SIGRTMAX == 65


def test_known_message_has_known_bytes() -> None:
    """Worked out by hand from the protobuf encoding: field number and wire type, length, content."""
    config = pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name="a", uid="b", namespace="c", attempt=2),
        labels={"k": "v"},
    )
    metadata = b"\x0a\x01a\x12\x01b\x1a\x01c\x20\x02"
    label = b"\x0a\x01k\x12\x01v"
    assert config.SerializeToString() == b"\x0a\x0b" + metadata + b"\x32\x06" + label
