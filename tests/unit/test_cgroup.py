"""Layouts are recognized, parents of both drivers are parsed, cgroups are created and removed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sandbox.errors import InvalidSpec
from sandbox.host import cgroup, process
from sandbox.host.cgroup import Cgroups, Driver, Mode
from tests.kit.eventually import eventually

V2 = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = """\
25 18 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
26 25 0:23 / /sys/fs/cgroup/cpu,cpuacct rw shared:4 - cgroup cgroup rw,cpu,cpuacct
27 25 0:24 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
28 25 0:25 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices
29 25 0:26 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
31 25 0:24 / /mnt/again rw - cgroup cgroup rw,memory
"""
UNIFIED = "30 25 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(
    ("mountinfo", "mode", "roots"),
    [
        (V2, Mode.V2, ("/sys/fs/cgroup",)),
        (V1, Mode.V1, ("cpu,cpuacct", "memory", "systemd")),
        (V1 + UNIFIED, Mode.HYBRID, ("cpu,cpuacct", "memory", "systemd", "unified")),
    ],
)
def test_layout_is_recognized(mountinfo: str, mode: Mode, roots: tuple[str, ...]) -> None:
    layout = cgroup.parse_layout(mountinfo)
    assert layout.mode is mode
    assert layout.roots == tuple(r if r.startswith("/") else f"/sys/fs/cgroup/{r}" for r in roots)


def test_driver_on_v1_is_cgroupfs() -> None:
    assert cgroup.find_driver(cgroup.parse_layout(V1)) is Driver.CGROUPFS


@pytest.mark.parametrize(
    ("parent", "path"),
    [
        ("", "/husk/husk-p"),
        ("/kubepods/burstable/pod1", "/kubepods/burstable/pod1/husk-p"),
        ("/kubepods/burstable/pod1/", "/kubepods/burstable/pod1/husk-p"),
        ("system.slice", "/system.slice/husk-p"),
        (
            "kubepods-burstable-pod1.slice",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/husk-p",
        ),
        ("-.slice", "/husk-p"),
        ("/a.slice/b.slice", "/a.slice/b.slice/husk-p"),
    ],
)
def test_parent_of_either_driver_gives_the_path(parent: str, path: str) -> None:
    assert cgroup.pod_path(parent, "p") == path


@pytest.mark.parametrize("parent", ["/a/../../b", "a--b.slice", "/./x"])
def test_parent_that_leaves_the_hierarchy_is_rejected(parent: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        cgroup.pod_path(parent, "p")
    assert caught.value.field == "cgroup_parent"


@pytest.fixture
def groups() -> Iterator[Cgroups]:
    made = cgroup.find_cgroups(f"/husk-test-{secrets.token_hex(4)}")
    yield made
    left = roots_of(made)
    for parent in left:
        parent.rmdir()
    assert left == []


def roots_of(groups: Cgroups) -> list[Path]:
    """The directories of the default parent that exist."""
    places = (Path(root + groups.root) for root in groups.layout.roots)
    return [place for place in places if place.exists()]


async def test_cgroup_is_created_joined_and_removed(groups: Cgroups) -> None:
    groups.create("p", "")
    groups.create("p", "")
    directories = groups.directories("p", "")
    assert directories and all(Path(each).is_dir() for each in directories)
    identity = await process.start(["sleep", "60"], cgroups=directories)
    comm = Path(f"/proc/{identity.pid}/comm")
    await eventually(lambda: comm.read_text() == "sleep\n", describe=f"exec of {identity.pid}")
    for each in directories:
        assert str(identity.pid) in (Path(each) / "cgroup.procs").read_text().split()
    assert process.find_by_cgroup(directories) == [identity]
    groups.remove("p", "")
    assert not process.alive(identity)
    assert not any(Path(each).exists() for each in directories)
    groups.remove("p", "")
    await process.kill(identity)  # reaps it
    assert process.find_by_cgroup(directories) == []


def test_partial_cgroup_is_completed_and_removed(groups: Cgroups) -> None:
    groups.create("p", "")
    directories = [Path(each) for each in groups.directories("p", "")]
    directories[-1].rmdir()
    groups.create("p", "")
    assert all(each.is_dir() for each in directories)
    directories[0].rmdir()
    groups.remove("p", "")
    assert not any(each.exists() for each in directories)


def test_default_parent_is_removed_with_the_last_pod(groups: Cgroups) -> None:
    for pod in ("p", "q"):
        groups.create(pod, "")
    groups.remove("p", "")
    assert len(roots_of(groups)) == len(groups.layout.roots)
    assert all(Path(each).is_dir() for each in groups.directories("q", ""))
    groups.remove("q", "")
    assert roots_of(groups) == []
    groups.remove("q", "")


def test_cgroup_with_unknown_parent_is_found_and_removed(groups: Cgroups) -> None:
    parent = f"{groups.root}/kubepods/burstable/pod1"
    for pod in ("p", "pq"):
        groups.create(pod, parent)
    groups.create_pooled("p")
    groups.remove_anywhere("p")
    directories = [*groups.directories("p", parent), *groups.directories("p", groups.pool_parent)]
    assert not any(Path(each).exists() for each in directories)
    assert all(Path(each).is_dir() for each in groups.directories("pq", parent)), "another pod's stays"
    groups.remove_anywhere("p")
    cgroup.remove(groups.layout, groups.root)


def limits_of(groups: Cgroups) -> set[tuple[str, str]]:
    """The limits of the pod p that the host has the controllers for."""
    names = ("memory.limit_in_bytes", "memory.max", "pids.max")
    places = [Path(each, name) for each in groups.directories("p", "") for name in names]
    return {(place.name.partition(".")[0], place.read_text().strip()) for place in places if place.exists()}


def test_limit_of_a_pod_in_the_own_root_is_in_force_and_can_be_raised(groups: Cgroups) -> None:
    groups.create("p", "")
    for mebibytes in (100, 200):
        groups.limit("p", mebibytes << 20, 64)
        assert limits_of(groups) == {("memory", str(mebibytes << 20)), ("pids", "64")}
    groups.remove("p", "")
    groups.limit("p", 1 << 30, 64)  # one that has gone: not an error


def test_limit_on_v2_enables_the_controllers_on_the_way(tmp_path: Path) -> None:
    groups = Cgroups(layout=cgroup.Layout(mode=Mode.V2, hierarchies=(), unified=str(tmp_path)), root="/husk")
    pod = Path(groups.directories("p", "")[0])
    pod.mkdir(parents=True)
    for directory in (tmp_path, tmp_path / "husk"):
        (directory / "cgroup.subtree_control").touch()
    for name in ("memory.max", "pids.max"):
        (pod / name).touch()
    groups.limit("p", 5 << 20, 9)
    assert ((pod / "memory.max").read_text(), (pod / "pids.max").read_text()) == ("5242880", "9")
    for directory in (tmp_path, tmp_path / "husk"):
        assert (directory / "cgroup.subtree_control").read_text() == "+pids", "each is written by itself"
    assert not (pod / "cgroup.subtree_control").exists()


def test_given_parent_stays(groups: Cgroups) -> None:
    groups.create("p", groups.root)
    groups.remove("p", groups.root)
    left = roots_of(groups)
    assert len(left) == len(groups.layout.roots)
    cgroup.remove_empty(groups.layout, groups.root)


def test_concurrent_creation_and_removal_keep_the_parent(groups: Cgroups) -> None:
    """One removes the default parent at the moment at which another needs it."""

    def lives(name: str) -> None:
        for number in range(100):
            groups.create(f"{name}{number}", "")
            assert all(Path(each).is_dir() for each in groups.directories(f"{name}{number}", ""))
            groups.remove(f"{name}{number}", "")

    with ThreadPoolExecutor() as pool:
        list(pool.map(lives, "abcd"))
    assert roots_of(groups) == []
