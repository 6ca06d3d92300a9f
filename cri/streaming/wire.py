"""The bytes of one client's connection, under whatever is spoken over it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from cri.streaming.channels import PATIENCE_S, ConnectionLost, Inbox

READ_BYTES = 64 << 10
UNSENT_MAX = 1 << 20  # of answers that nobody waits for: pongs, windows
LINGER_S = 2.0
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
_TCP_ENDED = frozenset({7, 8, 9, 11})  # CLOSE, CLOSE_WAIT, LAST_ACK, CLOSING: the peer sends no more


class Wire(Protocol):
    async def receive(self) -> bytes:
        """b"" at the end. Raises ConnectionLost."""

    async def send(self, data: bytes) -> None:
        """Returns once there is room for more. Raises ConnectionLost."""

    def post(self, data: bytes) -> None:
        """Send without waiting, a little. Raises ConnectionLost when the client reads nothing."""

    def has_left(self) -> bool:
        """The client is gone, although what it sent may not be read yet."""

    async def finish(self) -> None:
        """All was said: let the client take it, then hang up. Raises ConnectionLost."""


class TcpWire:
    """A TCP or TLS connection; `early` was read already."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, early: bytes = b""
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._early = early
        self._socket: socket.socket | None = writer.get_extra_info("socket")
        if self._socket is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    async def receive(self) -> bytes:
        if self._early:
            early, self._early = self._early, b""
            return early
        try:
            return await self._reader.read(READ_BYTES)
        except OSError as cause:
            raise ConnectionLost(f"the connection broke: {cause}") from cause

    async def send(self, data: bytes) -> None:
        if self._writer.is_closing():
            raise ConnectionLost("the connection is closed")
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as cause:
            raise ConnectionLost(f"the connection broke: {cause}") from cause

    def post(self, data: bytes) -> None:
        if self._writer.is_closing():
            raise ConnectionLost("the connection is closed")
        self._writer.write(data)
        if self._writer.transport.get_write_buffer_size() > UNSENT_MAX:
            raise ConnectionLost("the client asks and does not read the answers")

    def has_left(self) -> bool:
        if self._writer.is_closing() or self._reader.at_eof():
            return True
        if self._socket is None:
            return False
        try:
            state: int = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        except OSError:
            return True
        return state in _TCP_ENDED

    async def finish(self) -> None:
        """Closing over unread bytes would reset the connection and take our last words with it."""
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(LINGER_S):
                self._writer.transport.set_write_buffer_limits(0)
                await self._writer.drain()
                if self._writer.can_write_eof():  # not with TLS, whose clients have to see it by themselves
                    self._writer.write_eof()
                while await self.receive():
                    pass
                self._writer.close()
                await self._writer.wait_closed()


class MayLeave(Protocol):
    def has_left(self) -> bool: ...


async def wait_for_room(inbox: Inbox, wire: MayLeave) -> None:
    """Before more is read for a full inbox. Raises ConnectionLost when the client has gone meanwhile."""
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await inbox.room()
            return
        if wire.has_left():
            raise ConnectionLost("the client has left")


class Idle:
    """Ends a conversation on which nothing was said for a while."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._clock: Callable[[], float] = asyncio.get_running_loop().time
        self._last = self._clock()

    def touch(self) -> None:
        self._last = self._clock()

    async def watch(self) -> None:
        """Returns once it has been idle too long."""
        while (left := self._last + self._timeout_s - self._clock()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
