"""One command in a container, run to its end.

The process, and all that it started, is gone when this returns or raises, with one exception: a
child that a successful command left in the background lives on (`sh -c 'daemon &'`), as with any
container runtime; its output is not waited for.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from dataclasses import dataclass, field

from sandbox.errors import DeadlineExceeded, GuestError, GuestUnreachable
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.session import ExecResult

WINDOW = 256 << 10  # of each output; round trips under emulation are long, four frames hide them
DRAIN_IDLE_S = 0.3  # an output that stays open this long without a byte belongs to a background child
KILL_S = 10.0  # from SIGKILL to the exit of all; a busy emulated guest is slow


@dataclass(slots=True)
class _Output:
    """Keeps the first bytes of one output, and goes on reading behind them."""

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
        """Take the rest of the outputs: until their end, or until nothing comes any more."""
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
        """End all that the command started. Raises GuestUnreachable, DeadlineExceeded."""
        try:
            async with asyncio.timeout(KILL_S):
                with suppress(GuestError):  # it was never started, or has just ended
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
    """Run a process to its end; of each output the first `limit` bytes are kept.

    Raises GuestError when it cannot be started, GuestUnreachable, and DeadlineExceeded once everything
    that it started is dead (CRI, ExecSync: "the process ... must be killed").
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
