"""Runs one CNI plug-in: finds the program, passes its input, bounds its output and its time.

A plug-in is a program in a new session, so that it is killed with its process group. Its output is
read up to a limit. It is finished when it has exited, even if another process still has its pipes open.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from network.errors import CniError

MAX_STDOUT = 1 << 20
MAX_STDERR = 4096  # the tail, for the error message
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CHUNK = 1 << 16  # what a pipe holds by default
_LAST_READS = 32  # of the pipes of a plug-in that has exited; a process that it left may go on writing
_POLL_S = 0.2  # how often a cancellation is checked for
_BUSY_TRIES, _BUSY_PAUSE_S = 5, 0.1  # ETXTBSY: the plug-in is being installed at this moment


class _ErrorResult(msgspec.Struct, frozen=True, kw_only=True):
    """CNI SPEC, "Error"."""

    code: int
    msg: str
    details: str = ""


@dataclass(frozen=True, slots=True)
class Plugins:
    """Plug-ins in `bin_dirs`; the first directory that has one is used. `timeout_s` limits each run."""

    bin_dirs: tuple[Path, ...]
    timeout_s: float = 60.0

    def find(self, plugin: str, verb: str = "ADD") -> Path:
        """Find a plug-in's program. Raises CniError, as if in phase `verb`, when no directory has it."""
        for directory in self.bin_dirs:
            path = directory / plugin
            if path.is_file() and os.access(path, os.X_OK):
                return path
        where = ", ".join(map(str, self.bin_dirs))
        raise CniError(
            plugin, verb, f"no such program in {where}; install it (Debian: containernetworking-plugins)"
        )

    def run(
        self,
        plugin: str,
        verb: str,
        conf: bytes,
        variables: Mapping[str, str],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> bytes:
        """Run a plug-in for the phase `verb` (CNI_COMMAND) and return its stdout.

        `conf` is passed on stdin, `variables` are further CNI_ variables. `cancelled` is polled, and when it
        returns true the plug-in is killed. Raises CniError, also then.
        """
        program = self.find(plugin, verb)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CNI_")}
        # plug-ins execute iptables, which may not be in a service's PATH
        environment["PATH"] = f"{environment.get('PATH', '')}:{_SYSTEM_PATH}".lstrip(":")
        environment |= {"CNI_COMMAND": verb, "CNI_PATH": ":".join(map(str, self.bin_dirs)), **variables}
        try:
            child = _start(program, conf, environment)
        except OSError as error:
            raise CniError(plugin, verb, f"it cannot be started: {error}") from error
        status, stdout, stderr = _Run(child, plugin, verb, self.timeout_s, cancelled).wait()
        if status != 0:
            raise _failure(plugin, verb, status, stdout, stderr)
        return stdout


def _start(program: Path, conf: bytes, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # a file instead of a pipe: no thread has to write to a plug-in that does not read
    with os.fdopen(os.memfd_create("cni-conf", os.MFD_CLOEXEC), "w+b") as stdin:
        stdin.write(conf)
        for remaining in reversed(range(_BUSY_TRIES)):
            stdin.seek(0)
            try:
                return subprocess.Popen(
                    [program],
                    stdin=stdin,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=environment,
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as error:
                if error.errno != errno.ETXTBSY or not remaining:
                    raise
                time.sleep(_BUSY_PAUSE_S)
    raise AssertionError("the last try returns or raises")


class _Run:
    """A plug-in that runs."""

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        plugin: str,
        verb: str,
        timeout_s: float,
        cancelled: Callable[[], bool],
    ) -> None:
        self._child = child
        self._plugin = plugin
        self._verb = verb
        self._timeout_s = timeout_s
        self._cancelled = cancelled
        self._stdout = bytearray()
        self._stderr = bytearray()

    def wait(self) -> tuple[int, bytes, bytes]:
        """Return the exit status (negative: the signal), stdout and the tail of stderr.

        Raises CniError on timeout, cancellation and too much output; then the process group is killed.
        """
        child = self._child
        assert child.stdout is not None and child.stderr is not None
        pidfd = os.pidfd_open(child.pid)
        try:
            with child.stdout, child.stderr, selectors.DefaultSelector() as selector:
                for fd in (child.stdout.fileno(), child.stderr.fileno()):
                    os.set_blocking(fd, False)
                    selector.register(fd, selectors.EVENT_READ)
                selector.register(pidfd, selectors.EVENT_READ)
                self._watch(selector, pidfd, child.stdout.fileno())
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            raise
        finally:
            os.close(pidfd)
            status = child.wait()
        return status, bytes(self._stdout), bytes(self._stderr)

    def _watch(self, selector: selectors.BaseSelector, pidfd: int, stdout: int) -> None:
        deadline = time.monotonic() + self._timeout_s
        ended = False
        while not ended:
            self._check_deadline(deadline)
            ready = [key.fd for key, _ in selector.select(_POLL_S)]
            ended = pidfd in ready
            # after the exit, what is left in both pipes
            sources = [key.fd for key in selector.get_map().values()] if ended else ready
            for fd in sources:
                if fd != pidfd and not self._read(fd, fd == stdout, _LAST_READS if ended else 1):
                    selector.unregister(fd)

    def _read(self, fd: int, is_stdout: bool, times: int) -> bool:
        """Read what is available, at most so many chunks. False at the end of the stream."""
        for _ in range(times):
            try:
                chunk = os.read(fd, _CHUNK)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            if is_stdout:
                self._stdout += chunk
                if len(self._stdout) > MAX_STDOUT:
                    raise self._error(f"it printed more than {MAX_STDOUT} bytes")
            else:
                self._stderr = (self._stderr + chunk)[-MAX_STDERR:]
        return True

    def _check_deadline(self, deadline: float) -> None:
        if self._cancelled():
            raise self._error("it was killed, as the request was cancelled")
        if time.monotonic() >= deadline:
            raise self._error(f"it did not exit within {self._timeout_s:g} s and was killed")

    def _error(self, message: str) -> CniError:
        return CniError(self._plugin, self._verb, message, stderr=printable(bytes(self._stderr)))


def _failure(plugin: str, verb: str, status: int, stdout: bytes, stderr: bytes) -> CniError:
    written = printable(stderr)
    try:
        result = msgspec.json.decode(stdout, type=_ErrorResult)
    except msgspec.DecodeError:
        how = f"exit status {status}" if status > 0 else f"killed by signal {-status}"
        printed = f" but {printable(stdout[:512])!r}" if stdout else ""
        return CniError(plugin, verb, f"{how}, and it printed no error result{printed}", stderr=written)
    return CniError(plugin, verb, result.msg, code=result.code, details=result.details, stderr=written)


def printable(text: bytes) -> str:
    """Decode what a plug-in printed, for a message."""
    return text.decode(errors="replace").strip()
