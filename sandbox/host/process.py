"""Processes that outlive the daemon: how they are started, recognized again, watched and killed.

Nothing else in `sandbox` starts a process that outlives a call. Children are started with `subprocess`
from separate threads (never asyncio's child watchers: see below), detached into new sessions,
and are in their cgroups before the requested program executes its first instruction.

Why not asyncio: its child watchers fork on the event loop's thread, which under uvloop beside live gRPC
calls crashed 1.5 to 6 % of the children. A plain thread can also enter a network namespace, start the child
there, and end: it never has to leave the namespace, so no thread of the daemon stays in a pod's namespace.

Crash story: nothing is kept in memory only. A process is recognized by its identity from the record; where
the record was not written in time, by its cgroup, or by its command line together with a mark in its
environment that `start` leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import select
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from sandbox.errors import DeadlineExceeded as DeadlineExceeded  # for callers outside of sandbox
from sandbox.host import syscalls, threads
from sandbox.host.proc import boot_id, read_stat

MARK = "HUSK_PROCESS"
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C"}
_KILL_TIMEOUT_S = 5.0
_READS = 10
_REREAD_S = 0.003

# What has to be done in the child before the exec, done by the child's own shell, as preexec_fn is not safe
# beside threads. No core dumps: they would contain a guest's memory.
_PRELUDE = """
umask "$1" && ulimit -S -c 0 || exit 126
echo "$2" 2>/dev/null >/proc/self/oom_score_adj
shift 2
while [ "$1" != -- ]; do echo 0 >"$1/cgroup.procs" || exit 126; shift; done
shift
exec "$@"
"""
# Runs in a new mount namespace, to which the host's unmounts propagate.
_BIND = 'while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit 126; shift 2; done; shift; exec "$@"'


class ProcessIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Identifies one process forever: pids are reused, the triple of pid, start time and boot is not.

    `start_time` is field 22 of /proc/PID/stat, in clock ticks since boot (proc(5)).
    """

    pid: int
    start_time: int
    boot_id: str


def started_s(identity: ProcessIdentity) -> float:
    """Return when a process of this boot started, in seconds of CLOCK_MONOTONIC, to a clock tick (10 ms)."""
    asleep_s = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    return identity.start_time / os.sysconf("SC_CLK_TCK") - asleep_s


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """User and groups that a program runs with; `groups` are all of its supplementary groups."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class Completed(msgspec.Struct, frozen=True, kw_only=True):
    """A short-lived program that has exited. A negative `status` is the signal that terminated it."""

    status: int
    stdout: bytes
    stderr: bytes
    truncated: bool = False


# ------------------------------------------------------------------------------------- identity


def identify(pid: int) -> ProcessIdentity | None:
    """Identify the process that has this pid now; None when there is none, or only a zombie."""
    stat = read_stat(pid)
    if stat is None or stat.state in "ZX":
        return None
    return ProcessIdentity(pid=pid, start_time=stat.start_time, boot_id=boot_id())


def alive(identity: ProcessIdentity) -> bool:
    """Whether exactly this process exists and is not a zombie."""
    return identify(identity.pid) == identity


def _pidfd(identity: ProcessIdentity) -> int | None:
    """Open a pidfd of exactly this process, or of its zombie; None when it is gone."""
    try:
        fd = os.pidfd_open(identity.pid)
    except OSError as error:
        # EINVAL: many kernels return it for a process that is being released at this moment
        if error.errno not in (errno.ESRCH, errno.EINVAL):
            raise
        return None
    stat = read_stat(identity.pid)  # after pidfd_open: the pid cannot be reused unnoticed any more
    if stat is None or stat.start_time != identity.start_time or boot_id() != identity.boot_id:
        os.close(fd)
        return None
    return fd


def _reap(fd: int) -> int | None:
    """Reap a child of ours, so that no zombie stays. None for a process that is not our child."""
    try:
        result = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


async def wait_exit(identity: ProcessIdentity) -> int | None:
    """Wait until the process has exited. Works for children and adopted processes.

    Returns the status of a child of ours that was not reaped yet (negative: the signal that terminated it),
    None for any other process.
    """
    fd = _pidfd(identity)
    if fd is None:
        return None
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    try:
        loop.add_reader(fd, ended.set)
        await ended.wait()
        return _reap(fd)
    finally:
        loop.remove_reader(fd)
        os.close(fd)


async def kill(identity: ProcessIdentity, timeout_s: float = _KILL_TIMEOUT_S) -> None:
    """Send SIGKILL and wait for the exit. Idempotent. Raises DeadlineExceeded after `timeout_s`."""
    fd = _pidfd(identity)
    if fd is None:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    finally:
        os.close(fd)
    try:
        async with asyncio.timeout(timeout_s):
            await wait_exit(identity)
    except TimeoutError as error:
        raise DeadlineExceeded(f"killing process {identity.pid}", timeout_s) from error


def _kill_and_reap(identity: ProcessIdentity) -> None:
    """The blocking form of `kill`, for a child. Raises DeadlineExceeded."""
    fd = _pidfd(identity)
    if fd is None:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        if not readable_within(fd, _KILL_TIMEOUT_S):
            raise DeadlineExceeded(f"killing process {identity.pid}", _KILL_TIMEOUT_S)
        _reap(fd)
    finally:
        os.close(fd)


# ----------------------------------------------------------------------------------- recovery


def find_by_cgroup(directories: Iterable[str]) -> list[ProcessIdentity]:
    """List the processes in these cgroups (directories, not nested ones). A missing directory is empty."""
    pids: set[int] = set()
    for directory in directories:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, OSError):
            pids.update(map(int, Path(directory, "cgroup.procs").read_text().split()))
    found = (identify(pid) for pid in sorted(pids) if pid)
    return [identity for identity in found if identity is not None]


def find_by_argument(*needles: str) -> list[ProcessIdentity]:
    """List the processes that `start` made with one of these arguments; reads all of /proc.

    A needle that ends in "/" is a directory, and matches arguments that contain it. The mark in the
    environment excludes an editor or `tail` on the same file. Also finds a child before its exec, and
    children that it forked itself. Blocks for some milliseconds: during execve(2) a process shows neither
    arguments nor environment, so a process that shows none is read again, up to 10 times.
    """
    wanted = [os.fsencode(needle) for needle in needles]
    pending = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    found = []
    for _ in range(_READS):
        matches = {pid: _made_with(pid, wanted) for pid in pending}
        found += [identify(pid) for pid, match in matches.items() if match]
        pending = [pid for pid, match in matches.items() if match is None]
        if not pending:
            break
        time.sleep(_REREAD_S)
    return [identity for identity in found if identity is not None]


def _made_with(pid: int, wanted: Sequence[bytes]) -> bool | None:
    """Whether `start` made it with one of these arguments; None: it shows neither at this moment."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
        if not arguments:
            return None if _has_program(pid) else False
        if not any(_matches(needle, arguments.split(b"\0")) for needle in wanted):
            return False
        variables = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False  # it has exited meanwhile
    if not variables:
        return None
    return any(variable.startswith(MARK.encode() + b"=") for variable in variables.split(b"\0"))


def _has_program(pid: int) -> bool:
    """False for kernel threads and zombies, which never have arguments (proc(5), /proc/PID/exe)."""
    try:
        return bool(Path(f"/proc/{pid}/exe").readlink())
    except OSError:
        return False


def _matches(needle: bytes, arguments: Sequence[bytes]) -> bool:
    if needle.endswith(b"/"):
        return any(needle in argument for argument in arguments)
    return needle in arguments


# ------------------------------------------------------------------------------------ starting


async def start(
    argv: Sequence[str],
    *,
    cgroups: Sequence[str] = (),
    user: Credentials | None = None,
    netns: str = "",
    pass_fds: Sequence[int] = (),
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
    oom_score_adj: int = 0,
    umask: int = 0o077,
    binds: Mapping[str, str] | None = None,
    new_privs: bool = False,
    keep_capabilities: bool = False,
) -> ProcessIdentity:
    """Start a program that outlives the daemon. Returns without waiting for its exec.

    `cgroups` are the directories to join, of several hierarchies on cgroup v1. Without `user` it runs as
    root. It runs with no_new_privs unless `new_privs`, which its children inherit. `binds` (source by target)
    are mounted in the child's own mount namespace. With `keep_capabilities` a program that runs as root keeps
    its capabilities when a thread of it changes its user (SECBIT_NO_SETUID_FIXUP, capabilities(7)).
    `pass_fds` keep their numbers.
    `oom_score_adj` is set even when it is 0, as the daemon's own would be inherited; where lowering it is not
    permitted (no CAP_SYS_RESOURCE) it stays as it is. A preparation that fails before the exec ends the child
    with status 126 and the reason on its stderr.
    A caller that is cancelled leaves no process: the child is killed and reaped.
    Raises OSError when the child cannot be started at all (netns is gone, no memory).
    """
    command = _wrapped(argv, cgroups, user, oom_score_adj, umask, binds or {}, new_privs, keep_capabilities)
    variables = {**ENVIRONMENT, **(environment or {}), MARK: "1"}

    def spawn() -> ProcessIdentity:
        if netns:
            threads.enter_namespace(Path(netns), syscalls.CLONE_NEWNET)
        child = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=tuple(pass_fds),
            env=variables,
            cwd="/",
            start_new_session=True,
        )
        stat = read_stat(child.pid)
        assert stat is not None, "a child that was not waited for cannot vanish"
        # From here on its identity is used: Popen must neither reap it nor warn that it still runs.
        child.returncode = 0
        return ProcessIdentity(pid=child.pid, start_time=stat.start_time, boot_id=boot_id())

    return await threads.run(spawn, "husk-start", discard=_kill_and_reap)


def _wrapped(
    argv: Sequence[str],
    cgroups: Sequence[str],
    user: Credentials | None,
    oom_score_adj: int,
    umask: int,
    binds: Mapping[str, str],
    new_privs: bool,
    keep_capabilities: bool,
) -> list[str]:
    prelude = ["/bin/sh", "-c", _PRELUDE, "husk-start", f"{umask:04o}", str(oom_score_adj), *cgroups, "--"]
    if binds:
        pairs = [path for target, source in binds.items() for path in (source, target)]
        prelude += ["unshare", "--mount", "--propagation", "slave", "/bin/sh", "-c", _BIND, "husk-bind"]
        prelude += [*pairs, "--"]
    if new_privs and user is None and not keep_capabilities:
        return [*prelude, *argv]
    drop = ["setpriv", *([] if new_privs else ["--no-new-privs"])]
    if keep_capabilities:
        drop += ["--securebits=+no_setuid_fixup"]
    if user is not None:
        groups = ",".join(map(str, user.groups))
        drop += [f"--reuid={user.uid}", f"--regid={user.gid}"]
        drop += [f"--groups={groups}" if groups else "--clear-groups"]
        drop += ["--inh-caps=-all", "--bounding-set=-all"]
    return [*prelude, *drop, "--", *argv]


# --------------------------------------------------------------------------- short-lived programs


async def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    max_output: int = 1 << 20,
    environment: Mapping[str, str] | None = None,
    cwd: str = "/",
    netns: str = "",
    user: Credentials | None = None,
    stdin: bytes = b"",
) -> Completed:
    """Run a program to its exit; of each of its outputs the first `max_output` bytes are kept.

    It is killed, with its process group, after `timeout_s` or when the caller is cancelled (which does not
    wait for the exit). `netns` is the path of a network namespace to run it in; `stdin` is what it reads.
    Raises DeadlineExceeded, and OSError when it cannot be started (FileNotFoundError: no such program).
    """
    cancelled = threading.Event()

    def work() -> Completed:
        if netns:
            threads.enter_namespace(Path(netns), syscalls.CLONE_NEWNET)
        with _input(stdin) as file:
            child = subprocess.Popen(
                argv,
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**ENVIRONMENT, **(environment or {})},
                cwd=cwd,
                start_new_session=True,
                user=user.uid if user else None,
                group=user.gid if user else None,
                extra_groups=user.groups if user else None,
            )
        return _collect(child, argv[0], timeout_s, max_output, cancelled.is_set)

    return await threads.run(work, "husk-run", on_cancel=cancelled.set, linger_s=0)


@contextlib.contextmanager
def _input(data: bytes) -> Iterator[int]:
    """Yield the descriptor of a standard input. It is in memory: a program that does not read a pipe would
    block the writer."""
    if not data:
        yield subprocess.DEVNULL
        return
    fd = os.memfd_create("stdin")
    try:
        os.write(fd, data)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _collect(
    child: subprocess.Popen[bytes],
    name: str,
    timeout_s: float,
    max_output: int,
    cancelled: Callable[[], bool],
) -> Completed:
    deadline = time.monotonic() + timeout_s
    kept: dict[int, bytearray] = {}
    truncated = False
    assert child.stdout is not None and child.stderr is not None
    with child.stdout, child.stderr, selectors.DefaultSelector() as selector:
        for stream in (child.stdout, child.stderr):
            kept[stream.fileno()] = bytearray()
            selector.register(stream.fileno(), selectors.EVENT_READ)
        outputs = list(kept.values())
        try:
            while selector.get_map():
                _check_deadline(deadline, name, timeout_s, cancelled)
                for key, _ in selector.select(min(0.2, max(0.0, deadline - time.monotonic()))):
                    chunk = os.read(key.fd, 1 << 16)
                    if not chunk:
                        selector.unregister(key.fd)
                    left = max_output - len(kept[key.fd])
                    truncated = truncated or len(chunk) > left
                    kept[key.fd] += chunk[:left]
            _wait_unreaped(
                child.pid, functools.partial(_check_deadline, deadline, name, timeout_s, cancelled)
            )
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            raise
        finally:
            status = child.wait()
    return Completed(status=status, stdout=bytes(outputs[0]), stderr=bytes(outputs[1]), truncated=truncated)


def _check_deadline(deadline: float, name: str, timeout_s: float, cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise InterruptedError(f"{name}: its caller was cancelled")
    if time.monotonic() >= deadline:
        raise DeadlineExceeded(name, timeout_s)


def readable_within(fd: int, timeout_s: float) -> bool:
    """Block until `fd` has data or end of file to read, at most `timeout_s` seconds; whether it has."""
    return bool(select.select([fd], [], [], timeout_s)[0])


def _wait_unreaped(pid: int, check: Callable[[], None]) -> None:
    """Wait for the exit without reaping: a program may close its outputs and go on."""
    fd = os.pidfd_open(pid)
    try:
        while not select.select([fd], [], [], 0.2)[0]:
            check()
    finally:
        os.close(fd)
