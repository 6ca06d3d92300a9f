"""A SPDY connection over a transport, and its streams as channels.

A stream costs until the session has released it, also one that the client has reset meanwhile. So these are
counted, and a client that opens more of them than its session needs has them refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from cri.streaming.channels import Channel, ChannelClosed, ConnectionLost, ReceiveBuffer
from cri.streaming.spdy import (
    STREAMS_MAX,
    DataReceived,
    FinReceived,
    GoAway,
    RstStream,
    SpdyProtocol,
    SynStream,
    WindowUpdate,
)
from cri.streaming.spdy_frames import Headers, SpdyError, Status
from cri.streaming.transport import IdleTimer, Transport, wait_for_space


class SpdyChannel:
    """One stream, opened by the client. See `Channel`."""

    half_closes = True

    def __init__(self, connection: SpdyConnection, id: int, headers: Headers) -> None:
        self.id = id
        self.headers = headers
        self.buffer = ReceiveBuffer(self._on_consumed)
        self._connection = connection

    def _on_consumed(self, count: int) -> None:
        self._connection.spdy.consumed(self.id, count)
        self._connection.flush_nowait()

    async def read(self) -> bytes:
        """See `Channel.read`."""
        return await self.buffer.read()

    async def write(self, data: bytes) -> None:
        """See `Channel.write`. Waits for the peer's window, if it has any."""
        rest = memoryview(data)
        while rest:
            count = min(len(rest), await self._connection.wait_for_window(self.id))
            self._connection.spdy.send(self.id, rest[:count])
            rest = rest[count:]
            await self._connection.flush()

    async def close(self) -> None:
        """See `Channel.close`. Sends FLAG_FIN."""
        self._connection.spdy.end(self.id)
        await self._connection.flush()

    def reset(self) -> None:
        """See `Channel.reset`. Sends RST_STREAM."""
        self._connection.spdy.reset(self.id)
        self.buffer.fail(ChannelClosed())
        self._connection.forget(self.id)
        self._connection.flush_nowait()


class SpdyConnection:
    """The connection of one client. `run` receives for every stream, so it must run while any is in use.

    `channels_max` is how many channels there are at once, those included that the client has reset and the
    session has not.
    """

    def __init__(self, transport: Transport, idle: IdleTimer, channels_max: int = STREAMS_MAX) -> None:
        self.spdy = SpdyProtocol()
        self._transport = transport
        self._idle = idle
        self._channels: dict[int, SpdyChannel] = {}
        self._channels_max = channels_max
        self._held: set[int] = set()  # by the session, which ends with `reset`
        self._waiting: dict[int, SpdyChannel] = {}  # for `accept`
        self._opens_no_more = False
        self._opened = asyncio.Event()
        self._window_changed = asyncio.Event()
        self._lost: ConnectionLost | None = None

    async def run(self) -> None:
        """Receive until the client disconnects. Always raises ConnectionLost.

        A client that ends its side of the connection has ended all its streams, and may still receive.
        """
        try:
            while data := await self._transport.receive():
                await self._handle(data)
            for channel in self._channels.values():
                channel.buffer.end()
            self._end_accept()
        except SpdyError as cause:
            lost = ConnectionLost(f"the client violated SPDY: {cause}")
            self._fail(lost)
            raise lost from cause
        except ConnectionLost as lost:
            self._fail(lost)
            raise
        raise ConnectionLost("the client disconnected")

    async def _handle(self, data: bytes) -> None:
        received: list[SpdyChannel] = []
        for event in self.spdy.receive(data):
            match event:
                case SynStream(id, headers):
                    self._open(id, headers)
                case DataReceived(id, part) if id in self._channels:
                    self._idle.touch()
                    self._channels[id].buffer.put(part)
                    received.append(self._channels[id])
                case FinReceived(id) if id in self._channels:
                    self._channels[id].buffer.end()
                case RstStream(id) if id in self._channels:
                    self._channels.pop(id).buffer.fail(ChannelClosed())
                    self._waiting.pop(id, None)
                    self._window_changed.set()
                case WindowUpdate():
                    self._window_changed.set()
                case GoAway():
                    self._end_accept()
        self._send_output()
        for channel in received:
            await wait_for_space(channel.buffer, self._transport)

    def _open(self, id: int, headers: Headers) -> None:
        if len(self._held) + len(self._waiting) >= self._channels_max:
            self.spdy.reset(id, Status.REFUSED_STREAM)
            return
        self.spdy.reply(id)
        self._channels[id] = self._waiting[id] = SpdyChannel(self, id, headers)
        self._opened.set()

    def _end_accept(self) -> None:
        self._opens_no_more = True
        self._opened.set()

    def _fail(self, lost: ConnectionLost) -> None:
        self._lost = lost
        for channel in self._channels.values():
            channel.buffer.fail(lost)
        self._channels.clear()
        self._window_changed.set()
        self._end_accept()

    async def accept(self) -> AsyncIterator[Channel]:
        """See `ChannelListener.accept`. Ends at GOAWAY."""
        while self._waiting or not self._opens_no_more:
            if not self._waiting:
                self._opened.clear()
                await self._opened.wait()
                continue
            id = next(iter(self._waiting))
            self._held.add(id)
            yield self._waiting.pop(id)
        if self._lost is not None:
            raise self._lost

    # --------------------------------------------------------------------------- for channels

    async def wait_for_window(self, id: int) -> int:
        """Wait until data may be sent on a stream, and return how many bytes.

        Raises ChannelClosed, ConnectionLost.
        """
        while True:
            if self._lost is not None:
                raise self._lost
            if not self.spdy.is_open(id):
                raise ChannelClosed
            if capacity := self.spdy.send_capacity(id):
                return capacity
            self._window_changed.clear()
            await self._window_changed.wait()

    async def flush(self) -> None:
        """Send what SPDY has to send. Raises ConnectionLost."""
        self._idle.touch()
        if data := self.spdy.output():
            await self._transport.send(data)

    def flush_nowait(self) -> None:
        """Send as `flush` does, without waiting. A lost connection fails `run` and the channels instead."""
        try:
            self._send_output()
        except ConnectionLost as lost:
            self._fail(lost)

    def _send_output(self) -> None:
        if data := self.spdy.output():
            self._transport.send_nowait(data)

    def forget(self, id: int) -> None:
        """Drop events of a stream that was reset here. Idempotent."""
        self._channels.pop(id, None)
        self._held.discard(id)

    async def close(self) -> None:
        """Send GOAWAY. Raises ConnectionLost."""
        self.spdy.go_away()
        self._send_output()
