"""A container's log file on disk: blocking calls for `LogRelay`, which makes one at a time.

Invariant: between two calls the file ends with a whole line, and its last byte is byte `written` - 1 of the
guest's log stream: `position.base` + file size = `written`.

Crash story: bytes may be in the file that were not acknowledged; the size of the file says how many. A line
that a kill cut short is truncated at the next `open_log` (the guest still has it, as only whole lines that
were written are acknowledged). A file that was renamed meanwhile is found by its inode and stays in use, as
if the daemon had not been restarted; the kubelet requests a new file or renames it back.

A rotation has three steps, with the position saved in between:

    position saved                     on disk
    base, inode, next_base = W         the old file has W - base bytes and stays as it is
    (same)                             the new file exists, empty
    base' = W - its size, inode'       lines go to the new file

After a kill anywhere before the last save, no success was reported to the client, the old file is the one in
use, and a new one that is still empty is removed.
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

# Errors that are due to the path itself, not to the disk.
_PATH_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_SHOWN_MAX = 200
_MODE = 0o640
_DIRECTORY_MODE = 0o755
# O_NONBLOCK: opening a FIFO in place of the file must not block; it has no effect on regular files.
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_TAIL_BYTES = 128 << 10  # longer than any line that is written


@dataclass(slots=True)
class LogFile:
    """An open log file; owns `fd` until `close` or `discard`. Not safe for concurrent calls."""

    path: Path
    fd: int  # -1: closed
    position: LogPosition
    written: int  # bytes of the stream up to the end of the file
    created: bool = False  # by this open

    def append(self, data: bytes) -> tuple[int, OSError | None]:
        """Append whole lines. Returns how many bytes are in the file, and what kept out the others.

        A line that was written in part is truncated again.
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
        """Truncate the last bytes. Returns how many are gone."""
        if count:
            try:
                os.ftruncate(self.fd, max(os.fstat(self.fd).st_size - count, 0))
            except OSError:
                return 0  # the rest of the line follows with the next write that succeeds
        return count

    def in_place(self) -> bool:
        """Whether the path still names this file."""
        return _inode_at(self.path) == self.position.inode

    def rebased(self, offset: int) -> LogPosition:
        """Return the position for which the next byte written is byte `offset` of the stream."""
        return msgspec.structs.replace(self.position, base=offset - os.fstat(self.fd).st_size)

    def make_next(self) -> LogFile:
        """Open or create the file at the path for the lines after `written`. Nothing is written to it yet.

        The caller owns the result. Raises OSError, and then leaves no new file.
        """
        return _open_from(self.path, self.written)

    def discard(self) -> None:
        """Close the file, and remove it if this open created it and it is still empty. Idempotent."""
        if self.created and self.in_place() and os.fstat(self.fd).st_size == 0:
            with suppress(FileNotFoundError):
                self.path.unlink()
        self.close()

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def open_log(path: Path, position: LogPosition) -> LogFile:
    """Open or create the file, and find out how far it was written.

    The caller owns the result, and must save its position before it appends anything. Raises OSError.
    """
    path.parent.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
    fd = _find_file(path, position.inode) if position.inode else -1
    if fd < 0:
        # Never opened, or deleted: then its lines are lost, and all that the guest still has goes into the
        # file that is at the path now.
        return _open_from(path, position.base if position.next_base is None else position.next_base)
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
    """Raise InvalidSpec in place of an OSError that is due to the path itself (too long, a directory ...)."""
    try:
        yield
    except OSError as error:
        if error.errno not in _PATH_ERRORS:
            raise
        problem = f"{path[:_SHOWN_MAX]!r}: {error.strerror}"
        raise InvalidSpec("config.log_path", problem, "a file's name") from error


def make_log(path: Path) -> None:
    """Create the file and its directory, for another process to write. Idempotent. Raises OSError."""
    path.parent.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
    fd, _ = _open_or_create(path)
    os.close(fd)


def _open_from(path: Path, written: int) -> LogFile:
    """Open the file at `path`, created if missing, to be written from byte `written` of the stream on."""
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
    """Open the regular file with this inode: at `path`, or renamed to `path`.SUFFIX; -1 if there is none.

    The kubelet's rotation appends a time to the name. Other names are not considered: the inode number of a
    deleted file is soon reused, and lines must not go into another container's file.
    """
    with os.scandir(path.parent) as entries:
        names = [entry.name for entry in entries if f"{entry.name}.".startswith(f"{path.name}.")]
    for name in names:
        with suppress(OSError):  # removed meanwhile, or a symbolic link: not the file that was created here
            fd = os.open(path.with_name(name), _FLAGS)
            status = os.fstat(fd)
            if status.st_ino == inode and stat.S_ISREG(status.st_mode):
                return fd
            os.close(fd)
    return -1


def _remove_leftover(path: Path, inode: int) -> None:
    """Remove an empty file at `path`, created by a rotation that the end of the daemon interrupted.

    With it in place, the kubelet would find nothing to rotate while the lines go to the old file.
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
    if whole < len(tail) and (whole or start == 0):  # else it was not written by a relay
        os.ftruncate(fd, start + whole)


def _inode_at(path: Path) -> int:
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        return 0
