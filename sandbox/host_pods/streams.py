"""Pipes, terminals and sockets as the ends of a session.

Nothing is read ahead: the kernel's buffer is all that a reader that stops leaves full, and whoever writes
to it waits. So a stopped reader stops its own stream alone. All belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable

from sandbox.errors import StreamReset

_CHUNK = 64 << 10


class FdReader:
    """Owns the descriptor, which does not block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._expired = False
        self._stopped = False
        self._changed = asyncio.Event()

    async def read(self) -> bytes:
        """Raises StreamReset after `stop`."""
        while True:
            if self._stopped:
                raise StreamReset("the stream is not read any more")
            if self._fd < 0:
                return b""
            try:
                data = os.read(self._fd, _CHUNK)
            except BlockingIOError:
                if not self._expired:
                    await self._wait()
                    continue
                data = b""
            except OSError as error:
                if error.errno not in (errno.EIO, errno.ECONNRESET):  # EIO: nobody has the terminal any more
                    raise
                data = b""
            if not data:
                self._close()
            return data

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._changed.clear()
        loop.add_reader(self._fd, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            if self._fd >= 0:
                loop.remove_reader(self._fd)

    def expire(self) -> None:
        """What is there now is all: a child left in the background may hold the other end for ever."""
        self._expired = True
        self._changed.set()

    def stop(self) -> None:
        self._stopped = True
        self._close()
        self._changed.set()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)


class FdWriter:
    """Owns the descriptor, which does not block. `end` is done before it is closed."""

    def __init__(self, fd: int, end: Callable[[int], None] = lambda fd: None) -> None:
        self._fd = fd
        self._end = end
        self._changed = asyncio.Event()

    async def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            if self._fd < 0:
                raise StreamReset("the stream is closed")
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                await self._wait()
            except OSError as error:
                raise StreamReset(f"nobody reads it any more: {error.strerror}") from error

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._changed.clear()
        loop.add_writer(self._fd, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            if self._fd >= 0:
                loop.remove_writer(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            asyncio.get_running_loop().remove_writer(fd)
            try:
                self._end(fd)
            finally:
                os.close(fd)
            self._changed.set()
