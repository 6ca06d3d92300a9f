"""PortForward: connections of a client, each to a port in the pod, each alone in failing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from cri.streaming.channels import Channel, ChannelClosed, ConnectionLost, Peer
from sandbox.errors import SandboxError, StreamReset
from sandbox.session import PortConnection

log = logging.getLogger(__name__)

PAIR_TIMEOUT_S = 30.0

Dial = Callable[[int], Awaitable[PortConnection]]


@dataclass(slots=True)
class _Pair:
    """Both channels of one connection, as they come."""

    data: Channel | None = None
    error: Channel | None = None
    late: asyncio.TimerHandle | None = None


class ForwardedStreams:
    """Pairs the streams of a SPDY client by their request id, and carries each connection."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._pairs: dict[str, _Pair] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, peer: Peer) -> None:
        """Until the client opens no more and all is carried. Raises ConnectionLost."""
        try:
            async for channel in peer.arrivals():
                self._take(channel)
            if self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            for pair in self._pairs.values():
                if pair.late is not None:
                    pair.late.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _take(self, channel: Channel) -> None:
        headers = channel.headers
        kind, request = headers.get("streamtype", ""), _request_of(channel)
        if kind not in ("data", "error") or _port_of(headers.get("port", "")) is None:
            channel.reset()
            return
        pair = self._pairs.setdefault(request, _Pair())
        if getattr(pair, kind) is not None:
            channel.reset()
            return
        setattr(pair, kind, channel)
        if pair.data is None or pair.error is None:
            loop = asyncio.get_running_loop()
            pair.late = loop.call_later(PAIR_TIMEOUT_S, self._give_up, request, channel)
            return
        if pair.late is not None:
            pair.late.cancel()
        del self._pairs[request]
        self._spawn(pair.data, pair.error)

    def _give_up(self, request: str, channel: Channel) -> None:
        """Its other half did not come."""
        self._pairs.pop(request, None)
        channel.reset()

    def _spawn(self, data: Channel, error: Channel) -> None:
        port = _port_of(data.headers.get("port", ""))
        assert port is not None
        task = asyncio.create_task(forward(self._dial, port, data, error))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (broken := task.exception()) is not None:
            log.error("a forwarded connection broke: %s", broken, exc_info=broken)


async def forward(dial: Dial, port: int, data: Channel, error: Channel) -> None:
    """One connection, from dialling to its end; what goes wrong is told on its error channel."""
    try:
        try:
            await _connect_and_carry(dial, port, data)
        except SandboxError as problem:
            await _tell(error, f"port {port} of the pod: {problem}")
        await error.close()
    except ConnectionLost:
        pass  # nobody is left to be told
    finally:
        data.reset()
        error.reset()


async def _connect_and_carry(dial: Dial, port: int, data: Channel) -> None:
    connection = await dial(port)
    up = asyncio.create_task(_up(data, connection))
    down = asyncio.create_task(_down(connection, data))
    try:
        done, _ = await asyncio.wait({up, down}, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    except ChannelClosed:
        pass  # the client wants no more of this connection
    finally:
        connection.close()
        for task in (up, down):
            task.cancel()
        await asyncio.gather(up, down, return_exceptions=True)


async def _up(data: Channel, connection: PortConnection) -> None:
    try:
        while chunk := await data.read():
            await connection.writer.write(chunk)
        connection.writer.close()
    except StreamReset:
        pass  # nothing in the pod reads it; what it still has to say goes on coming


async def _down(connection: PortConnection, data: Channel) -> None:
    while chunk := await connection.reader.read():
        await data.write(chunk)
    await data.close()


async def _tell(error: Channel, message: str) -> None:
    with suppress(ChannelClosed):
        await error.write(message.encode())


def _request_of(channel: Channel) -> str:
    """Old clients name none, and open the error stream just before the data stream."""
    named = channel.headers.get("requestid", "")
    if named:
        return named
    id = int(getattr(channel, "id", 0))
    return f"stream {id if channel.headers.get('streamtype') == 'error' else id - 2}"


def _port_of(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        return None
    port = int(text)
    return port if 0 < port <= 65535 else None
