"""The order of the changes that a guest's copy goes through, and the bounds of reading a tree."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox.host.ids import IdRange
from sandbox.spec import UserNamespace
from sandbox.vm_pods.live_scan import Limits, Moved, RootGone, Source, Unsuitable, find_source, scan
from sandbox.vm_pods.live_tree import BATCH_BYTES, Change, Entry, FileKind, Tree, batches, diff
from tests.kit.atomic_writer import write_volume

LIMITS = Limits(total_bytes=1 << 20, file_bytes=100_000, entries=50)


def read(path: Path, known: Tree | None = None, limits: Limits = LIMITS) -> Tree:
    entries = known.entries if known else {}
    return scan(find_source(str(path), None), entries, limits, lambda file, name: None)


def shown(changes: list[Change]) -> list[str]:
    words = []
    for change in changes:
        verb = change.entry.kind.value if change.entry else "remove"
        words.append(f"{verb} {change.path}{' replaced' if change.replace else ''}")
    return words


# ------------------------------------------------------------------------------------- order


def test_update_of_a_volume_has_the_order_of_its_writer(tmp_path: Path) -> None:
    volume = tmp_path / "v"
    write_volume(volume, {"key": "1", "gone": "x", "sub/f": "s"})
    old, before = read(volume), (volume / "..data").readlink()
    write_volume(volume, {"key": "2", "added": "y", "sub/f": "s"})
    after = (volume / "..data").readlink()
    assert shown(diff(old.entries, read(volume, old))) == [
        f"directory root/{after}",
        f"directory root/{after}/sub",
        f"file root/{after}/added",
        f"file root/{after}/key",
        f"file root/{after}/sub/f",
        "link root/..data",
        "link root/added",
        "remove root/gone",
        f"remove root/{before}",
    ]


def test_first_copy_makes_parents_first_and_links_last(tmp_path: Path) -> None:
    volume = tmp_path / "v"
    write_volume(volume, {"b": "1", "a": "2"})
    directory = (volume / "..data").readlink()
    assert shown(diff({}, read(volume))) == [
        "directory root",
        f"directory root/{directory}",
        f"file root/{directory}/a",
        f"file root/{directory}/b",
        "link root/..data",
        "link root/a",
        "link root/b",
    ]


def test_file_that_another_one_replaced_is_renamed_and_a_rewritten_one_is_not(tmp_path: Path) -> None:
    for name in ("rewritten", "replaced", "same"):
        (tmp_path / name).write_text("old")
    old = read(tmp_path)
    (tmp_path / "rewritten").write_text("new")
    (tmp_path / "x").write_text("new")
    (tmp_path / "x").rename(tmp_path / "replaced")
    changes = diff(old.entries, read(tmp_path, old))
    assert shown(changes) == ["file root/replaced replaced", "file root/rewritten"]
    assert [change.content for change in changes] == [b"new", b"new"]


def test_path_of_another_kind_is_removed_first(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").write_text("x")
    (tmp_path / "b").write_text("b")
    old = read(tmp_path)
    (tmp_path / "a/x").unlink()
    (tmp_path / "a").rmdir()
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").unlink()
    (tmp_path / "b").symlink_to("a")
    assert shown(diff(old.entries, read(tmp_path, old))) == [
        "remove root/a",
        "remove root/b",
        "file root/a",
        "link root/b",
    ]


def test_directory_that_became_a_file_keeps_its_new_self(tmp_path: Path) -> None:
    """What lay beneath it is removed with it, not afterwards."""
    directory = Entry(kind=FileKind.DIRECTORY, mode=0o755, uid=0, gid=0)
    file = Entry(kind=FileKind.FILE, mode=0o644, uid=0, gid=0, digest=b"d")
    old = {"root": directory, "root/a": directory, "root/a/x": file, "root/a-b": file}
    new = Tree(entries={"root": directory, "root/a": file}, content={"root/a": b""}, size=0)
    assert shown(diff(old, new)) == ["remove root/a", "file root/a", "remove root/a-b"]


def test_change_of_mode_or_owner_is_sent_and_of_times_alone_is_not(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    old = read(tmp_path)
    os.utime(tmp_path / "f", (1, 1))
    assert diff(old.entries, read(tmp_path, old)) == []
    (tmp_path / "f").chmod(0o600)
    (change,) = diff(old.entries, read(tmp_path, old))
    assert change.entry is not None
    assert (change.entry.mode, change.content) == (0o600, b"x")


def test_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    os.utime(tmp_path / "f", (1, 1))
    old = read(tmp_path)
    settled = Tree(
        entries={
            path: entry
            if entry.kind is not FileKind.FILE
            else Entry(
                **{name: getattr(entry, name) for name in entry.__struct_fields__ if name != "stamp"},
                stamp=(1, (tmp_path / "f").stat().st_mtime_ns, (tmp_path / "f").stat().st_ctime_ns),
            )
            for path, entry in old.entries.items()
        },
        content={},
        size=0,
    )
    assert old.content == {"root/f": b"x"}
    assert read(tmp_path, settled).content == {}


def test_requests_are_bounded_and_keep_the_order() -> None:
    changes = [Change(path=str(number), content=b"x" * (BATCH_BYTES // 3)) for number in range(7)]
    changes.insert(3, Change(path="large", content=b"x" * (2 * BATCH_BYTES)))
    made = list(batches(changes))
    assert [change for batch in made for change in batch] == changes
    assert [len(batch) for batch in made] == [2, 1, 1, 2, 2]
    assert list(batches([])) == []


# ------------------------------------------------------------------------------------ reading


def test_links_are_kept_and_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    volume = tmp_path / "v"
    volume.mkdir()
    (volume / "d").symlink_to(outside)
    (volume / "f").symlink_to("/etc/passwd")
    tree = read(volume)
    assert {path: entry.target for path, entry in tree.entries.items()} == {
        "root": "",
        "root/d": str(outside),
        "root/f": "/etc/passwd",
    }
    assert tree.content == {}


def many(path: Path) -> None:
    for number in range(60):
        (path / str(number)).touch()


def large(path: Path) -> None:
    (path / "large").write_bytes(b"x" * 100_001)


def heavy(path: Path) -> None:
    for number in range(12):
        (path / str(number)).write_bytes(b"x" * 99_000)


def deep(path: Path) -> None:
    path.joinpath(*"d" * 20).mkdir(parents=True)


def fifo(path: Path) -> None:
    os.mkfifo(path / "fifo")


def not_text(path: Path) -> None:
    (path / os.fsdecode(b"\xff")).touch()


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (many, "more than 50 files"),
        (large, "larger than 100000 bytes"),
        (heavy, "more than 1048576 bytes"),
        (deep, "deeper than 16"),
        (fifo, "fifo is not a file, directory or link"),
        (not_text, "not UTF-8"),
    ],
)
def test_tree_beyond_the_bounds_is_unsuitable(
    tmp_path: Path, make: Callable[[Path], None], problem: str
) -> None:
    make(tmp_path)
    with pytest.raises(Unsuitable, match=problem):
        read(tmp_path)


def test_single_file_and_its_replacement(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("x")
    path.chmod(0o640)
    source = find_source(str(path), None)
    entry = read(path).entries["root"]
    assert (entry.kind, entry.mode) == (FileKind.FILE, 0o640)
    (tmp_path / "other").write_text("y")
    (tmp_path / "other").rename(path)
    with pytest.raises(RootGone):
        scan(source, {}, LIMITS, lambda file, name: None)
    path.unlink()
    with pytest.raises(RootGone):
        scan(source, {}, LIMITS, lambda file, name: None)


def test_file_that_disappears_while_the_tree_is_read_is_reported(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "e").mkdir()

    def remove(file: int, name: str) -> None:
        if name.endswith("/d"):
            (tmp_path / "e").rmdir()

    with pytest.raises(Moved):
        scan(find_source(str(tmp_path), None), {}, LIMITS, remove)


def test_owners_are_shifted_into_the_user_namespace(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    os.chown(tmp_path / "f", 5, 70000)
    ids = UserNamespace(
        uids=(IdRange(inside=0, outside=100_000, length=1000),),
        gids=(IdRange(inside=0, outside=200_000, length=1000),),
    )
    source = find_source(str(tmp_path), ids)
    entry = scan(source, {}, LIMITS, lambda file, name: None).entries["root/f"]
    assert (entry.uid, entry.gid) == (100_005, 65534)
    assert source.key != find_source(str(tmp_path), None).key


def test_source_is_named_by_path_and_inode(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    source = find_source(str(tmp_path / "link"), None)
    info = (tmp_path / "real").stat()
    assert source == Source(
        path=str(tmp_path / "real"),
        device=info.st_dev,
        inode=info.st_ino,
        is_directory=stat.S_ISDIR(info.st_mode),
    )
    assert source.key == find_source(str(tmp_path / "real"), None).key
