"""Where in which file system a file lies, by the mount table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.host import mountinfo, mounts, syscalls
from sandbox.host.mountinfo import Mounted, Tree

TABLE = rb"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 8:1 /var/volumes/a\040b\134c\011d /mnt/with\040space ro,relatime shared:1 master:2 - ext4 /dev/sda1 rw
31 22 0:45 /subvolume/data /mnt/btrfs rw - btrfs /dev/sdb rw,subvolid=256,subvol=/subvolume
32 31 0:46 / /mnt/btrfs/nfs rw - nfs4 server:/export rw
33 22 8:1 /gone//deleted /mnt/gone rw - ext4 /dev/sda1 rw
34 22 0:47 / /mnt/fuse rw - fuse.sshfs host: rw
not a line
35 22 0:48
36 22 0:49 / /mnt/rest rw
"""


def test_table_is_parsed_with_escapes_optional_fields_and_broken_lines() -> None:
    found = {line.id: line for line in mountinfo.parse(TABLE)}
    assert sorted(found) == [22, 30, 31, 32, 33, 34]
    assert (found[30].root, found[30].point) == ("/var/volumes/a b\\c\td", "/mnt/with space")
    assert (found[30].readonly, found[22].readonly) == (True, False)
    assert (found[31].device, found[31].root, found[31].kind) == ("0:45", "/subvolume/data", "btrfs")
    assert [line.id for line in found.values() if line.remote] == [32, 34]


@pytest.mark.parametrize(
    ("path", "above", "beneath"),
    [
        ("/a/b", "/a", "b"),
        ("/a", "/a", ""),
        ("/a/b/c", "/", "a/b/c"),
        ("/", "/", ""),
        ("/ab", "/a", None),
        ("/a", "/a/b", None),
        ("/", "/a", None),
    ],
)
def test_relative_path_is_of_what_lies_beneath(path: str, above: str, beneath: str | None) -> None:
    assert mountinfo.relative(path, above) == beneath
    if beneath is not None:
        assert mountinfo.join(above, beneath) == path


@given(st.binary())
def test_any_table_is_parsed(text: bytes) -> None:
    mountinfo.parse(TABLE + text.replace(b"-", b"\n"))


def test_mounts_beneath_a_path_are_found_among_names_that_begin_alike() -> None:
    def line(number: int, point: str) -> Mounted:
        return Mounted(number, "8:1", "/", point, False, "ext4")

    points = ["/", "/a/b", "/a", "/a-b/c", "/ab", "/a/b/c", "/a.b", "/a/b", "/a b/c"]
    trees = mountinfo.Trees([line(number, point) for number, point in enumerate(points)])
    found = {path: mount.id for path, mount in trees.beneath("/a").items()}
    assert found == {"b": 7, "b/c": 5}  # the later one of two at one point
    assert set(trees.beneath("/")) == {point[1:] for point in points if point != "/"}
    assert trees.beneath("/a/b/c") == {}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs, with what a test mounts in it."""
    path = tmp_path / "place"
    path.mkdir()
    syscalls.mount("place", path, "tmpfs")
    yield path
    mounts.unmount_tree(path)


def tree_of(path: Path) -> Tree | None:
    source = os.open(path, os.O_PATH)
    try:
        return mountinfo.Trees(mountinfo.read()).find(source)
    finally:
        os.close(source)


def key_of(path: Path) -> tuple[str, str | None]:
    tree = tree_of(path)
    assert tree is not None
    return tree.device, tree.path


def test_tree_is_the_same_by_every_path_that_leads_there(place: Path) -> None:
    for name in ("volume/sub path/deep", "one", "two"):
        (place / name).mkdir(parents=True)
    mounts.bind(place / "volume/sub path", place / "one")
    mounts.bind(place / "one/deep", place / "two")  # a bind of a part of a bind
    assert key_of(place / "two") == key_of(place / "one/deep") == key_of(place / "volume/sub path/deep")
    device, path = key_of(place / "two")
    assert (path, key_of(place)) == ("/volume/sub path/deep", (device, "/"))


def test_file_has_a_tree_too(place: Path) -> None:
    for name in ("file", "bound"):
        (place / name).touch()
    mounts.bind(place / "file", place / "bound")
    assert key_of(place / "bound") == key_of(place / "file")
    assert key_of(place / "file")[1] == "/file"


def test_file_system_mounted_beneath_is_another_tree(place: Path) -> None:
    (place / "sub").mkdir()
    syscalls.mount("beneath", place / "sub", "tmpfs")
    mounts.make_readonly(place / "sub")
    whole, part = tree_of(place), tree_of(place / "sub")
    assert whole
    assert part
    assert (whole.device != part.device, part.path) == (True, "/")
    assert (whole.readonly, part.readonly) == (False, True)
    assert list(whole.submounts) == ["sub"]
    assert whole.submounts["sub"].readonly


def test_deleted_directory_has_no_path(place: Path) -> None:
    (place / "gone").mkdir()
    source = os.open(place / "gone", os.O_PATH)
    try:
        (place / "gone").rmdir()
        tree = mountinfo.Trees(mountinfo.read()).find(source)
    finally:
        os.close(source)
    assert tree
    assert tree.path is None


def test_tree_of_a_mount_that_is_gone_is_unknown(place: Path) -> None:
    source = os.open(place, os.O_PATH)
    try:
        mounts.unmount_tree(place)
        assert mountinfo.Trees(mountinfo.read()).find(source) is None
    finally:
        os.close(source)
