"""POSIX ACLs that one container of a pod, or the host, sets on what another container uses: in every kind of
volume, at once, and for the users of a user namespace."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import BASELINE, Site
from tests.kit import images
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import acls_on_volumes
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

IMAGE = f"{HOST}/husk/accesslist:1"
SLEEP = ("sleep", "3600")
USER, BASE, LENGTH = 1000, 70000, 65536
STALE_S = 3  # docs/limits.md: what the host changes on a volume is seen within a second

Run = Callable[..., str]


@pytest.fixture(scope="module", autouse=True)
def enforced() -> None:
    """Skip where the guest's kernel is not the distribution's: test_file_rights shows what holds there."""
    if not BASELINE and not acls_on_volumes():
        pytest.skip("no module for ACLs in this guest image")


@pytest.fixture(scope="module", params=["plain", "user namespace"])
def run(site: Site, cri: Cri, request: pytest.FixtureRequest) -> Run:
    """Run containers of one pod as a user, with this directory of the host at /data."""
    layer = images.Layer().add("bin/accesslist", images.helper("accesslist"), mode=0o755)
    site.registry.push("husk/accesslist", "1", images.Image((images.base_layer(), layer)))
    cri.pull(IMAGE)
    shifted = request.param != "plain"
    ids = [api.IDMapping(container_id=0, host_id=BASE, length=LENGTH)] if shifted else []
    space = api.UserNamespace(mode=api.POD, uids=ids, gids=ids)
    options = api.NamespaceOption(pid=api.CONTAINER, userns_options=space if shifted else None)
    sandbox = api.LinuxSandboxSecurityContext(namespace_options=options)
    linux = api.LinuxPodSandboxConfig(security_context=sandbox, cgroup_parent=cri.cgroup_parent)
    pod: Pod = cri.run_pod(f"lists-{len(ids)}", linux=linux)

    def start(user: int, folder: Path) -> str:
        context = api.LinuxContainerSecurityContext(
            namespace_options=options,
            run_as_user=api.Int64Value(value=user),
            run_as_group=api.Int64Value(value=user),
        )
        mount = api.Mount(container_path="/data", host_path=str(folder), uidMappings=ids, gidMappings=ids)
        linux = api.LinuxContainerConfig(security_context=context)
        return cri.run(pod, IMAGE, SLEEP, linux=linux, mounts=[mount])

    return start


@pytest.fixture(params=["disk", "memory", "part", "mounted below"])
def folder(site: Site, request: pytest.FixtureRequest) -> Iterator[tuple[Path, str]]:
    """A directory to mount at /data, and where in it a file is to be made: on the disk, in memory, a
    directory that is bound elsewhere (a subPath), and one with another file system in it."""
    made = scratch_dir("lists")
    made.chmod(0o755)
    namespace, inside, mounted = site.namespace, "", None
    match request.param:
        case "memory":
            namespace.run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(made))
            mounted = made
        case "part":
            (made / "whole/part").mkdir(parents=True, mode=0o755)
            (made / "bound").mkdir()
            namespace.run("mount", "--bind", str(made / "whole/part"), str(made / "bound"))
            mounted = made = made / "bound"
        case "mounted below":
            (made / "below").mkdir()
            # for everyone: a volume's owners are shifted without what is mounted below it
            namespace.run("mount", "-t", "tmpfs", "-o", "mode=777", "tmpfs", str(made / "below"))
            mounted, inside = made / "below", "below/"
    yield made, inside
    if mounted:
        namespace.run("umount", "-l", str(mounted))


def test_list_that_a_container_sets_counts_in_another_at_once(
    cri: Cri, run: Run, folder: tuple[Path, str]
) -> None:
    host_path, inside = folder
    root, user, other = (run(uid, host_path) for uid in (0, USER, USER + 1))
    file = f"/data/{inside}file"
    assert cri.exec(root, "sh", "-c", f"echo text >{file} && chmod 600 {file}").code == 0

    def reads(container: str) -> bool:
        return cri.exec(container, "cat", file).stdout == "text\n"

    assert (reads(user), reads(other)) == (False, False)
    assert cri.exec(root, "accesslist", file, str(USER), "4").stdout == ""
    assert (reads(user), reads(other)) == (True, False)
    assert "Permission denied" in cri.exec(user, "sh", "-c", f"echo more >>{file}").stderr
    assert cri.exec(root, "accesslist", file, str(USER), "6").stdout == ""
    assert cri.exec(user, "sh", "-c", f"echo >>{file}").code == 0
    assert cri.exec(user, "accesslist", file, str(USER), "7").stdout == "Operation not permitted\n"
    assert cri.exec(root, "chmod", "640", file).code == 0  # the mask follows the group's bits, acl(5)
    assert "Permission denied" in cri.exec(user, "sh", "-c", f"echo more >>{file}").stderr
    assert cri.exec(user, "cat", file).code == 0
    assert cri.exec(root, "accesslist", file).stdout == ""
    assert "Permission denied" in cri.exec(user, "cat", file).stderr


def test_list_that_the_host_sets_counts_soon(site: Site, cri: Cri, run: Run) -> None:
    folder = scratch_dir("lists")
    folder.chmod(0o755)
    root, user = run(0, folder), run(USER, folder)
    assert cri.exec(root, "sh", "-c", "echo text >/data/file && chmod 600 /data/file").code == 0
    assert cri.exec(user, "cat", "/data/file").code != 0
    program = scratch_dir("tool") / "accesslist"
    program.write_bytes(images.helper("accesslist"))
    program.chmod(0o755)
    subprocess.run([program, folder / "file", str(USER), "4"], check=True)
    eventually_sync(
        lambda: cri.exec(user, "cat", "/data/file").stdout,
        until=lambda text: text == "text\n",
        timeout_s=STALE_S,
    )
    subprocess.run([program, folder / "file"], check=True)
    eventually_sync(
        lambda: cri.exec(user, "cat", "/data/file").code, until=lambda code: code != 0, timeout_s=STALE_S
    )
