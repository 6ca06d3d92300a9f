"""Open, read and make files below a root without leaving it: an image's symbolic links are an attacker's."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sandbox.errors import InvalidSpec
from sandbox.host import syscalls


def open_beneath(root: Path, name: str, flags: int, *, links: bool = True) -> int:
    """Open `name` as a process does whose root directory is `root` (openat2(2), RESOLVE_IN_ROOT).

    Returns a descriptor that the caller owns. Raises OSError; without `links` also (ELOOP) where a component
    of the path is a symbolic link.
    """
    with opened_root(root) as directory:
        return _resolve(directory, name, flags, 0 if links else syscalls.RESOLVE_NO_SYMLINKS)


def make_beneath(root: Path, path: str, *, directory: bool) -> None:
    """Create an empty file or directory at `path`, and missing parents, as a process with that root would.

    Idempotent. Raises nothing: what cannot be created, and what exists as another kind of file, fails in the
    step that needs it, whose error names the problem. Modes are 0644 and 0755 whatever the daemon's umask is.
    """
    with suppress(OSError), opened_root(root) as top:
        make_at(top, path, directory=directory)


@contextmanager
def opened_root(root: Path) -> Iterator[int]:
    """Give a descriptor of a root for several calls. Raises OSError."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield directory
    finally:
        os.close(directory)


def make_at(root: int, path: str, *, directory: bool) -> None:
    """Do the same as `make_beneath` in an open root."""
    parent, _, name = path.rstrip("/").rpartition("/")
    if not name:
        return
    with suppress(OSError):
        at = _open_parent(root, parent)
        try:
            _make(at, name, directory)
        finally:
            os.close(at)


def _open_parent(root: int, path: str) -> int:
    """Open a directory, which is made where it does not exist. Raises OSError."""
    try:
        return _resolve(root, path or "/", os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        make_at(root, path, directory=True)
        return _resolve(root, path or "/", os.O_PATH | os.O_DIRECTORY)


def _resolve(root: int, path: str, flags: int, more: int = 0) -> int:
    resolve = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS | more
    return syscalls.openat2(root, path, flags | os.O_CLOEXEC, resolve=resolve)


def _make(at: int, name: str, directory: bool) -> None:
    """Raises FileExistsError for what exists, also for a dangling symbolic link, which stays as it is.

    A guest may put a link in the place of what was made, so its mode is set by a descriptor (ELOOP, ENOTDIR).
    """
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    if directory:
        os.mkdir(name, dir_fd=at)
        made = os.open(name, os.O_RDONLY | os.O_DIRECTORY | flags, dir_fd=at)
    else:
        made = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | flags, dir_fd=at)
    try:
        os.fchmod(made, 0o755 if directory else 0o644)
    finally:
        os.close(made)


def read_beneath(root: Path, name: str, limit: int) -> bytes:
    """Read the regular file `name` as a process with that root would find it; b"" where there is none.

    Raises InvalidSpec for a file of more than `limit` bytes, and OSError when `root` itself cannot be opened.
    """
    try:
        # O_NONBLOCK: opening a FIFO of the image must not block
        file = open_beneath(root, name, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.filename != name:
            raise  # the root itself
        return b""
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return b""
        with open(file, "rb", closefd=False) as handle:  # not before: it refuses a directory
            content = handle.read(limit + 1)
    finally:
        os.close(file)
    if len(content) > limit:
        raise InvalidSpec("config.image", f"its /{name} is larger than {limit} bytes")
    return content
