"""Pipes, terminals and sockets as the streams of a session.

Nothing is read ahead: when a client stops reading, the kernel's buffer fills and the process that writes to
it blocks. So a stalled reader stalls its stream alone. Everything here belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable

from sandbox.errors import StreamReset

_CHUNK = 64 << 10


class FdReader:
    """A `session.Source` of a descriptor, which it owns and which must be non-blocking."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._expired = False
        self._stopped = False
        self._changed = asyncio.Event()

    async def read(self) -> bytes:
        """Return what is there; b"" at the end of the stream. Raises StreamReset after `stop`."""
        while True:
            if self._stopped:
                raise StreamReset("the stream was stopped")
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
                if error.errno not in (errno.EIO, errno.ECONNRESET):  # EIO: no process has the terminal open
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
        """End the stream after what is there now: a background child may keep the other end open for ever."""
        self._expired = True
        self._changed.set()

    def stop(self) -> None:
        """Close the descriptor; a pending read raises StreamReset. Idempotent."""
        self._stopped = True
        self._close()
        self._changed.set()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)


class FdWriter:
    """A `session.Sink` of a descriptor, which it owns and which must be non-blocking.

    `end` is called with the descriptor before it is closed.
    """

    def __init__(self, fd: int, end: Callable[[int], None] = lambda fd: None) -> None:
        self._fd = fd
        self._end = end
        self._changed = asyncio.Event()

    async def write(self, data: bytes) -> None:
        """Write all of it. Raises StreamReset once the stream or its reader is closed."""
        rest = memoryview(data)
        while rest:
            if self._fd < 0:
                raise StreamReset("the stream is closed")
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                await self._wait()
            except OSError as error:
                raise StreamReset(f"its reader has closed it: {error.strerror}") from error

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
        """Let the reader see the end. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            asyncio.get_running_loop().remove_writer(fd)
            try:
                self._end(fd)
            finally:
                os.close(fd)
            self._changed.set()


class SocketConnection:
    """A `session.PortConnection` over a connected socket, which it owns."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.reader = FdReader(os.dup(connection.fileno()))
        self.writer = FdWriter(connection.detach(), shut_down)

    def close(self) -> None:
        """End both directions. Idempotent."""
        self.reader.stop()
        self.writer.close()


def shut_down(fd: int) -> None:
    """Shut a socket's writing side down: the peer sees the end, and may still send."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
        connection.shutdown(socket.SHUT_WR)
