"""Files that are replaced as a whole: a reader sees the old content or the new, never a mixture.

    <path>       the content
    <path>.tmp   being written; a crash may leave it, and the next write of the same file replaces it

rename(2) within a directory is atomic. Without `durable` nothing is synced: the content survives the
daemon, but after a power failure the file may be old, empty or absent.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import msgspec

TEMPORARY_SUFFIX = ".tmp"


def temporary_of(path: Path) -> Path:
    """Return the name under which `path` is written before it is renamed."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def write_atomically(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Replace `path`, whose directory must exist, with `content`. `durable` returns only when content and
    name are on the disk (fsync(2) of the file, then of its directory). One writer for each path at a time.
    Raises OSError; then the old content stays, and the temporary file is removed."""
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
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


def write_json(path: Path, value: object, *, durable: bool = False) -> None:
    """Encode a value that msgspec knows, and write it as `write_atomically` does."""
    write_atomically(path, msgspec.json.encode(value), durable=durable)


def sync(path: Path) -> None:
    """fsync(2) of a file or directory; of a directory, it makes names in it durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
