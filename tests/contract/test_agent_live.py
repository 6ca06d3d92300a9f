"""Copies of the host's files that an agent keeps: what ChangeFiles does, skips and refuses, and KeepTrees."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from sandbox.errors import GuestError
from sandbox.guest import guest_pb2 as pb
from sandbox.host.mount_flags import MS_BIND, MS_RDONLY
from tests.kit.agent import Agent, Guest, standard_mounts

LIVE = Path("/run/husk/live")
Kind = pb.FileChange


@pytest.fixture(autouse=True)
async def no_trees(guest: Guest) -> None:
    """Remove what the test before has made: the agent is the module's."""
    await guest.call(keep_trees=pb.KeepTrees())


@pytest.fixture
def live(agent: Agent) -> Path:
    """Return where this machine sees the agent's trees."""
    return Path(f"/proc/{agent.pid}/root{LIVE}")


def directory(path: str, mode: int = 0o755, **more: Any) -> pb.FileChange:
    return pb.FileChange(kind=Kind.DIRECTORY, path=path, mode=mode, **more)


def file(path: str, content: bytes, mode: int = 0o644, **more: Any) -> pb.FileChange:
    return pb.FileChange(kind=Kind.FILE, path=path, content=content, mode=mode, **more)


def link(path: str, target: str) -> pb.FileChange:
    return pb.FileChange(kind=Kind.LINK, path=path, target=target)


def remove(path: str) -> pb.FileChange:
    return pb.FileChange(kind=Kind.REMOVE, path=path)


async def change(guest: Guest, *changes: pb.FileChange, tree: str = "tree", **more: Any) -> None:
    await guest.call(change_files=pb.ChangeFiles(tree=tree, changes=changes, **more))


async def test_changes_make_directories_files_and_links(guest: Guest, live: Path) -> None:
    await change(
        guest,
        directory("root", 0o1750, uid=7, gid=8),
        directory("root/..1"),
        file("root/..1/key", b"value\0", 0o4440, uid=9, gid=10, mtime_ns=1_500_000_000_000_000_001),
        link("root/..data", "..1"),
        link("root/key", "..data/key"),
    )
    root = live / "tree/root"
    assert (root / "key").read_bytes() == b"value\0"
    info = (root / "..1/key").stat()
    assert (info.st_mode & 0o7777, info.st_uid, info.st_gid) == (0o4440, 9, 10)
    assert info.st_mtime_ns == 1_500_000_000_000_000_001
    info = root.stat()
    assert (info.st_mode & 0o7777, info.st_uid, info.st_gid) == (0o1750, 7, 8)


async def test_file_is_rewritten_in_place_or_replaced_on_request(guest: Guest, live: Path) -> None:
    await change(guest, file("root", b"x" * 100_000))
    path = live / "tree/root"
    inode = path.stat().st_ino
    await change(guest, file("root", b"shorter", 0o600))
    assert (path.read_bytes(), path.stat().st_ino, path.stat().st_mode & 0o777) == (b"shorter", inode, 0o600)
    await change(guest, file("root", b"another", replace=True))
    assert path.read_bytes() == b"another"
    assert path.stat().st_ino != inode
    assert [each.name for each in path.parent.iterdir()] == ["root"]


async def test_change_that_is_in_force_touches_nothing(guest: Guest, live: Path) -> None:
    wanted = [directory("root"), file("root/a", b"a"), link("root/l", "a")]
    await change(guest, *wanted)
    path = live / "tree/root"
    before = [(path / name).lstat() for name in ("a", "l")]
    await change(guest, *wanted)
    assert [(path / name).lstat() for name in ("a", "l")] == before


async def test_link_is_replaced_by_a_rename(guest: Guest, live: Path) -> None:
    await change(guest, directory("root"), link("root/..data", "..1"))
    await change(guest, link("root/..data", "..2"))
    assert [(each.name, str(each.readlink())) for each in (live / "tree/root").iterdir()] == [
        ("..data", "..2")
    ]


async def test_removal_includes_what_lies_beneath_and_may_repeat(guest: Guest, live: Path) -> None:
    await change(
        guest, directory("root"), directory("root/d"), directory("root/d/e"), file("root/d/e/f", b"x")
    )
    for _ in range(2):
        await change(guest, remove("root/d"), remove("root/never/was"))
    assert list((live / "tree/root").iterdir()) == []


async def test_pruning_keeps_what_is_named_alone(guest: Guest, live: Path) -> None:
    names = [f"root/{number}" for number in range(300)]
    await change(guest, directory("root"), *(file(name, b"x") for name in names))
    await change(guest, directory("root/d"), file("root/d/old", b""), prune=True, keep=["root", *names[::2]])
    assert sorted(f"root/{each.name}" for each in (live / "tree/root").iterdir()) == sorted(names[::2])
    await change(guest, prune=True)
    assert list((live / "tree").iterdir()) == []


async def test_keep_removes_other_trees(guest: Guest, live: Path) -> None:
    await guest.call(keep_trees=pb.KeepTrees(trees=["a"]))
    for tree in ("a", "b", "c"):
        await change(guest, directory("root"), file("root/x", b"x"), tree=tree)
    await guest.call(keep_trees=pb.KeepTrees(trees=["a", "c", "absent"]))
    assert sorted(each.name for each in live.iterdir()) == ["a", "c"]
    await guest.call(keep_trees=pb.KeepTrees())
    assert list(live.iterdir()) == []


@pytest.mark.parametrize(
    "path",
    ["", "/", "/etc/x", "..", "root/../../x", "root//x", "root/.", "./x", "x/", "n" * 256, "d/" * 40 + "x"],
)
async def test_path_that_is_not_made_of_names_is_refused(guest: Guest, path: str) -> None:
    for bad in (file(path, b"x"), directory(path), link(path, "x"), remove(path)):
        with pytest.raises(GuestError, match="live files"):
            await change(guest, bad)


@pytest.mark.parametrize("tree", ["", ".", "..", "a/b", ".hidden", "x" * 200])
async def test_tree_with_an_invalid_name_is_refused(guest: Guest, tree: str) -> None:
    with pytest.raises(GuestError, match="live files"):
        await change(guest, directory("root"), tree=tree)


async def test_links_in_a_tree_are_never_followed(guest: Guest, agent: Agent, live: Path) -> None:
    """A privileged container can write to its trees."""
    outside = agent.directory / "outside"
    outside.mkdir()
    (outside / "f").write_text("kept")
    await change(guest, directory("root"), link("root/d", str(outside)), link("root/f", str(outside / "f")))
    with pytest.raises(GuestError):
        await change(guest, file("root/d/new", b"x"))
    with pytest.raises(GuestError):
        await change(guest, file("root/f", b"x"))
    with pytest.raises(GuestError):
        await change(guest, directory("root/d"))
    await change(guest, remove("root/d"), remove("root/f"))
    assert [each.read_text() for each in outside.iterdir()] == ["kept"]


async def test_failure_names_the_path_and_keeps_what_came_before(guest: Guest, live: Path) -> None:
    with pytest.raises(GuestError) as caught:
        await change(
            guest, directory("root"), file("root/a", b"a"), file("root/no/b", b"b"), file("root/c", b"c")
        )
    assert caught.value.errno == errno.ENOENT
    assert "root/no/b" in str(caught.value)
    assert [each.name for each in (live / "tree/root").iterdir()] == ["a"]
    with pytest.raises(GuestError):
        await change(guest, pb.FileChange(kind=77, path="root"))  # type: ignore[arg-type]


async def test_memory_of_the_copies_is_bounded(guest: Guest, live: Path) -> None:
    await change(guest, directory("root"))
    with pytest.raises(GuestError) as caught:
        for number in range(64):
            await change(guest, file(f"root/{number}", b"x" * (1 << 20)))
    assert caught.value.errno == errno.ENOSPC
    await guest.call(keep_trees=pb.KeepTrees())
    await change(guest, directory("root"), file("root/x", b"fits again"))


async def test_container_sees_changes_of_its_bind(guest: Guest) -> None:
    await change(guest, directory("root"), directory("root/..1"), file("root/..1/k", b"old"))
    await change(guest, link("root/..data", "..1"), link("root/k", "..data/k"))
    source = f"{LIVE}/tree/root"
    bind = pb.Mount(source=source, target="/conf", flags=MS_BIND | MS_RDONLY, make=pb.Mount.DIRECTORY)
    id = await guest.start(["sleep", "600"], mounts=[*standard_mounts(), bind])
    assert await guest.exec(id, ["cat", "/conf/k"]) == (0, "old", "")
    assert (await guest.exec(id, ["mkdir", "/conf/x"]))[0] != 0
    await change(guest, directory("root/..2"), file("root/..2/k", b"new"), link("root/..data", "..2"))
    await change(guest, remove("root/..1"))
    assert await guest.exec(id, ["cat", "/conf/k"]) == (0, "new", "")
    await guest.call(keep_trees=pb.KeepTrees())
    assert await guest.exec(id, ["ls", "/conf"]) == (0, "", "")


async def test_copies_survive_a_new_connection(guest: Guest, live: Path) -> None:
    await change(guest, directory("root"), file("root/a", b"a"))
    await guest.connect()
    assert (live / "tree/root/a").read_bytes() == b"a"
