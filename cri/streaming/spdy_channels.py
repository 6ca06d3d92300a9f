"""SPDY streams as channels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from cri.streaming.channels import Channel, ChannelClosed, ConnectionLost, Inbox
from cri.streaming.spdy import Broken, Ended, GoneAway, Opened, Received, Spdy, Widened
from cri.streaming.spdy_frames import Headers, SpdyError
from cri.streaming.wire import Idle, Wire, wait_for_room


class SpdyChannel:
    """One stream, opened by the client."""

    def __init__(self, peer: SpdyPeer, id: int, headers: Headers) -> None:
        self.id = id
        self.headers = headers
        self.inbox = Inbox(self._taken)
        self._peer = peer

    def _taken(self, count: int) -> None:
        self._peer.spdy.taken(self.id, count)
        self._peer.flush_soon()

    async def read(self) -> bytes:
        return await self.inbox.read()

    async def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            count = min(len(rest), await self._peer.room(self.id))
            self._peer.spdy.send(self.id, rest[:count])
            rest = rest[count:]
            await self._peer.flush()

    async def close(self) -> None:
        self._peer.spdy.end(self.id)
        await self._peer.flush()

    def reset(self) -> None:
        self._peer.spdy.reset(self.id)
        self.inbox.fail(ChannelClosed())
        self._peer.forget(self.id)
        self._peer.flush_soon()


class SpdyPeer:
    """A client and its streams. `run` reads for all of them, so it must run as long as any is used."""

    def __init__(self, wire: Wire, idle: Idle) -> None:
        self.spdy = Spdy()
        self._wire = wire
        self._idle = idle
        self._channels: dict[int, SpdyChannel] = {}
        self._arrived: asyncio.Queue[SpdyChannel | None] = asyncio.Queue()
        self._widened = asyncio.Event()
        self._lost: ConnectionLost | None = None

    async def run(self) -> None:
        """Until the client has left. Raises ConnectionLost, always."""
        try:
            while data := await self._wire.receive():
                await self._take(data)
            raise ConnectionLost("the client has left")
        except SpdyError as cause:
            lost = ConnectionLost(f"the client broke the protocol: {cause}")
            self._lose(lost)
            raise lost from cause
        except ConnectionLost as lost:
            self._lose(lost)
            raise

    async def _take(self, data: bytes) -> None:
        full: list[SpdyChannel] = []
        for event in self.spdy.receive(data):
            match event:
                case Opened(id, headers):
                    self.spdy.reply(id)
                    self._channels[id] = SpdyChannel(self, id, headers)
                    self._arrived.put_nowait(self._channels[id])
                case Received(id, piece) if id in self._channels:
                    self._idle.touch()
                    self._channels[id].inbox.put(piece)
                    full.append(self._channels[id])
                case Ended(id) if id in self._channels:
                    self._channels[id].inbox.end()
                case Broken(id) if id in self._channels:
                    self._channels.pop(id).inbox.fail(ChannelClosed())
                    self._widened.set()
                case Widened():
                    self._widened.set()
                case GoneAway():
                    self._arrived.put_nowait(None)
        self._post()
        for channel in full:
            await wait_for_room(channel.inbox, self._wire)

    def _lose(self, lost: ConnectionLost) -> None:
        self._lost = lost
        for channel in self._channels.values():
            channel.inbox.fail(lost)
        self._channels.clear()
        self._widened.set()
        self._arrived.put_nowait(None)

    async def arrivals(self) -> AsyncIterator[Channel]:
        while (channel := await self._arrived.get()) is not None:
            yield channel
        if self._lost is not None:
            raise self._lost

    # --------------------------------------------------------------------------- for channels

    async def room(self, id: int) -> int:
        """How much may be written, once it is anything. Raises ChannelClosed, ConnectionLost."""
        while True:
            if self._lost is not None:
                raise self._lost
            if not self.spdy.is_open(id):
                raise ChannelClosed
            if room := self.spdy.room(id):
                return room
            self._widened.clear()
            await self._widened.wait()

    async def flush(self) -> None:
        """Raises ConnectionLost."""
        self._idle.touch()
        if data := self.spdy.output():
            await self._wire.send(data)

    def flush_soon(self) -> None:
        """As `flush`, by one who cannot wait; the reading side finds out if the client is gone."""
        try:
            self._post()
        except ConnectionLost as lost:
            self._lose(lost)

    def _post(self) -> None:
        if data := self.spdy.output():
            self._wire.post(data)

    def forget(self, id: int) -> None:
        self._channels.pop(id, None)

    async def finish(self) -> None:
        """All was said. Raises ConnectionLost."""
        self.spdy.go_away()
        self._post()
