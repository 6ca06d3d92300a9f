"""Measure and delete directory trees of any depth and width, as an image or a container may make them.

Nothing here descends more than LEVELS directories at a time: a chain of some thousand nested directories is
longer than a path may be (PATH_MAX), deeper than Python recurses, and needs more descriptors than a process
has. All functions block.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import msgspec

from image.inode_flags import APPEND_ONLY, IMMUTABLE, change_flags, make_removable

LEVELS = 64  # directories open at a time
ENTRIES = 1000  # directory entries read at a time by `remove`
DU = "/usr/bin/du"
DU_TIMEOUT_S = 300.0
_BLOCK = 512  # st_blocks counts these (stat(2))
_LINKS_MAX = 1 << 16  # inodes with several names that are remembered; beyond that, each name counts
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a tree occupies on its filesystem."""

    bytes: int = 0
    inodes: int = 0


def measure(path: Path) -> Usage:
    """Return what a tree occupies, its top directory excluded; a file with several names counts once.

    Zero for a path that does not exist. What vanishes during the call counts as absent. Raises OSError.
    """
    try:
        return _sum(os.fspath(path))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return Usage(bytes=_du(path), inodes=_du(path, "--inodes"))


def _sum(path: str) -> Usage:
    total = inodes = 0
    linked: set[int] = set()
    directories = [path]
    while directories:
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(directories.pop()) as entries,
        ):
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.path)
                    elif status.st_nlink > 1:
                        if status.st_ino in linked:
                            continue
                        if len(linked) < _LINKS_MAX:
                            linked.add(status.st_ino)
                    total += status.st_blocks * _BLOCK
                    inodes += 1
    return Usage(bytes=total, inodes=inodes)


def _du(path: Path, *flags: str) -> int:
    """Measure with du(1), which changes directory as it descends, a tree whose paths exceed PATH_MAX."""
    command = [DU, "--summarize", "--block-size=1", *flags, "--", os.fspath(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=DU_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(errno.ETIMEDOUT, f"not measured within {DU_TIMEOUT_S:g} s", str(path)) from error
    # du reports files that vanished meanwhile by its exit status, and sums up the others
    number = done.stdout.split(b"\t")[0]
    if not number.isdigit():
        raise OSError(errno.EIO, done.stderr.decode(errors="replace").strip()[-500:], str(path))
    return int(number)


def remove(path: Path | str | bytes, *, at: int | None = None) -> None:
    """Delete a directory with everything in it; `path` is relative to the directory descriptor `at`.

    Follows no link. An absent path is not an error, and after an error or a crash it may be called again.
    Raises OSError. Directories that lie LEVELS deep are first moved up into `path` itself under unused
    names, so nothing else may work in the tree at the same time. Immutable and append-only flags, which a
    container without a VM may set, are cleared.
    """
    try:
        top = os.open(path, _DIRECTORY, dir_fd=at)
    except FileNotFoundError:
        return
    try:
        names = (name for n in count() if (name := f"deep-{n}") and not _exists(name, top))
        _empty(top, top, LEVELS, names)
        try:
            os.rmdir(path, dir_fd=at)
        except PermissionError:
            change_flags(top, remove=IMMUTABLE | APPEND_ONLY)
            os.rmdir(path, dir_fd=at)
    finally:
        os.close(top)


def _exists(name: str, at: int) -> bool:
    try:
        os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _empty(directory: int, top: int, levels: int, names: Iterator[str]) -> None:
    while batch := _read_batch(directory):
        for entry in batch:
            try:
                _remove_entry(entry, directory, top, levels, names)
            except PermissionError:
                make_removable(directory, entry.name)
                _remove_entry(entry, directory, top, levels, names)


def _remove_entry(
    entry: os.DirEntry[str], directory: int, top: int, levels: int, names: Iterator[str]
) -> None:
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


def _read_batch(directory: int) -> list[os.DirEntry[str]]:
    """Read some entries: all of a large directory might not fit in memory."""
    with os.scandir(directory) as entries:
        return list(islice(entries, ENTRIES))
