"""A tree of the host is one file system for all containers of a pod, in whatever way they come to mount it.

`meet` (tests/kit/helpers/meet.c) makes files and holds locks in one container and finds them in another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

MEET = f"{HOST}/husk/meet:1"
SLEEP = ("sleep", "3600")
FILE_WAYS = ["fcntl", "flock", "map"]
WAYS = sorted([*FILE_WAYS, "fifo", "inotify", "rename", "socket"])

Run = Callable[..., str]
Mount = Callable[..., None]


@pytest.fixture
def folder() -> Path:
    return scratch_dir("shared")


@pytest.fixture
def mount(site: Site, folder: Path) -> Iterator[Mount]:
    """mount(8) where the daemon runs; what is left of it is undone."""

    def run(*arguments: str) -> None:
        site.namespace.run("mount", *arguments)

    yield run
    site.namespace.run(
        "sh", "-c", f"grep -o '{folder}[^ ]*' /proc/self/mounts | sort -ru | xargs -r umount -l"
    )


@pytest.fixture
def run(cri: Cri, pod: Pod) -> Run:
    """Run a container of the module's pod, with these mounts."""
    cri.pull(MEET)

    def start(*mounts: api.Mount, command: tuple[str, ...] = SLEEP, **fields: Any) -> str:
        return cri.run(pod, MEET, command, mounts=mounts, **fields)

    return start


def at(host_path: Path, path: str = "/data", **fields: Any) -> api.Mount:
    return api.Mount(container_path=path, host_path=str(host_path), **fields)


def serve(cri: Cri, run: Run, folder: Path, *mounts: api.Mount, inside: str = "/data") -> str:
    """Run `meet serve` and wait until it has made everything in `folder`, where the host has it."""
    (folder / "ready").unlink(missing_ok=True)
    container = run(*mounts, command=("meet", "serve", inside))
    eventually_sync((folder / "ready").exists, until=bool, timeout_s=10)
    return container


def met(cri: Cri, container: str, inside: str = "/data", verb: str = "check") -> list[str]:
    result = cri.exec(container, "meet", verb, inside)
    assert result.code == 0, result.stderr
    return sorted(result.stdout.split())


def mounts_of_exporter(daemon: Daemon, pod: Pod) -> list[str]:
    """Return the mount points in virtiofsd's namespace, without the share itself, and their options."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            table = (process / "mountinfo").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        if "virtiofsd" in words[0] and any(f"{pod.id}/share/volumes" in word for word in words):
            lines = [line.split()[4:6] for line in table.splitlines()]
            found = [f"{point} {options}" for point, options in lines if point != "/" and "proc" not in point]
            if found or any(point == "/" for point, _ in lines):
                return found
    raise AssertionError("no virtiofsd for volumes")


# ------------------------------------------------------------------------------- every row


def test_two_containers_of_a_volume_meet_in_every_way(cri: Cri, run: Run, folder: Path) -> None:
    serve(cri, run, folder, at(folder))
    assert met(cri, run(at(folder))) == WAYS


def test_two_containers_of_a_memory_volume_meet_in_every_way(
    cri: Cri, run: Run, folder: Path, mount: Mount, site: Site
) -> None:
    mount("-t", "tmpfs", "emptydir", str(folder))
    first = run(at(folder), command=("meet", "serve", "/data"))
    second = run(at(folder))
    eventually_sync(
        lambda: cri.exec(second, "test", "-e", "/data/ready").code, until=lambda code: code == 0, timeout_s=10
    )
    assert met(cri, second) == WAYS
    assert cri.exec(first, "df", "-h", "/data").code == 0


def test_appends_of_four_writers_in_two_containers_are_whole(cri: Cri, run: Run, folder: Path) -> None:
    containers = [run(at(folder)), run(at(folder))]
    calls = [
        cri.begin("ExecSync", container_id=container, cmd=["meet", "append", "/data/log", tag, "1000"])
        for container, tag in zip(containers * 2, "abcd", strict=True)
    ]
    assert [call.result().exit_code for call in calls] == [0] * 4
    lines = (folder / "log").read_text().splitlines()
    assert sorted(lines) == sorted(
        f"{tag} {number} {'-' * (number % 97)}" for tag in "abcd" for number in range(1000)
    )


def test_two_containers_of_a_file_meet(cri: Cri, run: Run, folder: Path) -> None:
    (folder / "file").touch()
    run(at(folder / "file", "/one"), command=("meet", "hold", "/one"))
    second = run(at(folder / "file", "/two"))
    assert (
        eventually_sync(
            lambda: met(cri, second, "/two", "try"), until=lambda found: found == FILE_WAYS, timeout_s=10
        )
        == FILE_WAYS
    )


# ------------------------------------------------------------------------ orders and places


@pytest.mark.parametrize("first", [False, True])
def test_read_only_mount_beside_a_writable_one_meets_in_every_way(
    cri: Cri, run: Run, folder: Path, daemon: Daemon, pod: Pod, first: bool
) -> None:
    """The export is read-only on the host's side as long as all its mounts are."""
    read_only = at(folder, readonly=True)
    reader = run(read_only) if first else ""
    if first:
        (only,) = (line for line in mounts_of_exporter(daemon, pod) if reader in line)
        assert "ro" in only.split()[1].split(",")
    serve(cri, run, folder, at(folder))
    reader = reader or run(read_only)
    assert met(cri, reader) == WAYS
    assert "Read-only file system" in cri.exec(reader, "touch", "/data/x").stderr


def test_two_paths_of_one_container_are_one_file_system(cri: Cri, run: Run, folder: Path) -> None:
    container = serve(cri, run, folder, at(folder), at(folder, "/other", readonly=True))
    assert met(cri, container, "/other") == WAYS


@pytest.mark.parametrize("order", ["whole first", "part first", "one container", "bind of the host"])
def test_part_of_a_volume_is_one_file_system_with_the_whole(
    cri: Cri, run: Run, folder: Path, mount: Mount, order: str
) -> None:
    part = folder / "sub path"
    part.mkdir()
    (folder / "beside").mkdir()
    whole, alone = at(folder, "/whole"), at(part, "/part")
    if order == "bind of the host":  # as the kubelet does for a subPath
        (folder.parent / f"{folder.name}-subpath").mkdir()
        bound = folder / "beside"
        mount("--bind", str(part), str(bound))
        alone = at(bound, "/part")
    if order == "one container":
        both = serve(cri, run, part, alone, whole, inside="/part")
        assert met(cri, both, "/whole/sub path") == WAYS
        return
    if order == "whole first":
        reader = run(whole)
        serve(cri, run, part, alone, inside="/part")
    else:
        serve(cri, run, part, alone, inside="/part")
        reader = run(whole)
    assert met(cri, reader, "/whole/sub path") == WAYS
    assert cri.exec(reader, "touch", "/whole/x").code == 0
    third = run(alone, whole)
    assert met(cri, third, "/part") == WAYS
    assert met(cri, third, "/whole/sub path") == WAYS


def test_read_only_whole_with_an_older_part_is_read_only_there_too(cri: Cri, run: Run, folder: Path) -> None:
    (folder / "part").mkdir()
    serve(cri, run, folder / "part", at(folder / "part"))
    reader = run(at(folder, "/whole", readonly=True))
    assert met(cri, reader, "/whole/part") == WAYS
    assert "Read-only file system" in cri.exec(reader, "touch", "/whole/part/x").stderr
    assert "Read-only file system" in cri.exec(reader, "touch", "/whole/x").stderr


@pytest.mark.parametrize("whole_first", [True, False])
def test_rename_between_a_volume_and_a_part_fails_only_where_the_part_was_mounted_first(
    cri: Cri, run: Run, folder: Path, whole_first: bool
) -> None:
    """The limit of docs/limits.md; mv(1) copies instead."""
    (folder / "part").mkdir()
    whole, part = at(folder, "/whole"), at(folder / "part", "/part")
    first = run(whole if whole_first else part)
    second = run(part if whole_first else whole)
    container = first if whole_first else second
    linked = cri.exec(container, "sh", "-c", "echo x >/whole/x; ln /whole/x /whole/part/x")
    assert (linked.code == 0, "Invalid cross-device link" in linked.stderr) == (whole_first, not whole_first)
    assert cri.exec(container, "mv", "/whole/x", "/whole/part/y").code == 0
    assert (folder / "part/y").read_text() == "x\n"


def test_file_of_a_volume_is_one_file_with_that_in_the_volume(cri: Cri, run: Run, folder: Path) -> None:
    (folder / "file").touch()
    run(at(folder / "file", "/one"), command=("meet", "hold", "/one"))
    reader = run(at(folder))
    assert eventually_sync(
        lambda: met(cri, reader, "/data/file", "try"), until=lambda found: found == FILE_WAYS, timeout_s=10
    )
    again = run(at(folder / "file", "/again"))
    assert met(cri, again, "/again", "try") == FILE_WAYS


def test_mount_beneath_a_volume_is_one_file_system_too(
    cri: Cri, run: Run, folder: Path, mount: Mount
) -> None:
    (folder / "sub").mkdir()
    mount("-t", "tmpfs", "beneath", str(folder / "sub"))
    first = run(at(folder), command=("meet", "serve", "/data/sub"))
    second, third = run(at(folder)), run(at(folder / "sub"))
    eventually_sync(
        lambda: cri.exec(third, "test", "-e", "/data/ready").code, until=lambda code: code == 0, timeout_s=10
    )
    assert met(cri, second, "/data/sub") == WAYS
    assert met(cri, third) == WAYS
    assert cri.status(first).state == api.CONTAINER_RUNNING


def test_link_in_place_of_a_part_is_not_followed(cri: Cri, run: Run, pod: Pod, folder: Path) -> None:
    """A container of the pod cannot lead another's mount out of the volume."""
    (folder / "part").mkdir()
    writer = run(at(folder))
    container = cri.create(pod, MEET, SLEEP, mounts=[at(folder / "part", "/part")])
    assert cri.exec(writer, "sh", "-c", "rmdir /data/part && ln -s / /data/part").code == 0
    with pytest.raises(Exception, match=r"symbolic links|Not a directory"):
        cri.start(container)


# --------------------------------------------------------------------------------- lifetimes


def test_container_after_the_first_is_gone_meets_the_second(cri: Cri, run: Run, folder: Path) -> None:
    first = run(at(folder))
    serve(cri, run, folder, at(folder))
    cri.stop(first, timeout=0)
    cri.remove(first)
    assert met(cri, run(at(folder))) == WAYS


def test_export_ends_with_its_last_container(
    cri: Cri, run: Run, folder: Path, daemon: Daemon, pod: Pod, mount: Mount, site: Site
) -> None:
    mount("-t", "tmpfs", "volume", str(folder))
    before = mounts_of_exporter(daemon, pod)
    containers = [run(at(folder)), run(at(folder))]
    assert len(mounts_of_exporter(daemon, pod)) == len(before) + 1
    for container in containers:
        cri.exec(container, "touch", f"/data/{container}")
        cri.stop(container, timeout=0)
        cri.remove(container)
    assert mounts_of_exporter(daemon, pod) == before
    site.namespace.run("umount", str(folder))


def test_containers_meet_after_a_restart_of_the_daemon(
    cri: Cri, run: Run, folder: Path, daemon: Daemon, pod: Pod
) -> None:
    first = run(at(folder))
    daemon.kill()
    daemon.start()
    serve(cri, run, folder, at(folder))
    assert met(cri, first) == WAYS
    assert met(cri, run(at(folder))) == WAYS
    for container in [each.id for each in cri.call("ListContainers").containers]:
        cri.stop(container, timeout=0)
        cri.remove(container)
    assert mounts_of_exporter(daemon, pod) == []


# ------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("host", [False, True], ids=["VM", "host pod"])
def test_image_volume_under_a_read_only_root_has_the_images_files_and_owner(
    cri: Cri, pod: Pod, host: bool
) -> None:
    cri.pull(MEET)
    namespaces = api.NamespaceOption(network=api.NODE if host else api.POD)
    if host:
        context = api.LinuxSandboxSecurityContext(namespace_options=namespaces)
        linux = api.LinuxPodSandboxConfig(security_context=context, cgroup_parent=cri.cgroup_parent)
        pod = cri.run_pod("host-volumes", linux=linux, hostname="")
    security = api.LinuxContainerSecurityContext(
        readonly_rootfs=True,
        run_as_user=api.Int64Value(value=1000),
        run_as_group=api.Int64Value(value=2000),
        namespace_options=namespaces,
    )
    container = cri.run(pod, MEET, SLEEP, linux=api.LinuxContainerConfig(security_context=security))
    assert cri.exec(container, "cat", "/kept/file").stdout == "of the image\n"
    assert cri.exec(container, "stat", "-c", "%a %u %g", "/kept").stdout == "2750 1000 2000\n"
    assert cri.exec(container, "sh", "-c", "echo more >>/kept/file; echo new >/kept/new").code == 0
    assert cri.exec(container, "cat", "/kept/file", "/kept/new").stdout == "of the image\nmore\nnew\n"
    assert "Read-only file system" in cri.exec(container, "touch", "/tmp/x").stderr
