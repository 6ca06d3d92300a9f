"""Open, read and make files below a root without leaving it: an image's symbolic links are an attacker's."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from sandbox.errors import InvalidSpec
from sandbox.host import syscalls


def open_beneath(root: Path, name: str, flags: int, *, links: bool = True) -> int:
    """Open `name` as a process does whose root directory is `root` (openat2(2), RESOLVE_IN_ROOT).

    Returns a descriptor that the caller owns. Raises OSError; without `links` also (ELOOP) where a component
    of the path is a symbolic link.
    """
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        resolve = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
        if not links:
            resolve |= syscalls.RESOLVE_NO_SYMLINKS
        return syscalls.openat2(directory, name, flags | os.O_CLOEXEC, resolve=resolve)
    finally:
        os.close(directory)


def make_beneath(root: Path, path: str, *, directory: bool) -> None:
    """Create an empty file or directory at `path`, and missing parents, as a process with that root would.

    Idempotent. Raises nothing: what cannot be created, and what exists as another kind of file, fails in the
    step that needs it, whose error names the problem. Modes are 0644 and 0755 whatever the daemon's umask is.
    """
    try:
        os.close(open_beneath(root, path, os.O_PATH))
    except FileNotFoundError:
        pass
    except OSError:
        return
    else:
        return
    parent, _, name = path.rpartition("/")
    if parent:
        make_beneath(root, parent, directory=True)
    with suppress(OSError):
        at = open_beneath(root, parent or "/", os.O_PATH | os.O_DIRECTORY)
        try:
            _make(at, name, directory)
        finally:
            os.close(at)


def _make(at: int, name: str, directory: bool) -> None:
    """Raises FileExistsError also for a dangling symbolic link, which stays as it is."""
    if directory:
        os.mkdir(name, dir_fd=at)
        os.chmod(name, 0o755, dir_fd=at)
        return
    file = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    try:
        os.fchmod(file, 0o644)
    finally:
        os.close(file)


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
