"""A container's log file on the disk: blocking calls, one at a time, for `logs.LogRelay`.

Invariant: between two calls the file ends with a whole line, and its last byte is byte
`written` - 1 of the guest's log stream, that is `position.base` + file size = `written`.

Crash story. Bytes may be in the file that nobody was told of; the file's size tells. A line cut by
the kill is cut off again at the next `open_log` (the guest keeps it: only whole lines that were
written are acknowledged). A file that was renamed meanwhile is found by its inode, and goes on
being written, exactly as a daemon that had lived would have done; the kubelet asks for a new file
or renames it back.

A rotation has three steps, with the position saved in between:

    position saved                     on the disk
    base, inode, next_base = W         the old file has W - base bytes and stays as it is
    (same)                             the new file exists, empty
    base' = W - its size, inode'       lines go to the new file

Killed anywhere before the last save, the client was told of no success, the old file is the one in
use, and a new one that is still empty is taken away again.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sandbox.errors import InvalidSpec
from sandbox.records import LogPosition

# What is wrong with a path itself.
_PATH_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_SHOWN_MAX = 200
_MODE = 0o640
_DIRECTORY_MODE = 0o755
# O_NONBLOCK: a FIFO in the file's place must not block; it says nothing about regular files.
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_TAIL_BYTES = 128 << 10  # longer than any line that is ever written


@dataclass(slots=True)
class LogFile:
    path: Path
    fd: int
    position: LogPosition
    written: int
    created: bool = False  # by us, just now

    def append(self, data: bytes) -> tuple[int, OSError | None]:
        """Write whole lines; return how many bytes are in the file, and what stopped the others.

        A line that did not fit entirely is cut off again.
        """
        done = 0
        view = memoryview(data)
        problem = None
        try:
            while done < len(data):
                done += os.write(self.fd, view[done:])
        except OSError as error:
            problem = error
            done -= self._cut(done - (data.rfind(b"\n", 0, done) + 1))
        self.written += done
        return done, problem

    def _cut(self, count: int) -> int:
        """Take the last bytes off the file; returns how many are gone."""
        if count:
            try:
                os.ftruncate(self.fd, max(os.fstat(self.fd).st_size - count, 0))
            except OSError:
                return 0  # then the rest of the line follows, once that works
        return count

    def in_place(self) -> bool:
        """Does the path still lead to this file?"""
        return _inode_at(self.path) == self.position.inode

    def rebased(self, offset: int) -> LogPosition:
        """The position if the next byte written is byte `offset` of the stream."""
        return msgspec.structs.replace(self.position, base=offset - os.fstat(self.fd).st_size)

    def make_next(self) -> LogFile:
        """The file for the lines behind `written`; nothing is written to it yet.

        Raises OSError, and then leaves no new file.
        """
        return _take_file(self.path, self.written)

    def discard(self) -> None:
        """Undo `make_next`. Idempotent."""
        if self.created and self.in_place() and os.fstat(self.fd).st_size == 0:
            with suppress(FileNotFoundError):
                self.path.unlink()
        self.close()

    def close(self) -> None:
        """Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def open_log(path: Path, position: LogPosition) -> LogFile:
    """Open or create the file and learn how far it was written. Raises OSError.

    The position of the result must be saved before anything is appended.
    """
    path.parent.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
    fd = _find_file(path, position.inode) if position.inode else -1
    if fd < 0:
        # Never opened, or deleted: then its lines are gone, and all that the guest still has
        # goes into the file that is there now.
        return _take_file(path, position.base if position.next_base is None else position.next_base)
    try:
        if position.next_base is not None:
            _remove_leftover(path, position.inode)
        _cut_partial_line(fd)
        written = position.base + os.fstat(fd).st_size
    except BaseException:
        os.close(fd)
        raise
    return LogFile(path, fd, msgspec.structs.replace(position, next_base=None), written)


@contextmanager
def usable_path(path: str) -> Iterator[None]:
    """Raises InvalidSpec in the place of an OSError for a path that the host's file system cannot have."""
    try:
        yield
    except OSError as error:
        if error.errno not in _PATH_ERRORS:
            raise
        problem = f"{path[:_SHOWN_MAX]!r}: {error.strerror}"
        raise InvalidSpec("config.log_path", problem, "a file's name") from error


def make_log(path: Path) -> None:
    """The file and its directory, for another to write. Raises OSError."""
    path.parent.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
    fd, _ = _open_or_create(path)
    os.close(fd)


def _take_file(path: Path, written: int) -> LogFile:
    """The file at `path`, made if missing, to be written from byte `written` of the stream on."""
    fd, created = _open_or_create(path)
    file = LogFile(path, fd, LogPosition(), written, created)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        file.position = LogPosition(base=written - status.st_size, inode=status.st_ino)
    except BaseException:
        file.close()
        raise
    return file


def _open_or_create(path: Path) -> tuple[int, bool]:
    while True:
        with suppress(FileExistsError):
            return os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, _MODE), True
        with suppress(FileNotFoundError):  # removed in between
            return os.open(path, _FLAGS), False


def _find_file(path: Path, inode: int) -> int:
    """Open the regular file with this inode: at `path`, or renamed to `path`.SUFFIX; else -1.

    The kubelet appends a time to the name. Other names are not looked at: the number of a deleted
    file is soon used again, and lines must not go into another container's file.
    """
    with os.scandir(path.parent) as entries:
        names = [entry.name for entry in entries if f"{entry.name}.".startswith(f"{path.name}.")]
    for name in names:
        with suppress(OSError):  # gone again, or a link: not the file that we made
            fd = os.open(path.with_name(name), _FLAGS)
            status = os.fstat(fd)
            if status.st_ino == inode and stat.S_ISREG(status.st_mode):
                return fd
            os.close(fd)
    return -1


def _remove_leftover(path: Path, inode: int) -> None:
    """An empty file at `path`, made by a rotation that the daemon's end cut short.

    With it in place, the kubelet would find nothing to rotate while the lines go elsewhere.
    """
    with suppress(FileNotFoundError):
        status = os.lstat(path)
        if status.st_ino != inode and status.st_size == 0 and stat.S_ISREG(status.st_mode):
            path.unlink()


def _cut_partial_line(fd: int) -> None:
    size = os.fstat(fd).st_size
    start = max(size - _TAIL_BYTES, 0)
    tail = os.pread(fd, size - start, start)
    whole = tail.rfind(b"\n") + 1
    if whole < len(tail) and (whole or start == 0):  # else this was never written by us
        os.ftruncate(fd, start + whole)


def _inode_at(path: Path) -> int:
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        return 0
