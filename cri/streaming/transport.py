"""The byte transport under SPDY or WebSocket: a TCP or TLS connection of one client."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from cri.streaming.channels import ConnectionLost, ReceiveBuffer

READ_BYTES = 64 << 10
UNSENT_MAX = 1 << 20  # bytes of replies that nothing waits for: PONG, WINDOW_UPDATE
LINGER_S = 2.0  # for the client to close after we have
DISCONNECT_POLL_S = 5.0  # how often an unread connection is checked for the client's end
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
_TCP_ENDED = frozenset({7, 8, 9, 11})  # CLOSE, CLOSE_WAIT, LAST_ACK, CLOSING: the peer sends no more


class Transport(Protocol):
    """A byte stream to the client and back."""

    async def receive(self) -> bytes:
        """Return received bytes; b"" at the end. Raises ConnectionLost."""

    async def send(self, data: bytes) -> None:
        """Send, and return once more can be buffered. Raises ConnectionLost."""

    def send_nowait(self, data: bytes) -> None:
        """Send a small reply without waiting. Raises ConnectionLost beyond UNSENT_MAX unsent bytes."""

    def is_disconnected(self) -> bool:
        """Whether the client is gone, also while bytes of it are unread."""

    async def close(self) -> None:
        """Let the client receive what was sent, then close the connection. Raises ConnectionLost."""


class TcpTransport:
    """A TCP or TLS connection. `trailing` is what was read after the HTTP request already."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, trailing: bytes = b""
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._trailing = trailing
        self._socket: socket.socket | None = writer.get_extra_info("socket")
        if self._socket is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    async def receive(self) -> bytes:
        """See `Transport.receive`."""
        if self._trailing:
            trailing, self._trailing = self._trailing, b""
            return trailing
        try:
            return await self._reader.read(READ_BYTES)
        except OSError as cause:
            raise ConnectionLost(f"the connection broke: {cause}") from cause

    async def send(self, data: bytes) -> None:
        """See `Transport.send`."""
        if self._writer.is_closing():
            raise ConnectionLost("the connection is closed")
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as cause:
            raise ConnectionLost(f"the connection broke: {cause}") from cause

    def send_nowait(self, data: bytes) -> None:
        """See `Transport.send_nowait`."""
        if self._writer.is_closing():
            raise ConnectionLost("the connection is closed")
        self._writer.write(data)
        if self._writer.transport.get_write_buffer_size() > UNSENT_MAX:
            raise ConnectionLost("the client sends requests and does not read the replies")

    def is_disconnected(self) -> bool:
        """See `Transport.is_disconnected`. Reads the TCP state, as a paused reader gets no EOF."""
        if self._writer.is_closing() or self._reader.at_eof():
            return True
        if self._socket is None:
            return False
        try:
            state: int = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        except OSError:
            return True
        return state in _TCP_ENDED

    async def close(self) -> None:
        """Send EOF, read to the client's, then close.

        Closing with unread bytes would send RST, and the client could lose our last bytes.
        """
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(LINGER_S):
                self._writer.transport.set_write_buffer_limits(0)
                await self._writer.drain()
                if self._writer.can_write_eof():  # false with TLS, whose clients see the end of the protocol
                    self._writer.write_eof()
                while await self.receive():
                    pass
                self._writer.close()
                await self._writer.wait_closed()


class Disconnectable(Protocol):
    """The part of a transport that `wait_for_space` needs."""

    def is_disconnected(self) -> bool:
        """See `Transport.is_disconnected`."""


async def wait_for_space(buffer: ReceiveBuffer, transport: Disconnectable) -> None:
    """Wait until a full buffer has space. Raises ConnectionLost when the client disconnects meanwhile."""
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCONNECT_POLL_S):
                await buffer.wait_for_space()
            return
        if transport.is_disconnected():
            raise ConnectionLost("the client disconnected")


class IdleTimer:
    """Expires when `touch` was not called for `timeout_s` seconds."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._clock: Callable[[], float] = asyncio.get_running_loop().time
        self._last = self._clock()

    def touch(self) -> None:
        """Start the time again: data was transferred."""
        self._last = self._clock()

    async def wait_expired(self) -> None:
        """Return once the timer has expired."""
        while (left := self._last + self._timeout_s - self._clock()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
