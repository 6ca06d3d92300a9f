"""Volumes beyond plain binds: mounts beneath them, later ones, options, images; and what the host may do to
a volume while it is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.leaks import processes_naming
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
WEB = f"{HOST}/husk/web:1"
SETUID = f"{HOST}/husk/setuid:1"
SLEEP = ("sleep", "3600")

Mount = Callable[..., None]


@pytest.fixture
def folder() -> Path:
    return scratch_dir("volume")


@pytest.fixture
def mount(site: Site, folder: Path) -> Iterator[Mount]:
    """mount(8) where the daemon runs; what is left of it is undone."""

    def run(*arguments: str) -> None:
        site.namespace.run("mount", *arguments)

    yield run
    site.namespace.run(
        "sh", "-c", f"grep -o '{folder}[^ ]*' /proc/self/mounts | sort -ru | xargs -r umount -l"
    )


def security(**fields: Any) -> api.LinuxContainerConfig:
    return api.LinuxContainerConfig(security_context=api.LinuxContainerSecurityContext(**fields))


def volume(folder: Path, **fields: Any) -> api.Mount:
    return api.Mount(container_path="/data", host_path=str(folder), **fields)


@pytest.mark.parametrize("recursive", [False, True])
def test_read_only_mount_is_recursive_only_on_request(
    cri: Cri, pod: Pod, folder: Path, mount: Mount, recursive: bool
) -> None:
    (folder / "sub").mkdir()
    mount("-t", "tmpfs", "beneath", str(folder / "sub"))
    read_only = volume(folder, readonly=True, recursive_read_only=recursive)
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=[read_only])
    assert "Read-only file system" in cri.exec(container, "touch", "/data/x").stderr
    beneath = cri.exec(container, "touch", "/data/sub/x")
    assert ("Read-only file system" in beneath.stderr) is recursive
    assert (beneath.code == 0) is not recursive


def exported(daemon: Daemon, pod: Pod, folder: Path) -> set[str]:
    """Return the options that all mounts of `folder` have in the namespaces of the pod's virtiofsds."""
    lines = {
        line
        for process in processes_naming(f"{daemon.run_directory}/pods/{pod.id}")
        if "virtiofsd" in process
        for line in Path(f"/proc/{process.split(' ', 1)[0]}/mountinfo").read_text().splitlines()
    }
    fields = [line.split() for line in lines]
    # their roots are the shares, so the path of the folder is a mount's root and never its point
    options = [set(each[5].split(",")) for each in fields if each[3].endswith(str(folder))]
    assert options, lines
    return set.intersection(*options)


def test_set_id_programs_and_devices_on_a_volume_work_inside_and_not_on_the_host(
    daemon: Daemon, cri: Cri, pod: Pod, folder: Path
) -> None:
    cri.pull(SETUID)
    root = security(privileged=True, run_as_user=api.Int64Value(value=0))
    container = cri.run(pod, SETUID, SLEEP, mounts=[volume(folder)], linux=root)
    assert cri.exec(container, "cp", "-p", "/bin/effective", "/data/effective").code == 0
    assert cri.exec(container, "mknod", "/data/null", "c", "1", "3").code == 0
    assert cri.exec(container, "sh", "-c", "echo lost >/data/null && test -c /data/null").code == 0
    code, text = cri.run_to_end(pod, SETUID, ["/data/effective"], mounts=[volume(folder)], name="user")
    assert (code, text.split()[:2]) == (0, ["uid=1000", "euid=0"])
    assert {"nosuid", "nodev", "rw"} <= exported(daemon, pod, folder)


def test_read_only_volume_beside_a_bidirectional_one_is_read_only_on_the_host(
    daemon: Daemon, cri: Cri, pod: Pod, folder: Path, mount: Mount
) -> None:
    both, kept = folder / "both", folder / "kept"
    for each in (both, kept):
        each.mkdir()
    mount("--bind", str(both), str(both))
    mount("--make-shared", str(both))
    volumes = [
        api.Mount(container_path="/both", host_path=str(both), propagation=api.PROPAGATION_BIDIRECTIONAL),
        api.Mount(container_path="/kept", host_path=str(kept), readonly=True),
    ]
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=volumes, linux=security(privileged=True))
    assert {"ro", "nosuid", "nodev"} <= exported(daemon, pod, kept)
    assert {"rw", "nosuid", "nodev"} <= exported(daemon, pod, both)
    cri.exec(container, "mount", "-o", "remount,rw,bind", "/kept")
    assert cri.exec(container, "touch", "/kept/file").code != 0
    assert list(kept.iterdir()) == []


def test_volume_unmounted_on_the_host_is_not_busy(
    site: Site, cri: Cri, pod: Pod, folder: Path, mount: Mount
) -> None:
    (folder / "sub").mkdir()
    mount("-t", "tmpfs", "beneath", str(folder / "sub"))
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=[volume(folder)])
    assert cri.exec(container, "touch", "/data/sub/x").code == 0
    site.namespace.run("umount", str(folder / "sub"))
    site.namespace.run("rmdir", str(folder / "sub"))


def test_volumes_are_not_in_the_hosts_mount_table(site: Site, cri: Cri, pod: Pod, folder: Path) -> None:
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=[volume(folder)])
    table = site.namespace.run("cat", "/proc/self/mountinfo")
    assert not any("/volumes/" in line and container in line for line in table.splitlines())


def test_later_mount_of_the_host_is_propagated_on_request(
    site: Site, cri: Cri, pod: Pod, folder: Path, mount: Mount
) -> None:
    (folder / "sub").mkdir()
    mount("--bind", str(folder), str(folder))
    mount("--make-shared", str(folder))
    slave = volume(folder, propagation=api.PROPAGATION_HOST_TO_CONTAINER)
    receives, alone = (cri.run(pod, BUSYBOX, SLEEP, mounts=[mount]) for mount in (slave, volume(folder)))
    mount("-t", "tmpfs", "later", str(folder / "sub"))
    site.namespace.run("touch", str(folder / "sub/came"))
    eventually_sync(
        lambda: cri.exec(receives, "ls", "/data/sub").stdout, until=lambda text: text == "came\n", timeout_s=5
    )
    assert cri.exec(alone, "ls", "/data/sub").stdout == ""


def test_mount_of_the_container_is_propagated_to_the_host_on_request(
    site: Site, cri: Cri, pod: Pod, folder: Path, mount: Mount
) -> None:
    (folder / "point").mkdir()
    mount("--bind", str(folder), str(folder))
    mount("--make-shared", str(folder))
    shared = volume(folder, propagation=api.PROPAGATION_BIDIRECTIONAL)
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=[shared], linux=security(privileged=True))
    cri.exec(container, "mount", "--bind", "/etc", "/data/point")
    seen = site.namespace.run("ls", str(folder / "point")).split()
    assert {"passwd", "image-mark"} <= set(seen)
    cri.exec(container, "umount", "/data/point")
    assert site.namespace.run("ls", str(folder / "point")) == ""
    cri.exec(container, "mount", "--bind", "/etc", "/data/point")
    cri.stop(container, timeout=0)
    eventually_sync(
        lambda: site.namespace.run("ls", str(folder / "point")), until=lambda text: text == "", timeout_s=5
    )


def test_bidirectional_propagation_without_privilege_is_rejected(cri: Cri, pod: Pod, folder: Path) -> None:
    with pytest.raises(grpc.RpcError) as fault:
        cri.create(pod, BUSYBOX, SLEEP, mounts=[volume(folder, propagation=api.PROPAGATION_BIDIRECTIONAL)])
    assert "config.mounts[0].propagation" in str(fault.value.details())


def test_mount_options_are_in_force(cri: Cri, pod: Pod, folder: Path) -> None:
    (folder / "tool").write_text("#!/bin/sh\necho ran\n")
    (folder / "tool").chmod(0o755)
    options = ["noexec", "nosuid"]
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=[volume(folder, mount_options=options)])
    assert cri.exec(container, "sh", "-c", "/data/tool").code != 0
    line = cri.exec(container, "grep", " /data ", "/proc/self/mounts").stdout
    assert {"noexec", "nosuid"} <= set(line.split()[3].split(","))
    assert list(cri.status(container).mounts[0].mount_options) == options


# ----------------------------------------------------------------------------------- images


def image(name: str, sub_path: str = "", readonly: bool = True) -> api.Mount:
    source = api.ImageSpec(image=name, user_specified_image=name)
    return api.Mount(container_path="/image", image=source, image_sub_path=sub_path, readonly=readonly)


def test_image_volume_is_mounted_read_only(cri: Cri, pod: Pod) -> None:
    id = cri.pull(WEB)
    whole = cri.run(pod, BUSYBOX, SLEEP, mounts=[image(WEB)])
    assert cri.exec(whole, "cat", "/image/www/index.html").stdout == "hello from the pod\n"
    assert cri.exec(whole, "/image/bin/busybox", "echo", "runs").stdout == "runs\n"
    assert "Read-only file system" in cri.exec(whole, "touch", "/image/x").stderr
    reported = cri.status(whole).mounts[0]
    assert (reported.image.image, reported.image.image_ref, reported.host_path) == (WEB, id, "")
    part = cri.run(pod, BUSYBOX, SLEEP, mounts=[image(id, "www")])
    assert cri.exec(part, "ls", "/image").stdout == "index.html\n"
    # its layers stay as long as the containers do
    cri.call("RemoveImage", image=api.ImageSpec(image=WEB))
    assert cri.exec(part, "cat", "/image/index.html").stdout == "hello from the pod\n"


@pytest.mark.parametrize(
    ("mount", "code", "message"),
    [
        (image(WEB, "no/such"), grpc.StatusCode.INVALID_ARGUMENT, "config.mounts[0].image_sub_path"),
        (image(WEB, readonly=False), grpc.StatusCode.INVALID_ARGUMENT, "config.mounts[0].readonly"),
        (image(f"{HOST}/husk/absent:1"), grpc.StatusCode.NOT_FOUND, "husk/absent"),
    ],
)
def test_unusable_image_volume_is_rejected(
    cri: Cri, pod: Pod, mount: api.Mount, code: grpc.StatusCode, message: str
) -> None:
    cri.pull(WEB)
    with pytest.raises(grpc.RpcError) as fault:
        cri.create(pod, BUSYBOX, SLEEP, mounts=[mount])
    assert fault.value.code() is code
    assert message in str(fault.value.details())
