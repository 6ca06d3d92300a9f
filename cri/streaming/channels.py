"""What SPDY and WebSocket connections have in common: named byte streams, here called channels.

One task reads a channel and one task writes it. What its reader has not consumed is bounded by BUFFER_MAX: a
peer with flow control stops at its own window first; for any other the whole connection is not read until
the buffer has space again, as nothing finer would stop it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol

BUFFER_MAX = 256 << 10


class ConnectionLost(Exception):
    """The client disconnected, or violated the protocol."""


class ChannelClosed(Exception):
    """The client closed this channel in both directions."""


class Channel(Protocol):
    """A byte stream in both directions within a connection."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers that the client opened it with, names in lower case."""

    @property
    def half_closes(self) -> bool:
        """Whether `close` shows the client the end, so that it can end its direction too."""

    async def read(self) -> bytes:
        """Return received bytes; b"" at the end. Raises ChannelClosed, ConnectionLost."""

    async def write(self, data: bytes) -> None:
        """Return once the data is with the transport. Raises ChannelClosed, ConnectionLost."""

    async def close(self) -> None:
        """End our direction. Idempotent. Raises ConnectionLost."""

    def reset(self) -> None:
        """Close both directions and drop what is buffered. Idempotent."""


class ChannelListener(Protocol):
    """A connection whose channels the client opens (SPDY)."""

    def accept(self) -> AsyncIterator[Channel]:
        """Yield channels as the client opens them, until it opens no more. Raises ConnectionLost."""


class ReceiveBuffer:
    """Received bytes of one channel that were not read yet.

    `on_consumed` is called with the size of each chunk, when its reader comes back for the next one.
    """

    def __init__(self, on_consumed: Callable[[int], None]) -> None:
        self._on_consumed = on_consumed
        self._chunks: deque[bytes] = deque()
        self._size = 0  # with the chunk that is being read
        self._reading = 0
        self._ended = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._has_space = asyncio.Event()
        self._has_space.set()

    async def read(self) -> bytes:
        """Return the next chunk; b"" at the end. Raises the error that `fail` was given."""
        self._consume_last_chunk()
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._ended:
                return b""
            self._changed.clear()
            await self._changed.wait()
        chunk = self._chunks.popleft()
        self._reading = len(chunk)
        return chunk

    def _consume_last_chunk(self) -> None:
        count, self._reading = self._reading, 0
        self._size -= count
        if self._size < BUFFER_MAX:
            self._has_space.set()
        if count:
            self._on_consumed(count)

    def put(self, data: bytes) -> None:
        """Append a chunk, also beyond BUFFER_MAX; dropped after `end` or `fail`."""
        if self._ended or self._error is not None:
            return
        self._chunks.append(data)
        self._size += len(data)
        if self._size >= BUFFER_MAX:
            self._has_space.clear()
        self._changed.set()

    def end(self) -> None:
        """Let the reader see the end after the last chunk. Idempotent."""
        self._ended = True
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """Drop what was not read, and let the reader raise `error`. The first error counts."""
        self._error = self._error or error
        self._chunks.clear()
        self._has_space.set()
        self._changed.set()

    async def wait_for_space(self) -> None:
        """Wait until less than BUFFER_MAX is buffered."""
        await self._has_space.wait()
