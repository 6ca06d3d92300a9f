"""One connection to an agent: bytes in, frames out, and the end of it.

Invariants: frames are handed on in the order of arrival, none before the guest echoed our nonce and
none after `lost` is set; `lost` is set exactly once, whatever ended the connection; what the guest
does not read is bounded, so that it cannot make the daemon hoard bytes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from sandbox.errors import GuestUnreachable, ProtocolError
from sandbox.guest.frames import Frame, FrameParser, Kind, Resync, header

MAX_UNSENT = 16 << 20  # a few of the largest requests
_HIGH_WATER = 1 << 20
_FLUSH_S = 1.0  # how long `close` waits for a guest that does not read

log = logging.getLogger(__name__)


class Connection(asyncio.BufferedProtocol):
    """Reads into the parser's own buffer: no copy of log data between the socket and the file."""

    def __init__(
        self, nonce: bytes, on_frame: Callable[[Frame], None], on_writable: Callable[[], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        self._resync: Resync | None = Resync(nonce)
        self._parser = FrameParser()
        self._on_frame = on_frame
        self._on_writable = on_writable
        self._transport: asyncio.Transport | None = None
        self.writable = asyncio.Event()
        self.ready: asyncio.Future[None] = loop.create_future()  # nonce seen
        self.lost: asyncio.Future[GuestUnreachable] = loop.create_future()  # with the reason

    # ----------------------------------------------------------------------- asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports behave as asyncio.Transport without being one
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(_HIGH_WATER)
        self.writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        # Before the nonce nothing is parsed, and the empty parser serves as scratch space.
        return self._parser.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self._received(nbytes)
        except ProtocolError as error:
            self.fail(error)
        except Exception as cause:
            # The edge: a sink or event handler broke. Going on would lose what it was told, so the
            # connection ends, and whoever connects again finds the state in the Welcome.
            log.exception("handling a frame of the guest")
            broken = GuestUnreachable(f"handling a frame of the guest failed: {cause}")
            broken.__cause__ = cause
            self.fail(broken)

    def _received(self, count: int) -> None:
        if self._resync is None:
            frames = self._parser.received(count)
        else:
            rest = self._resync.feed(self._parser.buffer()[:count])
            if rest is None:
                return
            self._resync = None
            if not self.ready.done():
                self.ready.set_result(None)
            frames = self._parser.feed(rest)
        for frame in frames:
            if self.lost.done():
                return
            self._on_frame(frame)

    def eof_received(self) -> None:
        return None  # close

    def connection_lost(self, exc: Exception | None) -> None:
        error = GuestUnreachable("the connection to the agent was lost" + (f": {exc}" if exc else ""))
        error.__cause__ = exc
        self._end(error)

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()
        self._on_writable()

    # ------------------------------------------------------------------------------- for us

    def send(self, kind: Kind, stream: int = 0, payload: bytes | memoryview = b"") -> None:
        """Queue one frame; frames of one turn of the loop leave together.

        Raises GuestUnreachable when the connection is lost, or now broken because the guest
        reads nothing; ValueError when the payload is too large.
        """
        self.write(header(kind, stream, len(payload)), payload)

    def write(self, *pieces: bytes | memoryview) -> None:
        """Queue raw bytes. Raises GuestUnreachable."""
        if not self.lost.done() and self._transport is not None:
            self._transport.writelines(pieces)
            if self._transport.get_write_buffer_size() > MAX_UNSENT:
                self.fail(ProtocolError(f"the guest left {MAX_UNSENT >> 20} MiB unread"))
        if self.lost.done():
            raise self.lost.result()

    def fail(self, error: GuestUnreachable) -> None:
        """End the connection at once, for this reason. Idempotent."""
        self._end(error)
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """Send what is queued, then hang up. Idempotent."""
        if self._transport is not None:
            self._transport.close()
            await asyncio.wait({self.lost}, timeout=_FLUSH_S)
        self.fail(GuestUnreachable("the connection to the agent was closed"))

    def _end(self, error: GuestUnreachable) -> None:
        if not self.lost.done():
            self.lost.set_result(error)
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # seen, even if nobody waits
        self.writable.set()  # writers wake up and find `lost`
