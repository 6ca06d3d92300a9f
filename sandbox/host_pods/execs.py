"""Execs in containers without a VM: each is a `crun exec`, started by the daemon in the container's cgroup.

Its process has the session's pipes, or a terminal, as its own descriptors. Its directory holds

    process.json    what crun is to run
    pid             written by crun once the program runs; where it is missing, `log` says why
    log             written by crun
    console         a socket, over which crun passes the terminal

As with any container runtime, what an exec has started goes on when its client disconnects or the daemon
ends: then its outputs are broken pipes. The next daemon ends the execs of an earlier one.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import socket
import struct
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from sandbox.container import Container
from sandbox.errors import (
    DeadlineExceeded,
    GuestError,
    GuestUnreachable,
    InvalidContainerConfig,
    SandboxError,
    StreamReset,
)
from sandbox.host import cgroup, process, threads
from sandbox.host.process import ProcessIdentity
from sandbox.host.tasks import end, until_done
from sandbox.host_pods import cgroups, conmon
from sandbox.host_pods.conmon import SIZE_MAX, Bundle
from sandbox.host_pods.host_files import node_limits
from sandbox.host_pods.layout import HostLayout
from sandbox.host_pods.oci import compile_process
from sandbox.host_pods.streams import FdReader, FdWriter
from sandbox.plan.signals import exit_code_of
from sandbox.plan.values import ProcessPlan
from sandbox.session import ExecResult

START_TIMEOUT_S = 60.0
STARTED_TIMEOUT_S = 5.0
_POLL_S = 0.005

_numbers = count()


@dataclass(frozen=True, slots=True)
class ExecSite:
    """Where an exec runs."""

    bundle: Bundle
    cgroups: tuple[str, ...]
    kill: Callable[[Sequence[int]], None]  # these processes, their sessions and their descendants; blocking


def site_of(layout: HostLayout, container: Container) -> ExecSite:
    """Return where the execs of a container run."""
    hierarchies, path = layout.hierarchies, layout.container_cgroup(container)
    return ExecSite(
        bundle=layout.bundle(container),
        cgroups=cgroup.directories(hierarchies, path),
        kill=lambda leaders: cgroups.kill(hierarchies, path, cgroups.started_by(*leaders)),
    )


class CrunExec:
    """A running exec, as a `session.Session`. Belongs to the event loop."""

    def __init__(self, site: ExecSite, directory: Path) -> None:
        self._site = site
        self._directory = directory
        self._terminal = -1
        self.stdin: FdWriter | None = None
        self.stdout: FdReader | None = None
        self.stderr: FdReader | None = None
        self._crun: ProcessIdentity | None = None
        self._ended: asyncio.Task[int] | None = None

    @classmethod
    async def start(
        cls, site: ExecSite, plan: ProcessPlan, *, stdin: bool, stdout: bool, stderr: bool
    ) -> CrunExec:
        """Start crun. Raises GuestError, InvalidSpec, DeadlineExceeded; nothing runs then.

        Where the program cannot be executed, `wait` may be what raises GuestError.
        """
        text = json.dumps(compile_process(plan, node_limits()), ensure_ascii=False)
        directory = site.bundle.execs / f"{os.getpid()}-{next(_numbers)}"
        session = cls(site, directory)
        try:
            await threads.run(lambda: _make_directory(directory, text), "husk-exec", pooled=True)
            if plan.tty:
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
            for number, is_wanted in ((1, stdout), (2, stderr)):
                if is_wanted:
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
                # the path of the directory itself would exceed the 108 bytes of sun_path
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
        """Start crun. A caller that is cancelled still learns what was started, for `kill` to end it."""
        bundle = self._site.bundle
        files = ["--process", str(self._directory / "process.json"), "--pid-file", str(self._pid_file)]
        argv = bundle.crun(f"--log={self._log}", "exec", *files, *options, bundle.id)
        starting = asyncio.create_task(
            process.start(
                argv,
                cgroups=self._site.cgroups,
                pass_fds=pass_fds,
                stdin=ends[0],
                stdout=ends[1],
                stderr=ends[2],
                umask=0o022,
                new_privs=True,
            )
        )
        cancelled = await until_done(starting)
        self._crun = starting.result()
        self._ended = asyncio.create_task(self._await_end(self._crun))
        if cancelled:
            raise asyncio.CancelledError

    async def _accept(self, listener: socket.socket) -> int:
        """Return the terminal that crun passes. Raises GuestError if it ends without, DeadlineExceeded."""
        assert self._ended is not None
        receiving = asyncio.create_task(_receive_terminal(listener))
        try:
            await asyncio.wait(
                {receiving, self._ended}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if receiving.done():
                return receiving.result()
            if self._ended.done():
                self._ended.result()
                raise GuestError(conmon.CRUN, 0, "it passed no terminal")
            raise DeadlineExceeded("exec", START_TIMEOUT_S)
        finally:
            if not receiving.done():
                await end(receiving)

    @property
    def _pid_file(self) -> Path:
        return self._directory / "pid"

    @property
    def _log(self) -> Path:
        return self._directory / "log"

    async def _await_end(self, crun: ProcessIdentity) -> int:
        """Return the exit code. Raises GuestError if the program was not executed."""
        status = await process.wait_exit(crun)
        for reader in (self.stdout, self.stderr):
            if reader is not None:
                reader.expire()
        try:
            ran = self._pid_file.exists()
            problem = self._log.read_text(errors="replace").strip() if self._log.exists() else ""
        finally:
            await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)
        if not ran or (status and problem):
            raise InvalidContainerConfig("exec", 0, problem or f"crun ended with {status}")
        if status is None:
            raise GuestUnreachable("the exit code of the exec is lost")
        return status if status >= 0 else exit_code_of(-status)

    async def resize(self, rows: int, columns: int) -> None:
        """Set the terminal's size, at most 65535 each. Raises GuestError without a terminal."""
        if self._terminal < 0:
            raise GuestError("resize", 0, "the exec has no terminal")
        rows, columns = (min(max(each, 0), SIZE_MAX) for each in (rows, columns))
        size = struct.pack("HHHH", rows, columns, 0, 0)
        with suppress(OSError):  # hung up by now
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)

    async def wait(self) -> int:
        """Return the exit code. Raises GuestError if the program was not executed, GuestUnreachable."""
        assert self._ended is not None
        return await asyncio.shield(self._ended)

    async def kill(self) -> None:
        """Kill the process and all that it started. Raises DeadlineExceeded."""
        assert self._crun is not None and self._ended is not None
        await asyncio.to_thread(_kill_all, self._site, {self._directory: [self._crun]})
        await process.kill(self._crun)
        with suppress(SandboxError):
            await asyncio.shield(self._ended)

    def close(self) -> None:
        """Close the streams and the terminal; the process is not killed. Idempotent."""
        if self.stdin is not None:
            self.stdin.close()
        for reader in (self.stdout, self.stderr):
            if reader is not None:
                reader.stop()
        fd, self._terminal = self._terminal, -1
        if fd >= 0:
            os.close(fd)
        if self._ended is not None:
            self._ended.add_done_callback(_retrieve)


def end_execs(site: ExecSite) -> None:
    """Kill the execs that an earlier daemon started, and delete their directories. Blocking."""
    directories = list(site.bundle.execs.iterdir())
    if not directories:
        return
    found = process.find_by_argument(f"{site.bundle.execs}/")
    _kill_all(site, dict.fromkeys(directories, found))
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def _kill_all(site: ExecSite, crun: Mapping[Path, Sequence[ProcessIdentity]]) -> None:
    """Kill the execs of these directories, each with the processes that may be its crun. Blocking.

    crun is let come to where it has named the program: killed before, it leaves a child of which nothing says
    that it belongs to the exec. One that does not get there within STARTED_TIMEOUT_S is killed as it is.
    """
    deadline = time.monotonic() + STARTED_TIMEOUT_S
    for directory, processes in crun.items():
        while (
            time.monotonic() < deadline and any(map(process.alive, processes)) and not _leader_in(directory)
        ):
            time.sleep(_POLL_S)
    pids = {each.pid for processes in crun.values() for each in processes}
    site.kill([*pids, *(leader for each in crun for leader in _leader_in(each))])


def _leader_in(directory: Path) -> list[int]:
    """Return the process that crun has started, if its file is there."""
    with suppress(OSError, ValueError):
        return [int((directory / "pid").read_text())]
    return []


def _retrieve(task: asyncio.Task[int]) -> None:
    """Mark the exception as retrieved, or asyncio would log it."""
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
        raise GuestError(conmon.CRUN, 0, "it passed no terminal")
    return fds[0]


async def run_exec(site: ExecSite, plan: ProcessPlan, timeout_s: float | None, limit: int) -> ExecResult:
    """Run a process to its end; at most `limit` bytes of each output are kept.

    Raises GuestError, InvalidSpec, and DeadlineExceeded once all that the process started is dead.
    """
    session = await CrunExec.start(site, plan, stdin=False, stdout=True, stderr=not plan.tty)
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
