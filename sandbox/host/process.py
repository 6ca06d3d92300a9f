"""Processes that outlive the daemon: how they are started, known again, watched and ended.

One door: nothing else in `sandbox` starts a process. Children are started with `subprocess` from
threads of their own (never asyncio's: see below), detached into a session of their own, and are in
their cgroups before the program that was asked for runs its first instruction.

Why no asyncio here: its child watchers fork on the event loop's thread, which under uvloop beside
live gRPC calls crashed children. A plain thread also can enter a network namespace, start the
child there, and end: it never needs to find its way back, so no thread of the daemon is ever left
in a pod's namespace.

Crash story: nothing is remembered in memory. A process is known again by its identity from the
record; where the record was not written in time, by its cgroup, or by its command line together
with a mark in its environment that `start` leaves.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from sandbox.errors import DeadlineExceeded
from sandbox.host import syscalls, threads
from sandbox.host.proc import boot_id, read_stat

MARK = "HUSK_PROCESS"
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C"}
_KILL_TIMEOUT_S = 5.0
_LOOKS = 10
_LOOK_AGAIN_S = 0.003

# Runs before the program: what a child must be before it is exec'ed, done by the child itself, as
# preexec_fn is not safe beside threads. No core dumps: they would hold a guest's memory.
_PRELUDE = """
umask "$1" && ulimit -S -c 0 || exit 126
echo "$2" 2>/dev/null >/proc/self/oom_score_adj
shift 2
while [ "$1" != -- ]; do echo 0 >"$1/cgroup.procs" || exit 126; shift; done
shift
exec "$@"
"""
# In a mount namespace of its own, which sees what the host unmounts.
_BIND = 'while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit 126; shift 2; done; shift; exec "$@"'


class ProcessIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """A process for good: pids are reused, (pid, start time, boot) is not.

    `start_time` is field 22 of /proc/PID/stat, in clock ticks since boot (proc(5)).
    """

    pid: int
    start_time: int
    boot_id: str


def started_s(identity: ProcessIdentity) -> float:
    """When a process of this boot started, on the monotonic clock; right to a clock tick (10 ms)."""
    asleep_s = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    return identity.start_time / os.sysconf("SC_CLK_TCK") - asleep_s


class User(msgspec.Struct, frozen=True, kw_only=True):
    """Whom a program runs as; `groups` are the supplementary ones, and there are no others."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class Completed(msgspec.Struct, frozen=True, kw_only=True):
    """A short-lived program that has ended. Negative `status`: the signal that ended it."""

    status: int
    stdout: bytes
    stderr: bytes
    truncated: bool = False


# ------------------------------------------------------------------------------------- identity


def identify(pid: int) -> ProcessIdentity | None:
    """Who has this pid now; None when nobody does, or only a zombie."""
    stat = read_stat(pid)
    if stat is None or stat.state in "ZX":
        return None
    return ProcessIdentity(pid=pid, start_time=stat.start_time, boot_id=boot_id())


def alive(identity: ProcessIdentity) -> bool:
    return identify(identity.pid) == identity


def _pidfd(identity: ProcessIdentity) -> int | None:
    """A descriptor of exactly this process, or of its zombie; None when it is gone."""
    try:
        fd = os.pidfd_open(identity.pid)
    except OSError as error:
        # EINVAL: many kernels say so when they come upon it in the moment of its going
        if error.errno not in (errno.ESRCH, errno.EINVAL):
            raise
        return None
    stat = read_stat(identity.pid)  # after pidfd_open: from here on the pid cannot change hands unnoticed
    if stat is None or stat.start_time != identity.start_time or boot_id() != identity.boot_id:
        os.close(fd)
        return None
    return fd


def _reap(fd: int) -> int | None:
    """Collect a child of ours, so that no zombie stays; somebody else's is their business."""
    try:
        result = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


async def wait_exit(identity: ProcessIdentity) -> int | None:
    """Return once the process is gone: its status where it was our child and not yet collected.

    A negative status is the signal that ended it. Works for children and adopted processes alike.
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
    """End it with SIGKILL and wait. Idempotent. Raises DeadlineExceeded when it will not go."""
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
        raise DeadlineExceeded(f"ending process {identity.pid}", timeout_s) from error


def _kill_and_reap(identity: ProcessIdentity) -> None:
    """The blocking form of `kill`, for a child. Raises DeadlineExceeded."""
    fd = _pidfd(identity)
    if fd is None:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        if not readable_within(fd, _KILL_TIMEOUT_S):
            raise DeadlineExceeded(f"ending process {identity.pid}", _KILL_TIMEOUT_S)
        _reap(fd)
    finally:
        os.close(fd)


# ----------------------------------------------------------------------------------- recovery


def find_by_cgroup(directories: Iterable[str]) -> list[ProcessIdentity]:
    """Everything that runs in these cgroups; directories that are gone hold nothing."""
    pids: set[int] = set()
    for directory in directories:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, OSError):
            pids.update(map(int, Path(directory, "cgroup.procs").read_text().split()))
    found = (identify(pid) for pid in sorted(pids) if pid)
    return [identity for identity in found if identity is not None]


def find_by_argument(*needles: str) -> list[ProcessIdentity]:
    """Processes made by `start` with one of these arguments; looks at all of /proc.

    A needle that ends in "/" is a directory, and arguments count that name something in it.
    The mark in the environment keeps an editor or `tail` on the same file out of it. Finds a child
    also before it is exec'ed, and children that it forked itself. Blocks for some milliseconds: in
    the moment of an exec a process shows neither, so what shows nothing is looked at again.
    """
    wanted = [os.fsencode(needle) for needle in needles]
    pending = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    found = []
    for _ in range(_LOOKS):
        verdicts = {pid: _made_with(pid, wanted) for pid in pending}
        found += [identify(pid) for pid, verdict in verdicts.items() if verdict]
        pending = [pid for pid, verdict in verdicts.items() if verdict is None]
        if not pending:
            break
        time.sleep(_LOOK_AGAIN_S)
    return [identity for identity in found if identity is not None]


def _made_with(pid: int, wanted: Sequence[bytes]) -> bool | None:
    """Whether `start` made it with one of these arguments; None: cannot be seen right now."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
        if not arguments:
            return None if _has_program(pid) else False
        if not any(_matches(needle, arguments.split(b"\0")) for needle in wanted):
            return False
        variables = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False  # ended while we looked
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
    user: User | None = None,
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
) -> ProcessIdentity:
    """Start a program that shall outlive the daemon, and return before it has done anything.

    `cgroups` are directories, of several hierarchies on cgroup v1. Without `user` it stays root;
    it can gain no new privileges, but with `new_privs`, which also what it starts may then gain.
    `binds` (source by target) are mounted in a mount namespace of the child's own. Descriptors keep
    their numbers.
    `oom_score_adj` is set even when it is 0, as the daemon's own is inherited; where lowering it is
    not allowed (no CAP_SYS_RESOURCE) it stays. A step before exec that fails ends the child with
    status 126 and its reason on stderr.
    Raises OSError when not even that could be started (netns is gone, no memory).
    """
    command = _wrapped(argv, cgroups, user, oom_score_adj, umask, binds or {}, new_privs)
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
        # From here on it is known by its identity: Popen shall neither reap it nor complain.
        child.returncode = 0
        return ProcessIdentity(pid=child.pid, start_time=stat.start_time, boot_id=boot_id())

    return await threads.run(spawn, "husk-start", discard=_kill_and_reap)


def _wrapped(
    argv: Sequence[str],
    cgroups: Sequence[str],
    user: User | None,
    oom_score_adj: int,
    umask: int,
    binds: Mapping[str, str],
    new_privs: bool,
) -> list[str]:
    prelude = ["/bin/sh", "-c", _PRELUDE, "husk-start", f"{umask:04o}", str(oom_score_adj), *cgroups, "--"]
    if binds:
        pairs = [path for target, source in binds.items() for path in (source, target)]
        prelude += ["unshare", "--mount", "--propagation", "slave", "/bin/sh", "-c", _BIND, "husk-bind"]
        prelude += [*pairs, "--"]
    if new_privs and user is None:
        return [*prelude, *argv]
    drop = ["setpriv", *([] if new_privs else ["--no-new-privs"])]
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
    user: User | None = None,
) -> Completed:
    """Run a program to its end; of each output the first `max_output` bytes are kept.

    It is killed, with what it started, after `timeout_s` or when the caller is cancelled.
    Raises DeadlineExceeded, and OSError when it cannot be started (FileNotFoundError: not there).
    """
    cancelled = threading.Event()

    def work() -> Completed:
        if netns:
            threads.enter_namespace(Path(netns), syscalls.CLONE_NEWNET)
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
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
                _give_up_after(deadline, name, timeout_s, cancelled)
                for key, _ in selector.select(min(0.2, max(0.0, deadline - time.monotonic()))):
                    chunk = os.read(key.fd, 1 << 16)
                    if not chunk:
                        selector.unregister(key.fd)
                    room = max_output - len(kept[key.fd])
                    truncated = truncated or len(chunk) > room
                    kept[key.fd] += chunk[:room]
            _await_end(child.pid, functools.partial(_give_up_after, deadline, name, timeout_s, cancelled))
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            raise
        finally:
            status = child.wait()
    return Completed(status=status, stdout=bytes(outputs[0]), stderr=bytes(outputs[1]), truncated=truncated)


def _give_up_after(deadline: float, name: str, timeout_s: float, cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise InterruptedError(f"{name}: nobody waits for it any more")
    if time.monotonic() >= deadline:
        raise DeadlineExceeded(name, timeout_s)


def readable_within(fd: int, timeout_s: float) -> bool:
    """Whether there is something to read, or the end, before so long; blocks."""
    return bool(select.select([fd], [], [], timeout_s)[0])


def _await_end(pid: int, check: Callable[[], None]) -> None:
    """A program may close its outputs and go on; wait for its end without reaping it."""
    fd = os.pidfd_open(pid)
    try:
        while not select.select([fd], [], [], 0.2)[0]:
            check()
    finally:
        os.close(fd)
