"""A client that opens streams and resets them costs no more than the session holds."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import dataclass, field

import pytest

from cri.streaming.channels import Channel, ConnectionLost
from cri.streaming.spdy import RstStream, SpdyProtocol
from cri.streaming.spdy_connection import SpdyChannel, SpdyConnection
from cri.streaming.transport import IdleTimer
from tests.kit.eventually import eventually

MAX = 16
HEADERS = {"streamtype": "data", "request": "x" * 3000}


@dataclass
class Wire:
    """A transport whose client is the test."""

    client: SpdyProtocol = field(default_factory=lambda: SpdyProtocol(client=True))
    received: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    refused: list[int] = field(default_factory=list)

    async def receive(self) -> bytes:
        return await self.received.get()

    async def send(self, data: bytes) -> None:
        self.send_nowait(data)

    def send_nowait(self, data: bytes) -> None:
        self.refused += [event.stream for event in self.client.receive(data) if isinstance(event, RstStream)]

    def is_disconnected(self) -> bool:
        return False

    async def close(self) -> None:
        self.received.put_nowait(b"")

    def open(self) -> int:
        """Open a stream and return its id; the connection has not seen it yet."""
        id = self.client.open(HEADERS)
        self.received.put_nowait(self.client.output())
        return id

    def open_and_reset(self) -> None:
        """Open a stream and reset it in the same breath."""
        self.client.reset(self.client.open(HEADERS))
        self.received.put_nowait(self.client.output())


def channels() -> int:
    """Count the channels that anything still holds."""
    gc.collect()
    return sum(isinstance(each, SpdyChannel) for each in gc.get_objects())


async def run(connection: SpdyConnection, wire: Wire) -> None:
    """Let the connection handle all that was sent."""
    running = asyncio.create_task(connection.run())
    await eventually(wire.received.empty)
    await wire.close()
    with pytest.raises(ConnectionLost):
        await running


async def test_streams_reset_before_they_are_accepted_are_forgotten() -> None:
    wire = Wire()
    connection = SpdyConnection(wire, IdleTimer(60), MAX)
    for _ in range(1000):
        wire.open_and_reset()
    await run(connection, wire)
    assert wire.refused == []
    assert channels() == 0
    assert [each async for each in connection.accept()] == []


async def test_streams_reset_while_the_session_holds_them_count_until_it_releases_them() -> None:
    wire = Wire()
    connection = SpdyConnection(wire, IdleTimer(60), MAX)
    running = asyncio.create_task(connection.run())
    held: list[Channel] = []

    async def accept() -> None:
        async for channel in connection.accept():
            held.append(channel)  # noqa: PERF401

    accepting = asyncio.create_task(accept())
    for number in range(MAX):
        id = wire.open()
        await eventually(lambda: len(held), until=(number + 1).__eq__)
        wire.client.reset(id)
        wire.received.put_nowait(wire.client.output())
    last = wire.open()
    await eventually(lambda: wire.refused == [last])
    assert len(held) == MAX
    held[0].reset()
    wire.open()
    await eventually(lambda: len(held) == MAX + 1)
    for task in (accepting, running):
        task.cancel()
    await asyncio.gather(accepting, running, return_exceptions=True)


async def test_streams_beyond_the_limit_that_nothing_accepts_are_refused() -> None:
    wire = Wire()
    connection = SpdyConnection(wire, IdleTimer(60), MAX)
    opened = [wire.open() for _ in range(MAX + 3)]
    await run(connection, wire)
    assert wire.refused == opened[MAX:]
