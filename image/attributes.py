"""Attributes of directories, to be set when a layer is complete: each new entry changes its directory's time.

A layer may have millions of directories, so they are kept packed, and beyond MEMORY bytes in a file without a
name, which ends with its descriptor. A record is a size and msgpack.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import tempfile
from collections.abc import Iterator

import msgspec

from image.tar import TarError, Xattrs

MEMORY = 2 << 20
_XATTRS_MAX = 1 << 20  # bytes; a disk with less free may really be full
_SIZE = struct.Struct("=I")


class Attributes(msgspec.Struct, frozen=True, array_like=True):
    """What is set on a directory at the end."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: tuple[tuple[bytes, bytes], ...]  # their names may be of any encoding

    def apply(self, fd: int) -> None:
        """Set them on an open directory. Raises OSError, TarError."""
        os.fchown(fd, self.uid, self.gid)
        os.fchmod(fd, self.mode)
        set_xattrs(fd, self.xattrs)
        os.utime(fd, ns=(self.mtime_ns, self.mtime_ns))


def set_xattrs(fd: int, xattrs: Xattrs | tuple[tuple[bytes, bytes], ...]) -> None:
    """Set extended attributes of an open file.

    Raises OSError, and TarError for more than the filesystem stores for one file: ext4 reports that as a full
    disk too (xattr(7)).
    """
    for key, value in xattrs:
        try:
            os.setxattr(fd, key, value)
        except OSError as error:
            found = os.fstatvfs(fd)
            if error.errno == errno.ENOSPC and found.f_bavail * found.f_frsize > _XATTRS_MAX:
                total = sum(len(key) + len(value) for key, value in xattrs)
                problem = f"{len(xattrs)} extended attributes of {total} bytes"
                raise TarError(
                    f"{problem}, more than the filesystem of images stores for one file"
                ) from error
            raise


class DeferredAttributes:
    """Paths with attributes, in the order in which they were appended. Close it.

    `folder` is where the file is made. Its methods raise OSError.
    """

    def __init__(self, folder: str) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=MEMORY, dir=folder)  # noqa: SIM115 (see close)
        self._encoder = msgspec.msgpack.Encoder()

    def close(self) -> None:
        """Drop all records."""
        with contextlib.suppress(OSError):  # on a full disk it cannot write what is not needed any more
            self._file.close()

    def append(self, path: tuple[bytes, ...], attributes: Attributes) -> None:
        """Add a record."""
        packed = self._encoder.encode((b"/".join(path), attributes))
        self._file.write(_SIZE.pack(len(packed)) + packed)

    def __iter__(self) -> Iterator[tuple[tuple[bytes, ...], Attributes]]:
        decoder = msgspec.msgpack.Decoder(tuple[bytes, Attributes])
        self._file.seek(0)
        while head := self._file.read(_SIZE.size):
            path, attributes = decoder.decode(self._file.read(_SIZE.unpack(head)[0]))
            yield tuple(path.split(b"/")) if path else (), attributes
