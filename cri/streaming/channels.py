"""What SPDY and WebSocket clients have in common: named byte streams over one connection.

A channel is read by one task and written by one task. What its reader has not taken yet is bounded: a
peer that minds windows stops at its own; with any other the whole connection is read no further until
there is room again, since nothing finer would hold it back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol

INBOX_MAX = 256 << 10
PATIENCE_S = 5.0  # between looks whether a peer that is not read has gone


class ConnectionLost(Exception):
    """The client is gone, or broke the protocol."""


class ChannelClosed(Exception):
    """The client wants no more of this channel, in either direction."""


class Channel(Protocol):
    @property
    def headers(self) -> Mapping[str, str]: ...

    async def read(self) -> bytes:
        """b"" at the end. Raises ChannelClosed, ConnectionLost."""

    async def write(self, data: bytes) -> None:
        """Returns once it is on its way. Raises ChannelClosed, ConnectionLost."""

    async def close(self) -> None:
        """No more from us. Idempotent. Raises ConnectionLost."""

    def reset(self) -> None:
        """End both directions, dropping what is under way. Idempotent."""


class Peer(Protocol):
    """A connection whose channels the client opens (SPDY)."""

    def arrivals(self) -> AsyncIterator[Channel]:
        """Channels as the client opens them. Raises ConnectionLost."""


class Inbox:
    """What has come for one channel and was not read yet."""

    def __init__(self, taken: Callable[[int], None]) -> None:
        self._taken = taken  # told when the reader has dealt with so many bytes
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._reading = 0
        self._ended = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._roomy = asyncio.Event()
        self._roomy.set()

    async def read(self) -> bytes:
        self._deal_with_last()
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

    def _deal_with_last(self) -> None:
        count, self._reading = self._reading, 0
        self._size -= count
        if self._size < INBOX_MAX:
            self._roomy.set()
        if count:
            self._taken(count)

    def put(self, data: bytes) -> None:
        if self._ended or self._error is not None:
            return
        self._chunks.append(data)
        self._size += len(data)
        if self._size >= INBOX_MAX:
            self._roomy.clear()
        self._changed.set()

    def end(self) -> None:
        self._ended = True
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """What was not read yet is dropped."""
        self._error = self._error or error
        self._chunks.clear()
        self._roomy.set()
        self._changed.set()

    async def room(self) -> None:
        """Wait until more may be put."""
        await self._roomy.wait()
