"""Attachments to containers without a VM: connections to conmon's socket.

Packets of output come with the stream's number in their first byte; bytes of input are sent as they are.
"""

from __future__ import annotations

import asyncio
import os
import socket

from sandbox.errors import GuestError, GuestUnreachable, StreamReset
from sandbox.host_pods import conmon
from sandbox.host_pods.conmon import Bundle
from sandbox.host_pods.streams import FdWriter, shut_down
from sandbox.session import STALL_TIMEOUT_S, AttachmentStalled

_PACKET = 8 << 10  # conmon's largest; a shorter buffer would cut it
_STDOUT, _STDERR = 2, 3  # conmon's numbers of streams
_WINDOW = 256 << 10  # bytes that are queued for a reader


class OutputQueue:
    """One output's bytes that were received and not read yet, as a `session.Source`."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.size = 0
        self.ended = False
        self.stopped = False
        self.changed = asyncio.Event()  # for the reader
        self.taken = asyncio.Event()  # for the receiver

    async def read(self) -> bytes:
        """Return all that is queued; b"" at the end. Raises StreamReset after `stop`."""
        while not self.chunks:
            if self.stopped:
                raise StreamReset("the stream was stopped")
            if self.ended:
                return b""
            self.changed.clear()
            await self.changed.wait()
        data = b"".join(self.chunks)
        self.chunks, self.size = [], 0
        self.taken.set()
        return data

    def put(self, data: bytes) -> None:
        """Append bytes."""
        self.chunks.append(data)
        self.size += len(data)
        self.changed.set()

    def finish(self) -> None:
        """Let the reader see the end after what is queued."""
        self.ended = True
        self.changed.set()

    def stop(self) -> None:
        """Discard what is queued and still to come. Idempotent."""
        self.stopped = True
        self.chunks, self.size = [], 0
        self.changed.set()
        self.taken.set()


class ConmonAttachment:
    """A running container's streams from now on, as a `session.Session`. Belongs to the event loop."""

    def __init__(self, bundle: Bundle, connection: socket.socket, outputs: dict[int, OutputQueue]) -> None:
        self._bundle = bundle
        self._connection = connection
        self._outputs = outputs
        self.stdin: FdWriter | None = None
        self.stdout = outputs.get(_STDOUT)
        self.stderr = outputs.get(_STDERR)
        self._receiver = asyncio.create_task(self._receive())

    @classmethod
    async def start(cls, bundle: Bundle, *, stdin: bool, stdout: bool, stderr: bool) -> ConmonAttachment:
        """Connect to conmon. Raises GuestError if it does not run any more."""
        try:
            connection = await asyncio.to_thread(_connect, bundle)
        except OSError as error:
            raise GuestError("attach", error.errno or 0, error.strerror or str(error)) from error
        wanted = {_STDOUT: stdout, _STDERR: stderr}
        outputs = {name: OutputQueue() for name, is_wanted in wanted.items() if is_wanted}
        session = cls(bundle, connection, outputs)
        if stdin:
            session.stdin = FdWriter(os.dup(connection.fileno()), shut_down)
        return session

    async def _receive(self) -> None:
        """Queue packets. While a queue is full conmon waits, and so does the container.

        That is for at most STALL_TIMEOUT_S: AttachmentStalled is raised then. Raises GuestUnreachable when
        conmon disconnects.
        """
        loop = asyncio.get_running_loop()
        try:
            while packet := await loop.sock_recv(self._connection, _PACKET + 1):
                queue = self._outputs.get(packet[0])
                if queue is None or queue.stopped:
                    continue
                queue.put(packet[1:])
                await _drained(queue)
        except (ConnectionError, OSError) as error:
            raise GuestUnreachable(f"conmon: {error}") from error
        finally:
            for queue in self._outputs.values():
                queue.finish()
            self._connection.close()

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of the container's terminal, at most 65535 each. Raises GuestError."""
        sizes = (min(max(each, 0), conmon.SIZE_MAX) for each in (rows, columns))
        await asyncio.to_thread(conmon.resize, self._bundle, *sizes)

    async def wait(self) -> int:
        """Return 0 once the container has ended and its output was received.

        Raises AttachmentStalled if a reader was too slow, GuestUnreachable.
        """
        await asyncio.shield(self._receiver)
        return 0

    def close(self) -> None:
        """Disconnect. Idempotent."""
        if self.stdin is not None:
            self.stdin.close()
        for queue in self._outputs.values():
            queue.stop()
        if not self._receiver.done():
            self._receiver.cancel()
        self._receiver.add_done_callback(lambda task: task.cancelled() or task.exception())


async def _drained(queue: OutputQueue) -> None:
    """Return once the queue is below its limit. Raises AttachmentStalled after STALL_TIMEOUT_S."""
    try:
        async with asyncio.timeout(STALL_TIMEOUT_S):
            while queue.size >= _WINDOW:
                queue.taken.clear()
                await queue.taken.wait()
    except TimeoutError:
        raise AttachmentStalled from None


def _connect(bundle: Bundle) -> socket.socket:
    folder = os.open(bundle.path, os.O_PATH | os.O_CLOEXEC)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(f"/proc/self/fd/{folder}/attach")
        connection.setblocking(False)
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(folder)
    return connection
