"""Streams within a connection, and their credit.

Inputs come from the guest, outputs go to it. The guest is held to its credit: whoever opened an
input decides by granting how much can be under way, so no sink needs a bound of its own.

    input:   OPEN ──CLOSE from guest──> gone
               └──reset()──> DISCARDING ──CLOSE or RESET from guest, or enough newer ones──> gone
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from sandbox.errors import GuestUnreachable, ProtocolError, StreamReset
from sandbox.guest.connection import Connection
from sandbox.guest.frames import MAX_DATA, Kind, decode_credit, encode_credit

MAX_CREDIT = (1 << 32) - 1
_MAX_DISCARDING = 1024


class StreamSink(Protocol):
    """Takes what the guest sends on one stream. Called in the loop; must not block.

    An error ends the connection (ProtocolError: because the guest broke a rule of this stream).
    """

    def data(self, chunk: memoryview) -> None:
        """`chunk` is good until this returns; copy what is to be kept."""

    def closed(self) -> None:
        """The guest has no more. Not called when the connection is lost."""


@dataclass(slots=True)
class _Input:
    sink: StreamSink | None  # None: discarding
    credit: int


class Inputs:
    """The guest-to-host streams of one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._open: dict[int, _Input] = {}
        self._discarding: dict[int, None] = {}  # in order of their reset
        self._owed: dict[int, int] = {}  # granted, and not yet told to the guest
        self._flush_due = False

    def open(self, stream: int, sink: StreamSink, window: int) -> None:
        if not 0 <= window <= MAX_CREDIT:
            raise ValueError(f"window of {window} bytes")
        self._open[stream] = _Input(sink, window)

    def data(self, stream: int, payload: memoryview) -> None:
        """Raises ProtocolError on an unknown stream or too little credit."""
        entry = self._open.get(stream)
        if entry is None:
            raise ProtocolError(f"the guest sent data on stream {stream}, which is not open")
        entry.credit -= len(payload)
        if entry.credit < 0:
            raise ProtocolError(f"the guest sent {-entry.credit} bytes above its credit on stream {stream}")
        if entry.sink is not None:
            entry.sink.data(payload)

    def closed(self, stream: int) -> None:
        """CLOSE came. Raises ProtocolError on an unknown stream."""
        entry = self._open.pop(stream, None)
        if entry is None:
            raise ProtocolError(f"the guest closed stream {stream}, which is not open")
        self._discarding.pop(stream, None)
        self._owed.pop(stream, None)
        if entry.sink is not None:
            entry.sink.closed()

    def grant(self, stream: int, count: int) -> None:
        """Let the guest send so much more. Grants of one turn of the loop leave in one frame."""
        entry = self._open.get(stream)
        if entry is None or entry.sink is None or count == 0:
            return
        entry.credit += count
        self._owed[stream] = self._owed.get(stream, 0) + count
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush_soon)

    def _flush_soon(self) -> None:
        self._flush_due = False
        self.flush()

    def flush(self) -> None:
        """Tell the guest its new credit, unless it does not read: then once it does."""
        if self._connection.lost.done() or not self._connection.writable.is_set():
            return
        owed, self._owed = self._owed, {}
        with suppress(GuestUnreachable):  # everyone learns that from `lost`
            self._connection.write(*(encode_credit(stream, count) for stream, count in owed.items()))

    def reset(self, stream: int) -> None:
        """Want no more of this stream; what is under way is dropped. Idempotent."""
        entry = self._open.get(stream)
        if entry is None or entry.sink is None:
            return
        entry.sink = None
        self._owed.pop(stream, None)
        self._discarding[stream] = None
        if len(self._discarding) > _MAX_DISCARDING:
            oldest = next(iter(self._discarding))
            del self._discarding[oldest], self._open[oldest]
        if not self._connection.lost.done():
            self._connection.send(Kind.RESET, stream)


class OutputStream:
    """A host-to-guest stream. One task writes at a time."""

    def __init__(self, id: int, connection: Connection) -> None:
        self.id = id
        self._connection = connection
        self._credit = 0  # the guest grants the first with WINDOW
        self._reset = False
        self._closed = False
        self._changed = asyncio.Event()

    async def write(self, data: bytes) -> None:
        """Return once all is queued towards the guest.

        Raises StreamReset when the guest wants no more, GuestUnreachable when it is gone.
        """
        rest = memoryview(data)
        while rest:
            await self._connection.writable.wait()
            await self._wait_for_credit()
            count = min(len(rest), self._credit, MAX_DATA)
            self._connection.send(Kind.DATA, self.id, bytes(rest[:count]))
            self._credit -= count
            rest = rest[count:]

    async def _wait_for_credit(self) -> None:
        while True:
            if self._connection.lost.done():
                raise self._connection.lost.result()
            if self._reset or self._closed:
                raise StreamReset(f"stream {self.id} to the guest is closed")
            if self._credit:
                return
            self._changed.clear()
            await self._changed.wait()

    def close(self) -> None:
        """No more data: the reader sees the end. Idempotent; nothing happens on a lost connection."""
        if not self._closed and not self._connection.lost.done():
            self._connection.send(Kind.CLOSE, self.id)
        self._closed = True
        self._changed.set()

    # ------------------------------------------------------------------ told by the connection

    def window(self, payload: memoryview | bytes) -> None:
        """Raises ProtocolError when the credit grows beyond what its field could say."""
        self._credit += decode_credit(payload)
        if self._credit > MAX_CREDIT:
            raise ProtocolError(f"the guest granted too much on stream {self.id}")
        self._changed.set()

    def reset(self) -> None:
        self._reset = True
        self._changed.set()

    def wake(self) -> None:
        """The connection is lost."""
        self._changed.set()

    @property
    def done(self) -> bool:
        return self._closed or self._reset
