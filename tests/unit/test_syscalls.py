"""System calls beyond `os`: their results, and errors that name the call and its subject."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox.host import mount_flags, mounts, syscalls, threads

PROC_MAGIC, TMPFS_MAGIC = 0x9FA0, 0x01021994  # linux/magic.h


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def test_error_names_call_errno_and_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        syscalls.mount("none", tmp_path / "absent", "tmpfs")
    assert caught.value.errno == errno.ENOENT
    assert caught.value.strerror == "mount: No such file or directory"
    assert caught.value.filename == str(tmp_path / "absent")
    with pytest.raises(OSError, match="umount2: Invalid argument") as other:
        syscalls.umount2(tmp_path, syscalls.UMOUNT_NOFOLLOW)
    assert other.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("setns", lambda fd: syscalls.setns(fd, syscalls.CLONE_NEWNET, what="of pod x")),
        ("mount_setattr", lambda fd: syscalls.mount_setattr(fd, "", 0, set=1, what="of pod x")),
        ("open_tree", lambda fd: syscalls.open_tree(fd, "absent", 0, what="of pod x")),
        ("move_mount", lambda fd: syscalls.move_mount(fd, "absent", fd, "absent", 0, what="of pod x")),
        ("fstatfs", lambda fd: syscalls.filesystem_magic(-1, what="of pod x")),
        ("syncfs", lambda fd: syscalls.syncfs(-1, what="of pod x")),
    ],
)
def test_error_of_a_descriptor_names_what_it_stands_for(
    name: str, call: Callable[[int], object], directory: int
) -> None:
    with pytest.raises(OSError, match=f"{name}: .*'of pod x'"):
        call(directory)


def test_filesystem_magic_identifies_proc() -> None:
    descriptor = os.open("/proc", os.O_PATH)
    try:
        assert syscalls.filesystem_magic(descriptor) == PROC_MAGIC
    finally:
        os.close(descriptor)


def test_syncfs_of_a_directory_succeeds(directory: int) -> None:
    syscalls.syncfs(directory)


def test_openat2_resolves_links_within_its_root(tmp_path: Path, directory: int) -> None:
    (tmp_path / "file").write_text("inside")
    (tmp_path / "link").symlink_to("/file")
    descriptor = syscalls.openat2(
        directory, "/link", os.O_RDONLY | os.O_CLOEXEC, resolve=syscalls.RESOLVE_IN_ROOT
    )
    with os.fdopen(descriptor) as file:
        assert file.read() == "inside"
    with pytest.raises(OSError) as caught:
        syscalls.openat2(directory, "link", os.O_RDONLY, resolve=syscalls.RESOLVE_NO_SYMLINKS)
    assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, "link")


def test_mount_is_visible_in_its_namespace_alone(tmp_path: Path) -> None:
    def magic() -> int:
        descriptor = os.open(tmp_path, os.O_PATH)
        try:
            return syscalls.filesystem_magic(descriptor)
        finally:
            os.close(descriptor)

    def work() -> int:
        syscalls.unshare(syscalls.CLONE_FS | syscalls.CLONE_NEWNS)
        mounts.set_propagation(Path("/"), mount_flags.MS_REC | mount_flags.MS_PRIVATE)
        syscalls.mount("husk-test", tmp_path, "tmpfs", 0, "size=64k")
        return magic()

    (tmp_path / "outside").touch()
    assert threads.call(work, "test") == TMPFS_MAGIC
    assert (tmp_path / "outside").exists()
