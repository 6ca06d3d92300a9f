"""Runs a command in a container to its end (CRI ExecSync).

The process and everything that it started have ended when this returns or raises, with one exception: a
child that a successful command leaves in the background lives on (`sh -c 'daemon &'`), as with any container
runtime; its output is not waited for.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sandbox.errors import DeadlineExceeded, GuestError, GuestUnreachable
from sandbox.guest import guest_pb2 as pb
from sandbox.session import ExecResult

if TYPE_CHECKING:
    from sandbox.guest.client import GuestClient

WINDOW = 256 << 10  # of each output: four frames hide the long round trips under emulation
DRAIN_IDLE_S = 0.3  # an output that is open and idle this long is held by a background child
KILL_S = 10.0  # from SIGKILL to the last exit; an emulated guest under load is slow


@dataclass(slots=True)
class _Output:
    """Keeps the first `limit` bytes of one output, and reads and discards the rest."""

    client: GuestClient
    limit: int
    kept: bytearray = field(default_factory=bytearray)
    seen: int = 0
    stream: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def data(self, chunk: memoryview) -> None:
        self.kept += chunk[: self.limit - len(self.kept)]
        self.seen += len(chunk)
        self.client.grant(self.stream, len(chunk))

    def closed(self) -> None:
        self.ended.set()


class _Run:
    """An exec from its request to its end."""

    def __init__(self, client: GuestClient, container_id: str, process: pb.Process, limit: int) -> None:
        self.client = client
        self.container_id = container_id
        self.exec_id = client.next_exec_id()
        self.outputs = [_Output(client, limit) for _ in range(1 if process.tty else 2)]
        for output in self.outputs:
            output.stream = client.open_input(output, WINDOW)
        self.exited = client.expect_exit(self.exec_id)
        self.started = client.post(pb.Request(exec=self._request(process)))

    def _request(self, process: pb.Process) -> pb.Exec:
        return pb.Exec(
            container_id=self.container_id,
            exec_id=self.exec_id,
            process=process,
            stdout_stream=self.outputs[0].stream,
            stderr_stream=0 if process.tty else self.outputs[1].stream,
            window=WINDOW,
            reply_on_exit=not process.tty,
        )

    async def finish(self) -> ExecResult:
        await asyncio.shield(self.started)
        exited = await asyncio.shield(self.exited)
        await self.drain()
        stdout, stderr = (bytes(output.kept) for output in (*self.outputs, _Output(self.client, 0))[:2])
        return ExecResult(exited.exit_code, stdout, stderr)

    async def drain(self) -> None:
        """Wait until the outputs have ended, or until no byte comes for DRAIN_IDLE_S."""
        while not all(output.ended.is_set() for output in self.outputs):
            seen = sum(output.seen for output in self.outputs)
            ends = [asyncio.ensure_future(output.ended.wait()) for output in self.outputs]
            try:
                await asyncio.wait(ends, timeout=DRAIN_IDLE_S)
            finally:
                for end in ends:
                    end.cancel()
            if self.client.lost or seen == sum(output.seen for output in self.outputs):
                return

    async def kill(self) -> None:
        """Kill everything that the command started, and wait. Raises GuestUnreachable, DeadlineExceeded."""
        try:
            async with asyncio.timeout(KILL_S):
                with suppress(GuestError):  # it could not be started, or has just ended
                    await self.client.post(self._kill_request())
                    await asyncio.shield(self.started)
                    await asyncio.shield(self.exited)
                    await self.drain()
        except TimeoutError as cause:
            raise DeadlineExceeded("killing what exec started", KILL_S) from cause

    def kill_soon(self) -> None:
        with suppress(GuestUnreachable):
            self.client.post(self._kill_request())

    def _kill_request(self) -> pb.Request:
        return pb.Request(
            signal=pb.Signal(
                container_id=self.container_id, exec_id=self.exec_id, signal=signal.SIGKILL, all=True
            )
        )

    def release(self) -> None:
        self.client.forget_exit(self.exec_id)
        with suppress(GuestUnreachable):
            for output in self.outputs:
                self.client.reset_input(output.stream)


async def run_exec(
    client: GuestClient, container_id: str, process: pb.Process, timeout_s: float | None, limit: int
) -> ExecResult:
    """Run a process in a container to its end; of each output the first `limit` bytes are kept.

    Raises GuestError when it cannot be started, GuestUnreachable, and DeadlineExceeded after `timeout_s`,
    once everything that it started was killed and has ended (CRI, ExecSync: "the process ... must be
    killed"). When cancelled it sends the kill and does not wait.
    """
    run = _Run(client, container_id, process, limit)
    try:
        async with asyncio.timeout(timeout_s):
            return await run.finish()
    except TimeoutError as cause:
        await run.kill()
        raise DeadlineExceeded("exec", timeout_s or 0.0) from cause
    except asyncio.CancelledError:
        if not run.exited.done():
            run.kill_soon()
        raise
    finally:
        run.release()
