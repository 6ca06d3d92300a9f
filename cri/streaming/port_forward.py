"""PortForward: connections of a client, each to a port in the pod; a failure ends only its connection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from cri.streaming.channels import Channel, ChannelClosed, ChannelListener, ConnectionLost
from sandbox.errors import SandboxError, StreamReset
from sandbox.session import PortConnection

log = logging.getLogger(__name__)

PAIR_TIMEOUT_S = 30.0
# For the other direction once one has ended and the peer cannot show that it knows; containerd's is the same.
LINGER_S = 1.0

Dial = Callable[[int], Awaitable[PortConnection]]


@dataclass(slots=True)
class _Pair:
    """The two channels of one connection, as they are opened."""

    data: Channel | None = None
    error: Channel | None = None
    timeout: asyncio.TimerHandle | None = None


class PortForwarder:
    """Pairs the streams of a SPDY client by their request id, and forwards each pair as one connection."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._pairs: dict[str, _Pair] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, listener: ChannelListener) -> None:
        """Forward until the client opens no more streams and every connection has ended.

        Raises ConnectionLost.
        """
        try:
            async for channel in listener.accept():
                self._add(channel)
            if self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            for pair in self._pairs.values():
                if pair.timeout is not None:
                    pair.timeout.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _add(self, channel: Channel) -> None:
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
            pair.timeout = loop.call_later(PAIR_TIMEOUT_S, self._drop_half, request, channel)
            return
        if pair.timeout is not None:
            pair.timeout.cancel()
        del self._pairs[request]
        self._spawn(pair.data, pair.error)

    def _drop_half(self, request: str, channel: Channel) -> None:
        """Reset a stream whose other half was not opened within PAIR_TIMEOUT_S."""
        self._pairs.pop(request, None)
        channel.reset()

    def _spawn(self, data: Channel, error: Channel) -> None:
        port = _port_of(data.headers.get("port", ""))
        assert port is not None
        task = asyncio.create_task(forward(self._dial, port, data, error))
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("port-forward: a connection failed unexpectedly: %s", error, exc_info=error)


async def forward(dial: Dial, port: int, data: Channel, error: Channel) -> None:
    """Forward one connection from dialling to its end; a failure is written to its error channel."""
    try:
        try:
            await _dial_and_copy(dial, port, data)
        except SandboxError as problem:
            await _send_error(error, f"port {port} of the pod: {problem}")
        await error.close()
    except ConnectionLost:
        pass  # the client is gone, so an error cannot reach it
    finally:
        data.reset()
        error.reset()


async def _dial_and_copy(dial: Dial, port: int, data: Channel) -> None:
    connection = await dial(port)
    to_pod = asyncio.create_task(_copy_to_pod(data, connection))
    to_client = asyncio.create_task(_copy_to_client(connection, data))
    try:
        if not data.half_closes:
            await asyncio.wait({to_pod, to_client}, return_when=asyncio.FIRST_COMPLETED)
        limit_s = LINGER_S if to_client.done() else None
        done, _ = await asyncio.wait(
            {to_pod, to_client}, return_when=asyncio.FIRST_EXCEPTION, timeout=limit_s
        )
        for task in done:
            task.result()
    except ChannelClosed:
        pass  # the client closed this connection
    finally:
        connection.close()
        for task in (to_pod, to_client):
            task.cancel()
        await asyncio.gather(to_pod, to_client, return_exceptions=True)


async def _copy_to_pod(data: Channel, connection: PortConnection) -> None:
    try:
        while chunk := await data.read():
            await connection.writer.write(chunk)
        connection.writer.close()
    except StreamReset:
        pass  # the pod's process reads no more; what it still writes is copied on


async def _copy_to_client(connection: PortConnection, data: Channel) -> None:
    while chunk := await connection.reader.read():
        await data.write(chunk)
    await data.close()


async def _send_error(error: Channel, message: str) -> None:
    with suppress(ChannelClosed):
        await error.write(message.encode())


def _request_of(channel: Channel) -> str:
    """Return the request id. Old clients send none, and open the error stream just before the data stream."""
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
