"""Fakes of what a streaming session runs: pipes in memory, and a program that the test plays."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from cri.streaming.session import AttachOptions, ExecOptions, SessionOptions
from cri.streaming.tokens import TooManyTokens
from sandbox.errors import SandboxError, StreamReset

PIPE_BYTES = 256 << 10


class Pipe:
    """Both ends of a byte stream that holds as much as a guest's window."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._closed = False
        self._stopped = False
        self._changed = asyncio.Condition()
        self.most = 0  # the most bytes that ever waited in it

    def __len__(self) -> int:
        """Return the number of bytes that wait to be read."""
        return len(self._data)

    async def write(self, data: bytes) -> None:
        async with self._changed:
            while len(self._data) >= PIPE_BYTES and not (self._stopped or self._closed):
                await self._changed.wait()
            if self._stopped or self._closed:
                raise StreamReset("the pipe is broken")
            self._data += data
            self.most = max(self.most, len(self._data))
            self._changed.notify_all()

    async def read(self) -> bytes:
        async with self._changed:
            while not (self._data or self._closed or self._stopped):
                await self._changed.wait()
            if self._stopped:
                raise StreamReset("the pipe is broken")
            data = bytes(self._data[: 64 << 10])
            del self._data[: 64 << 10]
            self._changed.notify_all()
            return data

    async def read_all(self) -> bytes:
        seen = bytearray()
        while chunk := await self.read():
            seen += chunk
        return bytes(seen)

    def close(self) -> None:
        self._closed = True
        self._wake()

    def stop(self) -> None:
        self._stopped = True
        self._wake()

    def _wake(self) -> None:
        async def wake() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._waking = asyncio.ensure_future(wake())

    @property
    def ended(self) -> bool:
        return self._closed or self._stopped


@dataclass
class FakeSession:
    """A process that the test plays: it reads and writes the pipes, and calls `finish`."""

    stdin: Pipe | None = None
    stdout: Pipe | None = None
    stderr: Pipe | None = None
    tty: bool = False
    cmd: Sequence[str] = ()
    sizes: list[tuple[int, int]] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    exit: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @classmethod
    def made(
        cls, *, stdin: bool, stdout: bool, stderr: bool, tty: bool = False, cmd: Sequence[str] = ()
    ) -> FakeSession:
        return cls(
            Pipe() if stdin else None,
            Pipe() if stdout else None,
            Pipe() if stderr and not tty else None,
            tty,
            cmd,
        )

    async def resize(self, rows: int, columns: int) -> None:
        self.sizes.append((rows, columns))

    async def wait(self) -> int:
        return await asyncio.shield(self.exit)

    def close(self) -> None:
        for source in (self.stdout, self.stderr):
            if source is not None:
                source.stop()
        if self.stdin is not None:
            self.stdin.close()
        self.closed.set()

    # ----------------------------------------------------------------------- for the program

    def finish(self, code: int = 0, error: SandboxError | None = None) -> None:
        """Close the outputs and exit with `code`, or break the session with `error`."""
        for source in (self.stdout, self.stderr):
            if source is not None:
                source.close()
        if error is not None:
            self.exit.set_exception(error)
        else:
            self.exit.set_result(code)


@dataclass
class FakeConnection:
    """A connection to a port in the pod; the test plays the service."""

    writer: Pipe = field(default_factory=Pipe)
    reader: Pipe = field(default_factory=Pipe)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    def close(self) -> None:
        self.reader.stop()
        self.writer.close()
        self.closed.set()


Program = Callable[[FakeSession], Awaitable[None]]


@dataclass
class FakeBackend:
    """Every session runs `program`; every connection runs `service`."""

    program: Program | None = None
    service: Callable[[FakeConnection], Awaitable[None]] | None = None
    failure: SandboxError | None = None
    refused: frozenset[int] = frozenset()
    requests: list[SessionOptions] = field(default_factory=list)
    sessions: list[FakeSession] = field(default_factory=list)
    dialled: list[tuple[str, int]] = field(default_factory=list)
    connections: list[FakeConnection] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def exec(self, options: ExecOptions) -> FakeSession:
        return self._start(options, options.cmd)

    async def attach(self, options: AttachOptions) -> FakeSession:
        return self._start(options, ())

    def _start(self, options: ExecOptions | AttachOptions, cmd: Sequence[str]) -> FakeSession:
        if self.failure is not None:
            raise self.failure
        self.requests.append(options)
        session = FakeSession.made(
            stdin=options.stdin, stdout=options.stdout, stderr=options.stderr, tty=options.tty, cmd=cmd
        )
        self.sessions.append(session)
        if self.program is not None:
            self._spawn(self.program(session))
        return session

    async def dial(self, pod_id: str, port: int) -> FakeConnection:
        self.dialled.append((pod_id, port))
        if port in self.refused:
            raise SandboxError(f"connect to port {port}: Connection refused")
        connection = FakeConnection()
        self.connections.append(connection)
        if self.service is not None:
            self._spawn(self.service(connection))
        return connection

    def _spawn(self, part: Awaitable[None]) -> None:
        async def run() -> None:
            await part

        self.tasks.append(asyncio.ensure_future(run()))


@dataclass
class FakeStreaming:
    """Returns URLs that nothing serves."""

    requests: list[SessionOptions] = field(default_factory=list)
    full: bool = False

    def url(self, options: SessionOptions) -> str:
        if self.full:
            raise TooManyTokens
        self.requests.append(options)
        return f"http://127.0.0.1:1/{len(self.requests)}"
