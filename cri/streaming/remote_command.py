"""Exec and Attach: a process and a client, joined stream by stream.

Outputs are carried to their end, then the exit status is told, then all is closed. A client that goes
away ends it at any moment, by cancellation; the session is hung up then.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass

from cri.streaming import status
from cri.streaming.channels import Channel, ChannelClosed
from sandbox.errors import SandboxError, StreamReset
from sandbox.session import Session, Sink, Source

RESIZE_TEXT_MAX = 4096  # of one size, which needs 30 bytes


@dataclass(frozen=True, slots=True)
class CommandChannels:
    """Those that the client opened."""

    error: Channel
    stdin: Channel | None = None
    stdout: Channel | None = None
    stderr: Channel | None = None
    resize: Channel | None = None
    plain_status: bool = False  # text instead of metav1.Status, and nothing on success


async def run(begin: Callable[[], Awaitable[Session]], channels: CommandChannels) -> str:
    """Returns how it ended, for the log. Raises ConnectionLost."""
    try:
        session = await begin()
    except SandboxError as error:
        await _tell_failure(channels, f"cannot be begun: {error}")
        return str(error)
    try:
        code = await _carry(session, channels)
    except SandboxError as error:
        await _tell_failure(channels, str(error))
        return str(error)
    finally:
        session.close()
    await _tell_exit(channels, code)
    return f"exit code {code}"


async def _carry(session: Session, channels: CommandChannels) -> int:
    outputs = [
        _output(source, channel)
        for source, channel in ((session.stdout, channels.stdout), (session.stderr, channels.stderr))
    ]
    inputs: list[Coroutine[None, None, None]] = []
    if channels.stdin is not None:
        inputs.append(_input(channels.stdin, session.stdin))
    if channels.resize is not None:
        inputs.append(_resize(channels.resize, session))
    running = [asyncio.create_task(work) for work in inputs]
    ending = [asyncio.create_task(work) for work in outputs]
    try:
        await asyncio.gather(*ending)
        return await session.wait()
    finally:
        for task in (*running, *ending):
            task.cancel()
        await asyncio.gather(*running, *ending, return_exceptions=True)


async def _output(source: Source | None, channel: Channel | None) -> None:
    if source is not None and channel is None:
        source.stop()
    if channel is None:
        return
    try:
        while source is not None and (data := await source.read()):
            await channel.write(data)
        await channel.close()
    except ChannelClosed:
        if source is not None:
            source.stop()


async def _input(channel: Channel, sink: Sink | None) -> None:
    """A reader that wants no more does not end the session: what still comes is dropped."""
    with suppress(ChannelClosed):
        try:
            while sink is not None and (data := await channel.read()):
                await sink.write(data)
        except SandboxError as error:
            if not isinstance(error, StreamReset):
                return  # the outputs tell
        if sink is not None:
            sink.close()
        while await channel.read():
            pass


async def _resize(channel: Channel, session: Session) -> None:
    """JSON objects, one behind the other, cut anywhere."""
    text = ""
    decoder = json.JSONDecoder()
    with suppress(ChannelClosed):
        while data := await channel.read():
            text = (text + data.decode(errors="replace")).lstrip()
            while text:
                try:
                    size, end = decoder.raw_decode(text)
                except json.JSONDecodeError:
                    text = text if len(text) <= RESIZE_TEXT_MAX else ""
                    break
                text = text[end:].lstrip()
                await _resize_to(session, size)


async def _resize_to(session: Session, size: object) -> None:
    if not isinstance(size, dict):
        return
    rows, columns = size.get("Height"), size.get("Width")
    if isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0:
        with suppress(SandboxError):  # it has just ended, or has no terminal: nothing to tell
            await session.resize(rows, columns)


async def _tell_exit(channels: CommandChannels, code: int) -> None:
    if not channels.plain_status:
        await _tell(channels, status.exit_status(code))
    elif code:
        await _tell(channels, status.exit_text(code).encode())
    else:
        await channels.error.close()


async def _tell_failure(channels: CommandChannels, message: str) -> None:
    for channel in (channels.stdout, channels.stderr):
        if channel is not None:
            await channel.close()
    await _tell(channels, message.encode() if channels.plain_status else status.failure(message))


async def _tell(channels: CommandChannels, data: bytes) -> None:
    with suppress(ChannelClosed):
        await channels.error.write(data)
        await channels.error.close()
