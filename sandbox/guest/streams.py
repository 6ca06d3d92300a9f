"""Streams within a connection, and their credit.

Inputs come from the guest, outputs go to it. The guest must not exceed its credit, so the opener of an input
bounds by its grants what can be on its way, and no sink needs another bound.

    input:   OPEN ──CLOSE from guest──> gone
               └──reset()──> DISCARDING ──CLOSE from guest, or 1024 newer ones──> gone
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from sandbox.errors import GuestUnreachable, ProtocolError, StreamReset
from sandbox.guest.connection import GuestConnection
from sandbox.guest.frames import MAX_DATA, Kind, decode_credit, encode_credit

MAX_CREDIT = (1 << 32) - 1
_MAX_DISCARDING = 1024


class StreamSink(Protocol):
    """Receives what the guest sends on one stream. Called in the loop; must not block.

    An exception ends the connection (ProtocolError: the guest violated the rules of this stream).
    """

    def data(self, chunk: memoryview) -> None:
        """Process bytes. `chunk` is valid until this returns: copy what is to be kept."""

    def closed(self) -> None:
        """The guest has closed the stream. Not called when the connection is lost."""


@dataclass(slots=True)
class _Input:
    sink: StreamSink | None  # None: discarding
    credit: int


class Inputs:
    """The guest-to-host streams of one connection."""

    def __init__(self, connection: GuestConnection) -> None:
        self._connection = connection
        self._open: dict[int, _Input] = {}
        self._discarding: dict[int, None] = {}  # in order of their reset
        self._owed: dict[int, int] = {}  # granted, but not sent to the guest yet
        self._flush_due = False

    def open(self, stream: int, sink: StreamSink, window: int) -> None:
        """Expect a stream with this first credit (bytes). Raises ValueError when it does not fit 32 bits."""
        if not 0 <= window <= MAX_CREDIT:
            raise ValueError(f"window of {window} bytes")
        self._open[stream] = _Input(sink, window)

    def data(self, stream: int, payload: memoryview) -> None:
        """Pass a DATA frame to its sink. Raises ProtocolError on an unknown stream or too little credit."""
        entry = self._open.get(stream)
        if entry is None:
            raise ProtocolError(f"the guest sent data on stream {stream}, which is not open")
        entry.credit -= len(payload)
        if entry.credit < 0:
            raise ProtocolError(f"the guest sent {-entry.credit} bytes above its credit on stream {stream}")
        if entry.sink is not None:
            entry.sink.data(payload)

    def closed(self, stream: int) -> None:
        """Handle a CLOSE frame. Raises ProtocolError on an unknown stream."""
        entry = self._open.pop(stream, None)
        if entry is None:
            raise ProtocolError(f"the guest closed stream {stream}, which is not open")
        self._discarding.pop(stream, None)
        self._owed.pop(stream, None)
        if entry.sink is not None:
            entry.sink.closed()

    def grant(self, stream: int, count: int) -> None:
        """Let the guest send `count` more bytes. Grants of one iteration of the loop leave in one frame."""
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
        """Send the guest its new credit; if it does not read at the moment, once it does."""
        if self._connection.lost.done() or not self._connection.writable.is_set():
            return
        owed, self._owed = self._owed, {}
        with suppress(GuestUnreachable):  # waiters are woken by `lost`
            self._connection.write(*(encode_credit(stream, count) for stream, count in owed.items()))

    def reset(self, stream: int) -> None:
        """Send RESET, and discard what is still on its way. Idempotent.

        Of more than 1024 streams that the guest has not closed after a RESET, the oldest are forgotten:
        data on them is a ProtocolError then.
        """
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
    """A host-to-guest stream. Only one task may write at a time."""

    def __init__(self, id: int, connection: GuestConnection) -> None:
        self.id = id
        self._connection = connection
        self._credit = 0  # the guest grants the first with WINDOW
        self._reset = False
        self._closed = False
        self._changed = asyncio.Event()

    async def write(self, data: bytes) -> None:
        """Write all of `data`, as the guest grants credit. Returns once it is queued.

        Raises StreamReset when the guest has reset the stream or it was closed here, GuestUnreachable when
        the connection is lost.
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
        """Send CLOSE: the reader sees the end. Idempotent; without effect on a lost connection."""
        if not self._closed and not self._connection.lost.done():
            self._connection.send(Kind.CLOSE, self.id)
        self._closed = True
        self._changed.set()

    # ----------------------------------------------------------- called by the connection

    def window(self, payload: memoryview | bytes) -> None:
        """Handle a WINDOW frame. Raises ProtocolError when the credit exceeds 32 bits."""
        self._credit += decode_credit(payload)
        if self._credit > MAX_CREDIT:
            raise ProtocolError(f"the guest granted too much on stream {self.id}")
        self._changed.set()

    def reset(self) -> None:
        """Handle a RESET frame: writes fail from now on."""
        self._reset = True
        self._changed.set()

    def wake(self) -> None:
        """Wake the writer, as the connection is lost."""
        self._changed.set()

    @property
    def done(self) -> bool:
        """Whether it was closed or reset."""
        return self._closed or self._reset
