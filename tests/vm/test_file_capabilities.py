"""Capabilities of files: given by an image or set in a container, on a root filesystem and on a volume, with
a user namespace and without; and what takes them away."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit import images
from tests.kit.cri import Cri, Pod
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

IMAGE = f"{HOST}/husk/capable:1"
SLEEP = ("sleep", "3600")
USER = 1000
BIND = f"{1 << 10:x}\n"  # CAP_NET_BIND_SERVICE, as /proc/PID/status prints it
NONE = "0\n"
BASE, LENGTH = 70000, 65536

Run = Callable[..., str]


def capable() -> images.Image:
    """Return an image with /bin/capable, and /bin/granted, which has a capability."""
    program = images.helper("capable")
    capability = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # revision 2, effective
    layer = images.Layer().add("bin/capable", program, mode=0o755)
    layer.add("bin/granted", program, mode=0o755, xattrs={"security.capability": capability})
    return images.Image((images.base_layer(), layer))


def ids() -> list[api.IDMapping]:
    return [api.IDMapping(container_id=0, host_id=BASE, length=LENGTH)]


@pytest.fixture(scope="module")
def shifted() -> api.NamespaceOption:
    space = api.UserNamespace(mode=api.POD, uids=ids(), gids=ids())
    return api.NamespaceOption(pid=api.CONTAINER, userns_options=space)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "user namespace"])
def run(site: Site, cri: Cri, request: pytest.FixtureRequest, shifted: api.NamespaceOption) -> Run:
    """Run containers of one pod, with a volume at /volume that its owner shifts as the kubelet asks."""
    site.registry.push("husk/capable", "1", capable())
    cri.pull(IMAGE)
    options = shifted if request.param else api.NamespaceOption(pid=api.CONTAINER)
    mapping = ids() if request.param else []
    sandbox = api.LinuxSandboxSecurityContext(namespace_options=options)
    linux = api.LinuxPodSandboxConfig(security_context=sandbox, cgroup_parent=cri.cgroup_parent)
    pod: Pod = cri.run_pod(f"capable-{request.param}".lower(), linux=linux)
    folder = scratch_dir("capable")
    folder.chmod(0o777)

    def start(**security: object) -> str:
        context = api.LinuxContainerSecurityContext(namespace_options=options, **security)  # type: ignore[arg-type]
        mount = api.Mount(
            container_path="/volume", host_path=str(folder), uidMappings=mapping, gidMappings=mapping
        )
        linux = api.LinuxContainerConfig(security_context=context)
        return cri.run(pod, IMAGE, SLEEP, linux=linux, mounts=[mount])

    return start


def user() -> api.Int64Value:
    return api.Int64Value(value=USER)


def test_capability_of_an_image_file_is_gained_by_its_execution(cri: Cri, run: Run) -> None:
    member = run(run_as_user=user())
    assert cri.exec(member, "capable", "effective").stdout == NONE
    assert cri.exec(member, "granted", "effective").stdout == BIND


def test_no_new_privileges_keeps_a_capability_from_being_gained(cri: Cri, run: Run) -> None:
    member = run(run_as_user=user(), no_new_privs=True)
    # by a shell: what the runtime executes itself may keep what the runtime had
    assert cri.exec(member, "sh", "-c", "granted effective; :").stdout == NONE


def test_capability_outside_of_the_bounding_set_is_refused(cri: Cri, run: Run) -> None:
    dropped = api.Capability(drop_capabilities=["NET_BIND_SERVICE"])
    member = run(run_as_user=user(), capabilities=dropped)
    result = cri.exec(member, "sh", "-c", "granted effective")
    assert result.code != 0
    assert "Operation not permitted" in result.stderr  # capabilities(7)


@pytest.mark.parametrize("folder", ["/root", "/volume"])
def test_capability_that_a_container_sets_counts_in_the_next_execution(
    cri: Cri, run: Run, folder: str
) -> None:
    root = run()
    program = f"{folder}/tool"
    assert cri.exec(root, "chmod", "755", "/root").code == 0
    assert cri.exec(root, "cp", "/bin/capable", program).code == 0
    assert cri.exec(root, "capable", "as", "1000", program, "effective").stdout == NONE
    assert cri.exec(root, "capable", "grant", program).stdout == ""
    assert cri.exec(root, "capable", "as", "1000", program, "effective").stdout == BIND
    if folder == "/volume":  # also in another container of the pod
        assert cri.exec(run(run_as_user=user()), program, "effective").stdout == BIND
        member = run(run_as_user=user(), no_new_privs=True)
        assert cri.exec(member, "sh", "-c", f"{program} effective; :").stdout == NONE
    # a copy has none, a write and a change of the owner take it
    assert cri.exec(root, "cp", program, f"{folder}/copy").code == 0
    assert cri.exec(root, "capable", "granted", f"{folder}/copy").stdout == "none\n"
    assert cri.exec(root, "sh", "-c", f"echo >>{program}").code == 0
    assert cri.exec(root, "capable", "granted", program).stdout == "none\n"
    assert cri.exec(root, "capable", "grant", f"{folder}/copy").stdout == ""
    assert cri.exec(root, "chown", "1000", f"{folder}/copy").code == 0
    assert cri.exec(root, "capable", "granted", f"{folder}/copy").stdout == "none\n"


def test_user_without_the_right_to_it_cannot_set_a_capability(cri: Cri, run: Run) -> None:
    member = run(run_as_user=user())
    assert cri.exec(member, "cp", "/bin/capable", "/volume/own").code == 0
    assert cri.exec(member, "capable", "grant", "/volume/own").stdout == "setxattr: Operation not permitted\n"
