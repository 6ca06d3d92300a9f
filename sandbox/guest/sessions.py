"""Sessions in a guest: an exec, an attachment, a connection to a port. They implement `sandbox.session`.

The reader sets the pace: credit returns to the guest only for bytes that were read, so a reader that stops
blocks its own stream and buffers at most WINDOW bytes here. `close` is idempotent and releases everything, in
the guest too; after it, reads and writes fail.

Closing disconnects. It does not kill what an exec started, as with any container runtime: stdin ends, writes
to the outputs fail with EPIPE, and a terminal is hung up. When the connection to the agent is lost (so also
when the daemon ends), the agent kills all execs of the connection.
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
from sandbox.session import STALL_TIMEOUT_S, AttachmentStalled

WINDOW = 256 << 10
START_TIMEOUT_S = 60.0
RESIZE_TIMEOUT_S = 10.0
STALL_TIMEOUT_MS = int(STALL_TIMEOUT_S * 1000)
_SIZE_MAX = 0xFFFF  # struct winsize


class Reader:
    """A guest-to-host stream. Only one task may read at a time."""

    def __init__(self, client: GuestClient, window: int = WINDOW) -> None:
        self._client = client
        self._chunks: deque[bytes] = deque()
        self._unacknowledged = 0  # bytes of the last read
        self._ended = False
        self._error: SandboxError | None = None
        self._changed = asyncio.Event()
        self.stream = client.open_input(self, window)
        self._forget = client.on_lost(self._fail)

    async def read(self) -> bytes:
        """Return the next bytes; b"" at the end. Each call acknowledges the bytes of the one before.

        Raises GuestUnreachable, and StreamReset after `stop`.
        """
        if self._unacknowledged:
            self._client.grant(self.stream, self._unacknowledged)
            self._unacknowledged = 0
        while not self._chunks:
            if self._ended:
                return b""
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        chunk = self._chunks.popleft()
        self._unacknowledged = len(chunk)
        return chunk

    def stop(self) -> None:
        """Reset the stream, and discard what is still to come. Idempotent."""
        self._fail(StreamReset("the stream was closed by its reader"))
        self._chunks.clear()
        with suppress(GuestUnreachable):
            self._client.reset_input(self.stream)

    def _fail(self, error: SandboxError) -> None:
        self._forget()
        self._error = self._error or error
        self._changed.set()

    # ------------------------------------------------------------ called by the connection

    def data(self, chunk: memoryview) -> None:
        """See `StreamSink`."""
        self._chunks.append(bytes(chunk))
        self._changed.set()

    def closed(self) -> None:
        """See `StreamSink`."""
        self._forget()
        self._ended = True
        self._changed.set()


@dataclass(slots=True)
class Streams:
    """The streams of a session; None where one was not requested."""

    stdin: OutputStream | None
    stdout: Reader | None
    stderr: Reader | None

    @classmethod
    def open(cls, client: GuestClient, *, stdin: bool, stdout: bool, stderr: bool) -> Streams:
        """Number the requested streams. The caller closes them. Raises GuestUnreachable."""
        return cls(
            client.open_output() if stdin else None,
            Reader(client) if stdout else None,
            Reader(client) if stderr else None,
        )

    def close(self) -> None:
        """End all streams in both directions. Idempotent."""
        if self.stdin is not None:
            with suppress(GuestUnreachable):
                self.stdin.close()
        for reader in (self.stdout, self.stderr):
            if reader is not None:
                reader.stop()


class GuestExec:
    """One more process in a container. A `session.Session`."""

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
    ) -> GuestExec:
        """Run a process; returns once it was executed. The caller closes the session.

        Raises GuestError when it cannot be run, GuestUnreachable, and DeadlineExceeded after 60 s; then, and
        when cancelled, the process is killed.
        """
        session = cls(client, container_id, Streams.open(client, stdin=stdin, stdout=stdout, stderr=stderr))
        try:
            await client.call(session._request(process), START_TIMEOUT_S)
        except (asyncio.CancelledError, DeadlineExceeded):
            session._kill_soon()  # the caller cannot know whether it runs
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
        """Set the terminal's size, clamped to 0..65535.

        Raises GuestError where there is no terminal (any more), GuestUnreachable, DeadlineExceeded.
        """
        await _resize(self._client, rows, columns, self._container_id, self._id)

    async def wait(self) -> int:
        """Return the exit code, after the end of the outputs. Raises GuestUnreachable."""
        return (await asyncio.shield(self._exited)).exit_code

    def close(self) -> None:
        """Disconnect the streams; the process is not killed. Idempotent."""
        self._client.forget_exit(self._id)
        self._streams.close()


class GuestAttachment:
    """A running container's output from now on, and its stdin. A `session.Session`."""

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
    ) -> GuestAttachment:
        """Attach to a container. The caller closes the session.

        With `stdin_once` the end of this stdin closes the container's stdin. Raises GuestError when the
        container is not running, GuestUnreachable, and DeadlineExceeded after 60 s.
        """
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
        """Set the terminal's size, clamped to 0..65535.

        Raises GuestError where there is no terminal (any more), GuestUnreachable, DeadlineExceeded.
        """
        await _resize(self._client, rows, columns, self._container_id)

    async def wait(self) -> int:
        """Return 0 once the container has ended and all its output was read.

        Raises AttachmentStalled, GuestUnreachable.
        """
        if (await asyncio.shield(self._detached)).stalled:
            raise AttachmentStalled
        return 0

    def close(self) -> None:
        """Detach; the container runs on. Idempotent."""
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


class GuestPortConnection:
    """A connection to a TCP port in the pod. A `session.PortConnection`."""

    def __init__(self, writer: OutputStream, reader: Reader) -> None:
        self.writer = writer
        self.reader = reader

    @classmethod
    async def dial(cls, client: GuestClient, port: int, timeout_s: float) -> GuestPortConnection:
        """Connect to 127.0.0.1, then to ::1. The caller closes the connection.

        Raises GuestError when no process listens there, GuestUnreachable, DeadlineExceeded.
        """
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
        """End both directions at once; bytes on their way are lost. Idempotent."""
        self.reader.stop()
        with suppress(GuestUnreachable):
            self.writer.close()
