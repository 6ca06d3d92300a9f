"""conmon, which supervises a container, and crun, which makes it: their command lines and files.

    RUN/containers/ID/
        config.json     what crun is to make
        files/N         the plan's small files
        started         made before `crun start` runs
        exit/ID         written by conmon: the exit code, once the container has ended and its log is written
        attach          made by conmon: a socket, see `attach`
        ctl             made by conmon: a pipe for commands, lines of numbers (conmon's src/ctrl.c)
        errors          stderr of conmon and crun
        execs/N/        see `execs`

conmon is started in the container's cgroup, so that crun is in it too and the container's cgroup namespace
begins there; it is moved to the supervisors' cgroup before the container's program runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from sandbox.errors import DeadlineExceeded, GuestError, MissingProgram
from sandbox.host import process
from sandbox.host.cgroup import Layout
from sandbox.host.process import ProcessIdentity

CONMON, CRUN = "conmon", "crun"
CREATE_TIMEOUT_S = 60.0
RUN_TIMEOUT_S = 30.0
SIZE_MAX = 0xFFFF  # struct winsize
REOPEN_TIMEOUT_S = 5.0
_PAUSE_S = 0.005
_REPORT_MAX = 64 << 10
_ERRORS_MAX = 2048  # bytes of their messages that a client is shown
# crun rejects hosts whose v2 hierarchy has controllers beside those of v1, even with cgroups disabled. So it
# reads an empty cgroup.controllers, from a mount that is private or the host would read it too.
_HIDE = 'mount --make-private "$1" && mount --bind /dev/null "$1/cgroup.controllers" && shift && exec "$@"'


@dataclass(frozen=True, slots=True)
class Bundle:
    """A container's directory; see the head of this module."""

    id: str
    path: Path
    state: Path  # crun's, of all containers of the pod

    def file(self, number: int) -> Path:
        """Return the path of one of the plan's files."""
        return self.path / "files" / str(number)

    @property
    def exit_file(self) -> Path:
        """The file with the exit code."""
        return self.path / "exit" / self.id

    @property
    def started(self) -> Path:
        """The file that says that `crun start` may have run."""
        return self.path / "started"

    @property
    def execs(self) -> Path:
        """The directory of the directories of execs."""
        return self.path / "execs"

    def crun(self, *arguments: str) -> list[str]:
        """Return a command line of crun with this pod's state."""
        return [CRUN, f"--root={self.state}", "--cgroup-manager=disabled", *arguments]

    def exit_code(self) -> tuple[int, int] | None:
        """Return the exit code and when it was written, in ns; None while there is none."""
        try:
            text = self.exit_file.read_text().strip()
            return int(text), self.exit_file.stat().st_mtime_ns
        except (FileNotFoundError, ValueError):
            return None

    def errors(self) -> str:
        """Return the last line that conmon or crun wrote to stderr; empty: none."""
        with contextlib.suppress(OSError):
            lines = (self.path / "errors").read_bytes()[-_ERRORS_MAX:].decode(errors="replace").strip()
            return lines.splitlines()[-1] if lines else ""
        return ""


@dataclass(frozen=True, slots=True)
class ConmonOptions:
    """How conmon supervises a container."""

    log_path: str  # empty: no log
    tty: bool
    stdin: bool  # keep stdin open for clients that attach
    stdin_once: bool  # close it after the first
    cgroups: tuple[str, ...]  # directories that conmon joins
    layout: Layout


def command(bundle: Bundle, options: ConmonOptions) -> list[str]:
    """Return conmon's command line. Raises MissingProgram for crun."""
    argv = [CONMON, "--api-version", "1", "--sync", "--cid", bundle.id, "--cuuid", bundle.id]
    argv += ["--name", bundle.id, "--runtime", find_program(CRUN), "--bundle", str(bundle.path)]
    argv += ["--exit-dir", str(bundle.exit_file.parent), "--full-attach", "--container-pidfile"]
    argv += [str(bundle.path / "pid"), "--log-path", f"k8s-file:{options.log_path or '/dev/null'}"]
    for each in bundle.crun()[1:]:
        argv += ["--runtime-arg", each]
    if options.tty:
        argv.append("--terminal")
    if options.stdin:
        argv += ["--stdin", *([] if options.stdin_once else ["--leave-stdin-open"])]
    return [*_hide_controllers(options.layout), *argv]


def _hide_controllers(layout: Layout) -> list[str]:
    if not layout.hierarchies or not layout.unified:
        return []
    with contextlib.suppress(OSError):
        if Path(layout.unified, "cgroup.controllers").read_text().strip():
            shell = ["/bin/sh", "-c", _HIDE, "husk-hide", layout.unified]
            return ["unshare", "--mount", "--propagation", "unchanged", *shell]
    return []


def find_program(name: str) -> str:
    """Return the program's path. Raises MissingProgram."""
    for directory in process.ENVIRONMENT["PATH"].split(":"):
        if os.access(f"{directory}/{name}", os.X_OK):
            return f"{directory}/{name}"
    raise MissingProgram(name, f"apt-get install {name}")


class Starting:
    """A conmon that was started, and the pipe on which it reports the container's first process."""

    def __init__(self, supervisor: ProcessIdentity, report: int) -> None:
        self.supervisor = supervisor
        self._report = report

    async def created(self, bundle: Bundle) -> ProcessIdentity:
        """Return the container's first process, which waits for `crun start`.

        Call it once. Raises GuestError, DeadlineExceeded after 60 s.
        """
        try:
            async with asyncio.timeout(CREATE_TIMEOUT_S):
                line = await _read_line(self._report)
        except TimeoutError as error:
            raise DeadlineExceeded("making a container", CREATE_TIMEOUT_S) from error
        finally:
            os.close(self._report)
        try:
            report = json.loads(line)
            pid, text = int(report["data"]), str(report.get("message", ""))
        except (ValueError, KeyError, TypeError):
            pid, text = -1, bundle.errors() or "conmon ended without a report"
        found = process.identify(pid) if pid > 0 else None
        if found is None:
            raise GuestError(CRUN, 0, text.strip() or bundle.errors() or "the container could not be made")
        return found


async def start(bundle: Bundle, options: ConmonOptions) -> Starting:
    """Start conmon, which lets crun make the container. Raises MissingProgram, OSError."""
    argv = command(bundle, options)
    find_program(CONMON)
    report, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(theirs, True)
    errors = os.open(bundle.path / "errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        supervisor = await process.start(
            argv,
            cgroups=options.cgroups,
            pass_fds=(theirs,),
            stderr=errors,
            environment={"_OCI_SYNCPIPE": str(theirs)},
            umask=0o022,
            new_privs=True,
        )
    except BaseException:
        os.close(report)
        raise
    finally:
        os.close(theirs)
        os.close(errors)
    return Starting(supervisor, report)


async def _read_line(fd: int) -> bytes:
    """Read up to a newline or the end."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < _REPORT_MAX:
            await readable.wait()
            readable.clear()
            try:
                chunk = os.read(fd, _REPORT_MAX)
            except BlockingIOError:
                continue
            if not chunk:
                break
            data += chunk
    finally:
        loop.remove_reader(fd)
    return data


async def run_crun(bundle: Bundle, *arguments: str) -> None:
    """Run crun to its end. Raises GuestError with its stderr, DeadlineExceeded after 30 s."""
    done = await process.run(bundle.crun(*arguments), timeout_s=RUN_TIMEOUT_S)
    if done.status:
        text = done.stderr.decode(errors="replace").strip()
        raise GuestError(CRUN, 0, text[-_ERRORS_MAX:] or f"{arguments[0]} ended with {done.status}")


# ---------------------------------------------------------------------------------------- commands


def resize(bundle: Bundle, rows: int, columns: int) -> None:
    """Set the size of the container's terminal. Raises GuestError."""
    _send(bundle, f"1 {rows} {columns}\n")


def reopen_log(bundle: Bundle, supervisor: ProcessIdentity, path: Path) -> None:
    """Let conmon reopen the log at `path`, and wait until it writes there and not to the old file any more.

    Without effect while conmon still writes the file at `path`, which it would truncate. Blocking. Raises
    GuestError, DeadlineExceeded after 5 s.
    """
    deadline = time.monotonic() + REOPEN_TIMEOUT_S
    if _writes(supervisor.pid, path):
        return
    _send(bundle, "2 0 0\n")
    while not _writes(supervisor.pid, path):
        if time.monotonic() > deadline:
            raise DeadlineExceeded("reopening the log", REOPEN_TIMEOUT_S)
        time.sleep(_PAUSE_S)  # conmon does not notify


def _writes(pid: int, path: Path) -> bool:
    """Return whether the process has the file at this path open."""
    try:
        there = path.stat()
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found = Path(entry.path).stat()
                if (found.st_dev, found.st_ino) == (there.st_dev, there.st_ino):
                    return True
    except OSError:
        return False
    return False


def _send(bundle: Bundle, line: str) -> None:
    try:
        pipe = os.open(bundle.path / "ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(pipe, line.encode())
        finally:
            os.close(pipe)
    except OSError as error:
        raise GuestError("conmon", error.errno or 0, error.strerror or "does not accept commands") from error
