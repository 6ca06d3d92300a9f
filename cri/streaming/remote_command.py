"""Exec and Attach: the streams of a process, copied to and from the channels of a client.

Outputs are copied to their end, then the exit status is sent, then everything is closed. A client that
disconnects cancels this at any point; the session is closed then.
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

RESIZE_TEXT_MAX = 4096  # characters of one terminal size, which needs 30


@dataclass(frozen=True, slots=True)
class CommandChannels:
    """The channels that the client opened."""

    error: Channel
    stdin: Channel | None = None
    stdout: Channel | None = None
    stderr: Channel | None = None
    resize: Channel | None = None
    plain_status: bool = False  # text in place of metav1.Status, and nothing on success


async def run(start: Callable[[], Awaitable[Session]], channels: CommandChannels) -> str:
    """Start a session, copy its streams and send its exit status.

    Returns how it ended, for the log. Raises ConnectionLost.
    """
    try:
        session = await start()
    except SandboxError as error:
        await _send_failure(channels, f"could not start: {error}")
        return str(error)
    try:
        code = await _copy_streams(session, channels)
    except SandboxError as error:
        await _send_failure(channels, str(error))
        return str(error)
    finally:
        session.close()
    await _send_exit_code(channels, code)
    return f"exit code {code}"


async def _copy_streams(session: Session, channels: CommandChannels) -> int:
    outputs = [
        _copy_output(source, channel)
        for source, channel in ((session.stdout, channels.stdout), (session.stderr, channels.stderr))
    ]
    inputs: list[Coroutine[None, None, None]] = []
    if channels.stdin is not None:
        inputs.append(_copy_input(channels.stdin, session.stdin))
    if channels.resize is not None:
        inputs.append(_resize(channels.resize, session))
    input_tasks = [asyncio.create_task(work) for work in inputs]
    output_tasks = [asyncio.create_task(work) for work in outputs]
    try:
        await asyncio.gather(*output_tasks)
        return await session.wait()
    finally:
        for task in (*input_tasks, *output_tasks):
            task.cancel()
        await asyncio.gather(*input_tasks, *output_tasks, return_exceptions=True)


async def _copy_output(source: Source | None, channel: Channel | None) -> None:
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


async def _copy_input(channel: Channel, sink: Sink | None) -> None:
    """Copy stdin. A process that closed its stdin does not end the session: further input is dropped."""
    with suppress(ChannelClosed):
        try:
            while sink is not None and (data := await channel.read()):
                await sink.write(data)
        except SandboxError as error:
            if not isinstance(error, StreamReset):
                return  # the outputs fail with the same error, which is reported there
        if sink is not None:
            sink.close()
        while await channel.read():
            pass


async def _resize(channel: Channel, session: Session) -> None:
    """Apply terminal sizes: concatenated JSON objects, split anywhere."""
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
        with suppress(SandboxError):  # the process has just ended or has no terminal, which is not a failure
            await session.resize(rows, columns)


async def _send_exit_code(channels: CommandChannels, code: int) -> None:
    if not channels.plain_status:
        await _send_status(channels, status.exit_status(code))
    elif code:
        await _send_status(channels, status.exit_text(code).encode())
    else:
        await channels.error.close()


async def _send_failure(channels: CommandChannels, message: str) -> None:
    for channel in (channels.stdout, channels.stderr):
        if channel is not None:
            await channel.close()
    await _send_status(channels, message.encode() if channels.plain_status else status.failure(message))


async def _send_status(channels: CommandChannels, data: bytes) -> None:
    with suppress(ChannelClosed):
        await channels.error.write(data)
        await channels.error.close()
