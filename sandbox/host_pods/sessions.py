"""Conversations with a process, a container or a port of a pod without a VM.

An exec is a `crun exec`, started by the daemon in the container's cgroup: its process has the session's
pipes, or a terminal, at first hand. Its directory holds

    process.json    what crun is to run
    pid             by crun, once that runs; where it is missing, `log` says why
    log             by crun
    console         a socket, to which crun gives the terminal

As with any container runtime, what an exec has started goes on when its client hangs up, or the daemon
ends: then its outputs are broken pipes. An attachment is a connection to conmon's socket: packets of
output, the first byte telling which, and of input.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import socket
import struct
import termios
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from sandbox.errors import (
    DeadlineExceeded,
    GuestError,
    GuestUnreachable,
    InvalidContainerConfig,
    SandboxError,
    StreamReset,
)
from sandbox.host import process
from sandbox.host.process import ProcessIdentity
from sandbox.host.tasks import end
from sandbox.host_pods import conmon
from sandbox.host_pods.conmon import Bundle
from sandbox.host_pods.host_files import node_limits
from sandbox.host_pods.oci import compile_process
from sandbox.host_pods.streams import FdReader, FdWriter
from sandbox.plan.signals import exit_code_of
from sandbox.plan.values import ProcessPlan
from sandbox.session import STALL_TIMEOUT_S, AttachmentStalled, ExecResult

START_TIMEOUT_S = 60.0
_SIZE_MAX = 0xFFFF  # struct winsize
_PACKET = 8 << 10  # conmon's; longer ones would be cut
_STDOUT, _STDERR = 2, 3  # conmon's names of a packet's stream
_WINDOW = 256 << 10

_numbers = count()


@dataclass(frozen=True, slots=True)
class Place:
    """Where an exec runs."""

    bundle: Bundle
    cgroups: tuple[str, ...]
    # ends these processes, their sessions and what descends from them
    kill: Callable[[Sequence[int]], None]


class ExecSession:
    def __init__(self, place: Place, directory: Path) -> None:
        self._place = place
        self._directory = directory
        self._terminal = -1
        self.stdin: FdWriter | None = None
        self.stdout: FdReader | None = None
        self.stderr: FdReader | None = None
        self._crun: ProcessIdentity | None = None
        self._ended: asyncio.Task[int] | None = None

    @classmethod
    async def start(
        cls, place: Place, wanted: ProcessPlan, *, stdin: bool, stdout: bool, stderr: bool
    ) -> ExecSession:
        """Raises GuestError, InvalidSpec; that the program cannot be run `wait` tells, too."""
        text = json.dumps(compile_process(wanted, node_limits()), ensure_ascii=False)
        directory = place.bundle.execs / f"{os.getpid()}-{next(_numbers)}"
        session = cls(place, directory)
        try:
            await asyncio.to_thread(_make_directory, directory, text)
            if wanted.tty:
                await session._start_on_terminal(stdin=stdin, stdout=stdout)
            else:
                await session._start_on_pipes(stdin=stdin, stdout=stdout, stderr=stderr)
        except BaseException:
            if session._crun is not None:
                await asyncio.shield(session.kill())
            session.close()
            if session._ended is None:
                await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            raise
        return session

    async def _start_on_pipes(self, *, stdin: bool, stdout: bool, stderr: bool) -> None:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        theirs = [null]
        ends = [null, null, null]
        try:
            if stdin:
                ends[0], ours = os.pipe2(os.O_CLOEXEC)
                theirs.append(ends[0])
                os.set_blocking(ours, False)
                self.stdin = FdWriter(ours)
            for number, wanted in ((1, stdout), (2, stderr)):
                if wanted:
                    ours, ends[number] = os.pipe2(os.O_CLOEXEC)
                    theirs.append(ends[number])
                    os.set_blocking(ours, False)
                    setattr(self, ("stdout", "stderr")[number - 1], FdReader(ours))
            await self._spawn([], ends)
        finally:
            for fd in theirs:
                os.close(fd)

    async def _start_on_terminal(self, *, stdin: bool, stdout: bool) -> None:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        folder = os.open(self._directory, os.O_PATH | os.O_CLOEXEC)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                # the directory's own path is longer than a socket's may be
                listener.bind(f"/proc/self/fd/{folder}/console")
                listener.listen()
                listener.setblocking(False)
                socket_path = f"/proc/self/fd/{folder}/console"
                await self._spawn(["--console-socket", socket_path], [null, null, null], (folder,))
                self._terminal = await self._accept(listener)
        finally:
            os.close(folder)
            os.close(null)
        os.set_blocking(self._terminal, False)
        if stdin:
            self.stdin = FdWriter(fcntl.fcntl(self._terminal, fcntl.F_DUPFD_CLOEXEC, 3))
        if stdout:
            self.stdout = FdReader(fcntl.fcntl(self._terminal, fcntl.F_DUPFD_CLOEXEC, 3))

    async def _spawn(self, options: list[str], ends: list[int], pass_fds: tuple[int, ...] = ()) -> None:
        bundle = self._place.bundle
        files = ["--process", str(self._directory / "process.json"), "--pid-file", str(self._pid_file)]
        argv = bundle.crun(f"--log={self._log}", "exec", *files, *options, bundle.id)
        self._crun = await process.start(
            argv,
            cgroups=self._place.cgroups,
            pass_fds=pass_fds,
            stdin=ends[0],
            stdout=ends[1],
            stderr=ends[2],
            umask=0o022,
            new_privs=True,
        )
        self._ended = asyncio.create_task(self._await_end(self._crun))

    async def _accept(self, listener: socket.socket) -> int:
        """The terminal, unless crun ends without giving one. Raises GuestError, DeadlineExceeded."""
        assert self._ended is not None
        coming = asyncio.create_task(_receive_terminal(listener))
        try:
            await asyncio.wait(
                {coming, self._ended}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if coming.done():
                return coming.result()
            if self._ended.done():
                self._ended.result()
                raise GuestError(conmon.CRUN, 0, "it gave no terminal")
            raise DeadlineExceeded("exec", START_TIMEOUT_S)
        finally:
            if not coming.done():
                await end(coming)

    @property
    def _pid_file(self) -> Path:
        return self._directory / "pid"

    @property
    def _log(self) -> Path:
        return self._directory / "log"

    async def _await_end(self, crun: ProcessIdentity) -> int:
        """The exit code. Raises GuestError when the program was never run."""
        status = await process.wait_exit(crun)
        for reader in (self.stdout, self.stderr):
            if reader is not None:
                reader.expire()
        try:
            ran = self._pid_file.exists()
            said = self._log.read_text(errors="replace").strip() if self._log.exists() else ""
        finally:
            await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)
        if not ran or (status and said):
            raise InvalidContainerConfig("exec", 0, said or f"crun ended with {status}")
        if status is None:
            raise GuestUnreachable("the exit code of an exec is not known")
        return status if status >= 0 else exit_code_of(-status)

    async def resize(self, rows: int, columns: int) -> None:
        if self._terminal < 0:
            raise GuestError("resize", 0, "there is no terminal")
        rows, columns = (min(max(each, 0), _SIZE_MAX) for each in (rows, columns))
        size = struct.pack("HHHH", rows, columns, 0, 0)
        with suppress(OSError):  # it has just been hung up
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)

    async def wait(self) -> int:
        assert self._ended is not None
        return await asyncio.shield(self._ended)

    async def kill(self) -> None:
        """All that it has started. Raises DeadlineExceeded."""
        assert self._crun is not None and self._ended is not None
        leaders = [self._crun.pid, *_leader_in(self._directory)]
        await asyncio.to_thread(self._place.kill, leaders)
        await process.kill(self._crun)
        with suppress(SandboxError):
            await asyncio.shield(self._ended)

    def close(self) -> None:
        if self.stdin is not None:
            self.stdin.close()
        for reader in (self.stdout, self.stderr):
            if reader is not None:
                reader.stop()
        fd, self._terminal = self._terminal, -1
        if fd >= 0:
            os.close(fd)
        if self._ended is not None:
            self._ended.add_done_callback(_seen)


def end_execs(place: Place) -> None:
    """Those that an earlier daemon began; blocking."""
    directories = list(place.bundle.execs.iterdir())
    if not directories:
        return
    leaders = [identity.pid for identity in process.find_by_argument(f"{place.bundle.execs}/")]
    place.kill([*leaders, *(leader for each in directories for leader in _leader_in(each))])
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def _leader_in(directory: Path) -> list[int]:
    """The process that was run, once crun has told of it."""
    with suppress(OSError, ValueError):
        return [int((directory / "pid").read_text())]
    return []


def _seen(task: asyncio.Task[int]) -> None:
    if not task.cancelled():
        task.exception()


def _make_directory(directory: Path, text: str) -> None:
    directory.mkdir(mode=0o700, parents=True)
    (directory / "process.json").write_text(text)


async def _receive_terminal(listener: socket.socket) -> int:
    loop = asyncio.get_running_loop()
    connection, _ = await loop.sock_accept(listener)
    with connection:
        readable = asyncio.Event()
        loop.add_reader(connection.fileno(), readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(connection.fileno())
        _, fds, _, _ = socket.recv_fds(connection, 4096, 1)
    if not fds:
        raise GuestError(conmon.CRUN, 0, "it gave no terminal")
    return fds[0]


async def exec_sync(place: Place, wanted: ProcessPlan, timeout_s: float | None, limit: int) -> ExecResult:
    """Raises GuestError, and DeadlineExceeded once all that it started is dead."""
    session = await ExecSession.start(place, wanted, stdin=False, stdout=True, stderr=not wanted.tty)
    kept = [bytearray(), bytearray()]
    readers = [
        asyncio.create_task(_keep(reader, buffer, limit))
        for reader, buffer in zip((session.stdout, session.stderr), kept, strict=True)
        if reader is not None
    ]
    try:
        async with asyncio.timeout(timeout_s):
            code = await session.wait()
            await asyncio.gather(*readers)
    except TimeoutError as error:
        await session.kill()
        raise DeadlineExceeded("exec", timeout_s or 0.0) from error
    except asyncio.CancelledError:
        await asyncio.shield(session.kill())
        raise
    finally:
        session.close()
        await end(*readers)
    return ExecResult(code, bytes(kept[0]), bytes(kept[1]))


async def _keep(reader: FdReader, kept: bytearray, limit: int) -> None:
    with suppress(StreamReset):
        while chunk := await reader.read():
            kept += chunk[: limit - len(kept)]


# ---------------------------------------------------------------------------------------- attaching


class _Queue:
    """What has come of one output and was not taken yet."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.size = 0
        self.ended = False
        self.stopped = False
        self.changed = asyncio.Event()  # for the reader
        self.taken = asyncio.Event()  # for the pump

    async def read(self) -> bytes:
        while not self.chunks:
            if self.stopped:
                raise StreamReset("the stream is not read any more")
            if self.ended:
                return b""
            self.changed.clear()
            await self.changed.wait()
        data = b"".join(self.chunks)
        self.chunks, self.size = [], 0
        self.taken.set()
        return data

    def put(self, data: bytes) -> None:
        self.chunks.append(data)
        self.size += len(data)
        self.changed.set()

    def finish(self) -> None:
        self.ended = True
        self.changed.set()

    def stop(self) -> None:
        self.stopped = True
        self.chunks, self.size = [], 0
        self.changed.set()
        self.taken.set()


class AttachSession:
    """Ears and voice of a running container, from now on."""

    def __init__(self, bundle: Bundle, connection: socket.socket, wanted: dict[int, _Queue]) -> None:
        self._bundle = bundle
        self._connection = connection
        self._wanted = wanted
        self.stdin: FdWriter | None = None
        self.stdout = wanted.get(_STDOUT)
        self.stderr = wanted.get(_STDERR)
        self._pump = asyncio.create_task(self._carry())

    @classmethod
    async def start(cls, bundle: Bundle, *, stdin: bool, stdout: bool, stderr: bool) -> AttachSession:
        """Raises GuestError where nothing holds the container any more."""
        try:
            connection = await asyncio.to_thread(_connect, bundle)
        except OSError as error:
            raise GuestError("attach", error.errno or 0, error.strerror or str(error)) from error
        wishes = {_STDOUT: stdout, _STDERR: stderr}
        session = cls(bundle, connection, {name: _Queue() for name, wish in wishes.items() if wish})
        if stdin:
            session.stdin = FdWriter(os.dup(connection.fileno()), _shut_down)
        return session

    async def _carry(self) -> None:
        """conmon, and so the container, waits for who does not read: but not for ever."""
        loop = asyncio.get_running_loop()
        try:
            while packet := await loop.sock_recv(self._connection, _PACKET + 1):
                queue = self._wanted.get(packet[0])
                if queue is None or queue.stopped:
                    continue
                queue.put(packet[1:])
                await _make_room(queue)
        except (ConnectionError, OSError) as error:
            raise GuestUnreachable(f"conmon: {error}") from error
        finally:
            for queue in self._wanted.values():
                queue.finish()
            self._connection.close()

    async def resize(self, rows: int, columns: int) -> None:
        sizes = (min(max(each, 0), _SIZE_MAX) for each in (rows, columns))
        await asyncio.to_thread(conmon.resize, self._bundle, *sizes)

    async def wait(self) -> int:
        """Return 0 once the container has ended and all its output was read.

        Raises AttachmentStalled, GuestUnreachable.
        """
        await asyncio.shield(self._pump)
        return 0

    def close(self) -> None:
        if self.stdin is not None:
            self.stdin.close()
        for queue in self._wanted.values():
            queue.stop()
        if not self._pump.done():
            self._pump.cancel()
        self._pump.add_done_callback(lambda task: task.cancelled() or task.exception())


async def _make_room(queue: _Queue) -> None:
    """Raises AttachmentStalled."""
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


def _shut_down(fd: int) -> None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
        connection.shutdown(socket.SHUT_WR)


# ---------------------------------------------------------------------------------------- forwarding


class Forwarded:
    """A connection to a port in the pod; owns the socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.reader = FdReader(os.dup(connection.fileno()))
        self.writer = FdWriter(connection.detach(), _shut_down)

    def close(self) -> None:
        self.reader.stop()
        self.writer.close()


def dial(port: int, timeout_s: float) -> socket.socket:
    """In the namespace of the calling thread. Raises GuestError."""
    try:
        return socket.create_connection(("127.0.0.1", port), timeout_s)
    except OSError:
        try:
            return socket.create_connection(("::1", port), timeout_s)
        except OSError as error:
            raise GuestError(
                "connect", error.errno or 0, f"port {port}: {error.strerror or error}"
            ) from error
