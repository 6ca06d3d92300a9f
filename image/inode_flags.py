"""Flags of an inode, as chattr(1) sets them (ioctl_iflags(2))."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

TOPDIR = 0x20000
IMMUTABLE, APPEND_ONLY = 0x10, 0x20

# The kernel reads and writes an int, although the request numbers encode a long.
_GET, _SET = 0x80086601, 0x40086602
_FLAGS = struct.Struct("=i4x")
_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


def change_flags(fd: int, *, add: int = 0, remove: int = 0) -> None:
    """Change the flags of an open file or directory. Idempotent.

    Raises OSError, ENOTTY or EOPNOTSUPP where the filesystem has none.
    """
    (flags,) = _FLAGS.unpack(fcntl.ioctl(fd, _GET, bytes(_FLAGS.size)))
    wanted = (flags | add) & ~remove
    if wanted != flags:
        fcntl.ioctl(fd, _SET, _FLAGS.pack(wanted))


def make_removable(directory: int, name: str) -> None:
    """Clear the flags of a directory and of an entry in it for which unlink(2) fails. Follows no link.

    Raises OSError.
    """
    change_flags(directory, remove=IMMUTABLE | APPEND_ONLY)
    mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return  # only these have such flags, and to open a device may do something
    fd = os.open(name, _OPEN, dir_fd=directory)
    try:
        change_flags(fd, remove=IMMUTABLE | APPEND_ONLY)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)
