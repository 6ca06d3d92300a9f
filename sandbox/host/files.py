"""Files that are replaced as a whole: a reader sees the old content or the new, never a mixture.

    <path>       the content
    <path>.tmp   being written; a crash may leave it, and the next write of the same file replaces it

rename(2) within a directory is atomic. Without `durable` nothing is synced: the content survives the
daemon, but after a power failure the file may be old, empty or absent.

A file written with `checksum` has the SHA-256 of its content in the extended attribute CHECKSUM, set before
the rename. It is outside of the content: releases that know nothing of it can read the file, and what they
replace has none. Filesystems without such attributes keep none either, nor does a plain copy.
"""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import suppress
from pathlib import Path

import msgspec

TEMPORARY_SUFFIX = ".tmp"
CHECKSUM = "trusted.husk.sha256"  # trusted(7): of root alone, and on every filesystem that overlayfs can use
_WITHOUT = (errno.EOPNOTSUPP, errno.EPERM)  # of a filesystem, or for a process, that has no such attributes


class Damaged(Exception):
    """A file's content is not what was written, as its checksum shows."""


def temporary_of(path: Path) -> Path:
    """Return the name under which `path` is written before it is renamed."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def write_atomically(path: Path, content: bytes, *, durable: bool = False, checksum: bool = False) -> None:
    """Replace `path`, whose directory must exist, with `content`. `durable` returns only when content and
    name are on the disk (fsync(2) of the file, then of its directory). With `checksum`, `check` will find
    damage. One writer for each path at a time. Raises OSError; then the old content stays, and the temporary
    file is removed."""
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if checksum:
                _set_checksum(file.fileno(), content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        if error.filename is None:  # write(2) knows none, and a full disk must be named
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    if durable:
        sync(path.parent)


def write_json(path: Path, value: object, *, durable: bool = False, checksum: bool = False) -> None:
    """Encode a value that msgspec knows, and write it as `write_atomically` does."""
    write_atomically(path, msgspec.json.encode(value), durable=durable, checksum=checksum)


def _set_checksum(descriptor: int, content: bytes) -> None:
    try:
        os.setxattr(descriptor, CHECKSUM, hashlib.sha256(content).digest())
    except OSError as error:
        if error.errno not in _WITHOUT:
            raise


def check(path: Path, content: bytes) -> None:
    """Compare what was read from `path` with its checksum, if it has one. Raises Damaged, OSError."""
    try:
        expected = os.getxattr(path, CHECKSUM)
    except OSError as error:
        if error.errno in (*_WITHOUT, errno.ENODATA):
            return
        raise
    if hashlib.sha256(content).digest() != expected:
        raise Damaged(
            "it is not what husk wrote, as its checksum shows; if it was changed on purpose, replace it by a "
            "copy, which has no checksum"
        )


def sync(path: Path) -> None:
    """fsync(2) of a file or directory; of a directory, it makes names in it durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
