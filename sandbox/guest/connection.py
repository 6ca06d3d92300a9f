"""One connection to an agent: turns bytes into frames, and ends for exactly one reason.

Invariants: frames are passed on in the order of arrival, none before the guest echoed our nonce and none
after `lost` is set; `lost` is set exactly once, whatever ended the connection; at most MAX_UNSENT bytes wait
for a guest that does not read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from sandbox.errors import GuestUnreachable, ProtocolError
from sandbox.guest.frames import Frame, FrameParser, Kind, Resync, header

MAX_UNSENT = 16 << 20  # four of the largest requests
_HIGH_WATER = 1 << 20
_FLUSH_S = 1.0  # how long `close` waits for a guest that does not read

log = logging.getLogger(__name__)


class GuestConnection(asyncio.BufferedProtocol):
    """The asyncio protocol of a connection.

    It reads into the parser's buffer, so log data is not copied between the socket and the file.
    """

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

    # ------------------------------------------------------------------- called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        # uvloop's transports behave like asyncio.Transport, but are not instances of it
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(_HIGH_WATER)
        self.writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio.BufferedProtocol. Before the nonce the empty parser's buffer is scratch space."""
        return self._parser.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio.BufferedProtocol. Any error ends the connection."""
        try:
            self._received(nbytes)
        except ProtocolError as error:
            self.fail(error)
        except Exception as cause:
            # A sink or event handler has failed. To go on would lose the frame, so the connection ends, and
            # the next one gets the state with its Welcome.
            log.exception("failed to handle a frame of the guest; closing the connection")
            broken = GuestUnreachable(f"failed to handle a frame of the guest: {cause}")
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
        """See asyncio.BufferedProtocol: returning None closes the transport."""

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.BaseProtocol."""
        error = GuestUnreachable("the connection to the agent was lost" + (f": {exc}" if exc else ""))
        error.__cause__ = exc
        self._end(error)

    def pause_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self.writable.clear()

    def resume_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self.writable.set()
        self._on_writable()

    # --------------------------------------------------------------- called by the client

    def send(self, kind: Kind, stream: int = 0, payload: bytes | memoryview = b"") -> None:
        """Queue one frame. Frames of one iteration of the loop leave together.

        Raises GuestUnreachable when the connection is lost, or ends now because the guest left MAX_UNSENT
        bytes unread; ValueError when the payload is too large.
        """
        self.write(header(kind, stream, len(payload)), payload)

    def write(self, *pieces: bytes | memoryview) -> None:
        """Queue raw bytes. Raises GuestUnreachable as `send` does."""
        if not self.lost.done() and self._transport is not None:
            self._transport.writelines(pieces)
            if self._transport.get_write_buffer_size() > MAX_UNSENT:
                self.fail(ProtocolError(f"the guest left {MAX_UNSENT >> 20} MiB unread"))
        if self.lost.done():
            raise self.lost.result()

    def fail(self, error: GuestUnreachable) -> None:
        """End the connection at once with this reason. Idempotent: the first reason stays."""
        self._end(error)
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """Send what is queued, for at most 1 s, then close the connection. Idempotent."""
        if self._transport is not None:
            self._transport.close()
            await asyncio.wait({self.lost}, timeout=_FLUSH_S)
        self.fail(GuestUnreachable("the connection to the agent was closed"))

    def _end(self, error: GuestUnreachable) -> None:
        if not self.lost.done():
            self.lost.set_result(error)
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # marks it retrieved: there may be no waiter
        self.writable.set()  # writers wake up and find `lost`
