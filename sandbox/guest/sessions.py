"""Conversations with what runs in a guest: an exec, an attachment, a forwarded connection.

Whoever holds one reads and writes at a pace of their own: credit goes back to the guest only for what
was taken, so a reader that stops blocks this one stream and keeps no more than its window here. `close`
is idempotent and gives everything back, in the guest too; after it, reads and writes fail.

Closing is hanging up. What an exec started is not killed by it, as with any container runtime: its
stdin ends, its outputs are broken pipes, its terminal is hung up. With the connection to the agent
(so also with the daemon) all execs of it are killed.
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from sandbox.errors import DeadlineExceeded, GuestUnreachable, SandboxError, StreamReset
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.guest.streams import OutputStream

WINDOW = 256 << 10
START_TIMEOUT_S = 60.0
RESIZE_TIMEOUT_S = 10.0
# Longer than a network's hiccup, far shorter than a container may be held up by a forgotten terminal.
STALL_TIMEOUT_MS = 10_000
_SIZE_MAX = 0xFFFF  # struct winsize


class Lagged(SandboxError):
    """An attachment was cut off: its reader stopped, and the container was not to wait any longer."""

    def __init__(self) -> None:
        super().__init__(f"cut off: no output was taken for {STALL_TIMEOUT_MS / 1000:g} s")


class Reader:
    """A guest-to-host stream, read by one task."""

    def __init__(self, client: GuestClient) -> None:
        self._client = client
        self._chunks: deque[bytes] = deque()
        self._taken = 0  # read, and its credit not given back yet
        self._ended = False
        self._error: SandboxError | None = None
        self._changed = asyncio.Event()
        self.stream = client.open_input(self, WINDOW)
        self._forget = client.on_lost(self._fail)

    async def read(self) -> bytes:
        """The next bytes, b"" at the end. Asking for more says that the last were dealt with.

        Raises GuestUnreachable, and StreamReset after `stop`.
        """
        if self._taken:
            self._client.grant(self.stream, self._taken)
            self._taken = 0
        while not self._chunks:
            if self._ended:
                return b""
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        chunk = self._chunks.popleft()
        self._taken = len(chunk)
        return chunk

    def stop(self) -> None:
        """Want no more. Idempotent."""
        self._fail(StreamReset("the stream is not read any more"))
        self._chunks.clear()
        with suppress(GuestUnreachable):
            self._client.reset_input(self.stream)

    def _fail(self, error: SandboxError) -> None:
        self._forget()
        self._error = self._error or error
        self._changed.set()

    # ------------------------------------------------------------------ told by the connection

    def data(self, chunk: memoryview) -> None:
        self._chunks.append(bytes(chunk))
        self._changed.set()

    def closed(self) -> None:
        self._forget()
        self._ended = True
        self._changed.set()


@dataclass(slots=True)
class Streams:
    """Those that were asked for."""

    stdin: OutputStream | None
    stdout: Reader | None
    stderr: Reader | None

    @classmethod
    def open(cls, client: GuestClient, *, stdin: bool, stdout: bool, stderr: bool) -> Streams:
        """Raises GuestUnreachable."""
        return cls(
            client.open_output() if stdin else None,
            Reader(client) if stdout else None,
            Reader(client) if stderr else None,
        )

    def close(self) -> None:
        if self.stdin is not None:
            with suppress(GuestUnreachable):
                self.stdin.close()
        for reader in (self.stdout, self.stderr):
            if reader is not None:
                reader.stop()


class ExecSession:
    """One more process in a container."""

    def __init__(self, client: GuestClient, container_id: str, streams: Streams) -> None:
        self._client = client
        self._container_id = container_id
        self._id = client.next_exec_id()
        self._streams = streams
        self._exited = client.expect_exit(self._id)
        self.stdin, self.stdout, self.stderr = streams.stdin, streams.stdout, streams.stderr

    @classmethod
    async def start(
        cls,
        client: GuestClient,
        container_id: str,
        process: pb.Process,
        *,
        stdin: bool,
        stdout: bool,
        stderr: bool,
    ) -> ExecSession:
        """Raises GuestError when it cannot be run, GuestUnreachable, DeadlineExceeded."""
        session = cls(client, container_id, Streams.open(client, stdin=stdin, stdout=stdout, stderr=stderr))
        try:
            await client.call(session._request(process), START_TIMEOUT_S)
        except (asyncio.CancelledError, DeadlineExceeded):
            session._kill_soon()  # nobody was told that it runs
            session.close()
            raise
        except BaseException:
            session.close()
            raise
        return session

    def _request(self, process: pb.Process) -> pb.Request:
        exec = pb.Exec(
            container_id=self._container_id,
            exec_id=self._id,
            process=process,
            stdin_stream=self.stdin.id if self.stdin else 0,
            stdout_stream=self.stdout.stream if self.stdout else 0,
            stderr_stream=self.stderr.stream if self.stderr else 0,
            window=WINDOW,
        )
        return pb.Request(exec=exec)

    def _kill_soon(self) -> None:
        kill = pb.Signal(container_id=self._container_id, exec_id=self._id, signal=signal.SIGKILL, all=True)
        with suppress(GuestUnreachable):
            self._client.post(pb.Request(signal=kill))

    async def resize(self, rows: int, columns: int) -> None:
        """Raises GuestError where there is no terminal (any more), GuestUnreachable, DeadlineExceeded."""
        await _resize(self._client, rows, columns, self._container_id, self._id)

    async def wait(self) -> int:
        """Its exit code; comes behind the end of its outputs. Raises GuestUnreachable."""
        return (await asyncio.shield(self._exited)).exit_code

    def close(self) -> None:
        self._client.forget_exit(self._id)
        self._streams.close()


class AttachSession:
    """Ears and voice of a running container, from now on."""

    def __init__(self, client: GuestClient, container_id: str, streams: Streams) -> None:
        self._client = client
        self._container_id = container_id
        self._id = client.next_exec_id()
        self._streams = streams
        self._detached = client.expect_detached(self._id)
        self.stdin, self.stdout, self.stderr = streams.stdin, streams.stdout, streams.stderr

    @classmethod
    async def start(
        cls,
        client: GuestClient,
        container_id: str,
        *,
        stdin: bool,
        stdout: bool,
        stderr: bool,
        stdin_once: bool = False,
        stall_timeout_ms: int = STALL_TIMEOUT_MS,
    ) -> AttachSession:
        """Raises GuestError when the container does not run, GuestUnreachable, DeadlineExceeded."""
        session = cls(client, container_id, Streams.open(client, stdin=stdin, stdout=stdout, stderr=stderr))
        attach = pb.Attach(
            container_id=container_id,
            attach_id=session._id,
            stdin_stream=session.stdin.id if session.stdin else 0,
            stdout_stream=session.stdout.stream if session.stdout else 0,
            stderr_stream=session.stderr.stream if session.stderr else 0,
            window=WINDOW,
            stall_timeout_ms=stall_timeout_ms,
            stdin_once=stdin_once,
        )
        try:
            await client.call(pb.Request(attach=attach), START_TIMEOUT_S)
        except BaseException:
            session.close()
            raise
        return session

    async def resize(self, rows: int, columns: int) -> None:
        """Raises GuestError where there is no terminal (any more), GuestUnreachable, DeadlineExceeded."""
        await _resize(self._client, rows, columns, self._container_id)

    async def wait(self) -> int:
        """0 once the container has ended and all its output was read. Raises Lagged, GuestUnreachable."""
        if (await asyncio.shield(self._detached)).stalled:
            raise Lagged
        return 0

    def close(self) -> None:
        self._client.forget_detached(self._id)
        self._streams.close()


async def _resize(client: GuestClient, rows: int, columns: int, container_id: str, exec_id: str = "") -> None:
    resize = pb.Resize(
        container_id=container_id,
        exec_id=exec_id,
        rows=min(max(rows, 0), _SIZE_MAX),
        columns=min(max(columns, 0), _SIZE_MAX),
    )
    await client.call(pb.Request(resize=resize), RESIZE_TIMEOUT_S)


class Forwarded:
    """A connection to a port in the pod."""

    def __init__(self, writer: OutputStream, reader: Reader) -> None:
        self.writer = writer
        self.reader = reader

    @classmethod
    async def dial(cls, client: GuestClient, port: int, timeout_s: float) -> Forwarded:
        """Raises GuestError when nothing listens there, GuestUnreachable, DeadlineExceeded."""
        connection = cls(client.open_output(), Reader(client))
        dial = pb.Dial(
            port=port,
            to_port_stream=connection.writer.id,
            from_port_stream=connection.reader.stream,
            window=WINDOW,
        )
        try:
            await client.call(pb.Request(dial=dial), timeout_s)
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Both directions at once, whatever is under way."""
        self.reader.stop()
        with suppress(GuestUnreachable):
            self.writer.close()
