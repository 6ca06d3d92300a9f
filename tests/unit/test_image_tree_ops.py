"""Directories as a container may leave them: deep, linked, and changing meanwhile."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from image import inode_flags, tree_ops

LEVELS = 3000


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    home = tmp_path / "home"
    (home / "upper").mkdir(parents=True)
    yield home
    # pytest removes its directories by recursion, which ends before these do
    subprocess.run(["rm", "-rf", str(home)], check=True)


def dig(where: Path, levels: int = LEVELS, name: str = "d" * 20) -> None:
    """Nested directories, with a file of one block in the last one."""
    at = os.open(where, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=at)
        below = os.open(name, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    file = os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=at)
    os.write(file, b"x" * 4096)
    os.fsync(file)
    os.close(file)
    os.close(at)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_deep_tree_is_removed(home: Path) -> None:
    dig(home / "upper")
    dig(home / "upper", levels=200, name="other")
    (home / "deep-0").mkdir()  # of a removal that was cut short
    (home / "upper/link").symlink_to("/")
    before = open_files()
    tree_ops.remove(home)
    assert not home.exists()
    assert open_files() == before
    tree_ops.remove(home)


def test_wide_tree_is_removed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_ops, "ENTRIES", 7)
    for n in range(100):
        (home / f"upper/folder{n}").mkdir()
        (home / f"upper/folder{n}/file").touch()
        (home / f"upper/file{n}").touch()
    tree_ops.remove(home)
    assert not home.exists()


def test_symlink_is_not_followed(home: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("kept")
    (home / "upper/link").symlink_to(tmp_path / "precious")
    assert tree_ops.measure(home / "upper").inodes == 1
    tree_ops.remove(home)
    assert (tmp_path / "precious/file").read_text() == "kept"


def test_remove_of_a_symlink_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(home)
    with pytest.raises(OSError):
        tree_ops.remove(tmp_path / "link")
    assert home.exists()


def test_deep_tree_is_measured(home: Path) -> None:
    dig(home / "upper")
    usage = tree_ops.measure(home / "upper")
    # du counts the directory itself too
    assert LEVELS + 1 <= usage.inodes <= LEVELS + 2
    assert usage.bytes >= 4096


def test_file_with_several_names_counts_once(home: Path) -> None:
    file = home / "upper/file"
    with file.open("wb") as writing:
        writing.write(os.urandom(1 << 20))
        os.fsync(writing.fileno())
    for n in range(10):
        (home / f"upper/name{n}").hardlink_to(file)
    usage = tree_ops.measure(home / "upper")
    assert usage.inodes == 1
    assert 1 << 20 <= usage.bytes < 2 << 20


def test_more_hard_links_than_are_remembered_count_each(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_ops, "_LINKS_MAX", 1)
    for name in ("a", "b"):
        (home / "upper" / name).write_text(name)
        (home / f"upper/{name}2").hardlink_to(home / "upper" / name)
    assert tree_ops.measure(home / "upper").inodes == 3


def test_absent_path_measures_zero_and_is_removed(tmp_path: Path) -> None:
    assert tree_ops.measure(tmp_path / "absent").inodes == 0
    tree_ops.remove(tmp_path / "absent")


def test_failed_measurement_names_the_path(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dig(home / "upper")
    monkeypatch.setattr(tree_ops, "DU", "/bin/false")
    with pytest.raises(OSError, match="upper"):
        tree_ops.measure(home / "upper")
    tree_ops.remove(home)


@pytest.mark.parametrize("flag", [inode_flags.IMMUTABLE, inode_flags.APPEND_ONLY])
def test_tree_with_protected_files_and_directories_is_removed(home: Path, flag: int) -> None:
    """Where the filesystem has such flags; chattr(1) sets them in a container that may."""
    (home / "upper/d/e").mkdir(parents=True)
    (home / "upper/d/f").write_bytes(b"x")
    (home / "upper/d/l").symlink_to("f")
    os.mkfifo(home / "upper/d/p")
    for name in ("upper/d/f", "upper/d/e", "upper/d", "upper", ""):
        fd = os.open(home / name, os.O_RDONLY)
        with contextlib.suppress(OSError):
            inode_flags.change_flags(fd, add=flag)
        os.close(fd)
    tree_ops.remove(home)
    assert not home.exists()
