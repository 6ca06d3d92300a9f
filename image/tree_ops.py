"""Directories that a container filled: as deep, as wide and as linked as it liked.

Nothing here goes down a path of more than a few levels at a time: a chain of some thousand nested
directories is longer than a path may be, deeper than Python recurses, and needs more descriptors than a
process has. Blocking.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

from image.layer import Usage

LEVELS = 64  # gone down at a time
ENTRIES = 1000  # read at a time, when they are to be deleted
DU = "/usr/bin/du"
DU_TIMEOUT_S = 300.0
_BLOCK = 512
_LINKS_MAX = 1 << 16  # files with several names that are kept in mind; of more, each name counts
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def measure(path: Path) -> Usage:
    """What the directory takes, itself left out; a file with several names counts once. Absent: zero.
    Raises OSError."""
    try:
        return _walk(os.fspath(path))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return Usage(bytes=_du(path), inodes=_du(path, "--inodes"))


def _walk(path: str) -> Usage:
    total = inodes = 0
    linked: set[int] = set()
    folders = [path]
    while folders:
        # what vanishes under our eyes counts as gone
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif status.st_nlink > 1:
                        if status.st_ino in linked:
                            continue
                        if len(linked) < _LINKS_MAX:
                            linked.add(status.st_ino)
                    total += status.st_blocks * _BLOCK
                    inodes += 1
    return Usage(bytes=total, inodes=inodes)


def _du(path: Path, *flags: str) -> int:
    """For trees whose paths are too long for us. Raises OSError."""
    command = [DU, "--summarize", "--block-size=1", *flags, "--", os.fspath(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=DU_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(errno.ETIMEDOUT, f"not measured within {DU_TIMEOUT_S:g} s", str(path)) from error
    # it tells of files that went away meanwhile by its status, and counts the rest
    number = done.stdout.split(b"\t")[0]
    if not number.isdigit():
        raise OSError(errno.EIO, done.stderr.decode(errors="replace").strip()[-500:], str(path))
    return int(number)


def remove(path: Path) -> None:
    """Delete a directory of ours with all that somebody put beneath it. Absent is fine; may be called
    again after it was cut short. Raises OSError.

    What lies too deep is moved up into `path` itself, under names that are free there; so nobody else
    may be at work in it.
    """
    try:
        top = os.open(path, _DIRECTORY)
    except FileNotFoundError:
        return
    try:
        names = (name for n in count() if (name := f"deep-{n}") and not _exists(name, top))
        _empty(top, top, LEVELS, names)
    finally:
        os.close(top)
    path.rmdir()


def _exists(name: str, at: int) -> bool:
    try:
        os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _empty(directory: int, top: int, levels: int, names: Iterator[str]) -> None:
    while some := _some(directory):
        for entry in some:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=directory)
            elif levels == 0:
                os.rename(entry.name, next(names), src_dir_fd=directory, dst_dir_fd=top)
            else:
                child = os.open(entry.name, _DIRECTORY, dir_fd=directory)
                try:
                    _empty(child, top, levels - 1, names)
                finally:
                    os.close(child)
                os.rmdir(entry.name, dir_fd=directory)


def _some(directory: int) -> list[os.DirEntry[str]]:
    """A directory may have more entries than would fit the memory."""
    with os.scandir(directory) as entries:
        return list(islice(entries, ENTRIES))
