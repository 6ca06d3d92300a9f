"""conmon, which holds a container, and crun, which makes it: their commands and files.

    RUN/containers/ID/
        config.json     what crun is to make
        files/N         the plan's small files
        started         made before crun is told to start what it has made
        exit/ID         by conmon: the exit code, once the container has ended and its log is written
        attach          by conmon: a socket, see `sessions`
        ctl             by conmon: a pipe for orders, lines of numbers (conmon's src/ctrl.c)
        errors          what conmon and crun had to say
        execs/N/        see `sessions`

conmon is started in the container's cgroup, so that crun finds itself there and the container's view of
cgroups begins there; it moves on to the supervisors' before the container's program runs.
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
REOPEN_TIMEOUT_S = 5.0
_PAUSE_S = 0.005
_ANSWER_MAX = 64 << 10
_ERRORS_MAX = 2048  # of what they say, told to a client
# crun refuses hosts whose v2 hierarchy has controllers beside v1, though it is to touch neither: let it
# read that there are none. Private there, or the host would read it too.
_HIDE = 'mount --make-private "$1" && mount --bind /dev/null "$1/cgroup.controllers" && shift && exec "$@"'


@dataclass(frozen=True, slots=True)
class Bundle:
    """A container's directory."""

    id: str
    path: Path
    state: Path  # crun's, of all containers of the pod

    @property
    def exit_file(self) -> Path:
        return self.path / "exit" / self.id

    @property
    def started(self) -> Path:
        return self.path / "started"

    @property
    def execs(self) -> Path:
        return self.path / "execs"

    def crun(self, *arguments: str) -> list[str]:
        return [CRUN, f"--root={self.state}", "--cgroup-manager=disabled", *arguments]

    def exit_code(self) -> tuple[int, int] | None:
        """It, and when it was written; None while there is none."""
        try:
            text = self.exit_file.read_text().strip()
            return int(text), self.exit_file.stat().st_mtime_ns
        except (FileNotFoundError, ValueError):
            return None

    def errors(self) -> str:
        with contextlib.suppress(OSError):
            lines = (self.path / "errors").read_bytes()[-_ERRORS_MAX:].decode(errors="replace").strip()
            return lines.splitlines()[-1] if lines else ""
        return ""


@dataclass(frozen=True, slots=True)
class ConmonOptions:
    """How conmon is to hold a container."""

    log_path: str  # empty: no log
    tty: bool
    stdin: bool
    stdin_once: bool
    cgroups: tuple[str, ...]
    layout: Layout


def command(bundle: Bundle, wish: ConmonOptions) -> list[str]:
    argv = [CONMON, "--api-version", "1", "--sync", "--cid", bundle.id, "--cuuid", bundle.id]
    argv += ["--name", bundle.id, "--runtime", find_program(CRUN), "--bundle", str(bundle.path)]
    argv += ["--exit-dir", str(bundle.exit_file.parent), "--full-attach", "--container-pidfile"]
    argv += [str(bundle.path / "pid"), "--log-path", f"k8s-file:{wish.log_path or '/dev/null'}"]
    for each in bundle.crun()[1:]:
        argv += ["--runtime-arg", each]
    if wish.tty:
        argv.append("--terminal")
    if wish.stdin:
        argv += ["--stdin", *([] if wish.stdin_once else ["--leave-stdin-open"])]
    return [*_hide_controllers(wish.layout), *argv]


def _hide_controllers(layout: Layout) -> list[str]:
    if not layout.hierarchies or not layout.unified:
        return []
    with contextlib.suppress(OSError):
        if Path(layout.unified, "cgroup.controllers").read_text().strip():
            shell = ["/bin/sh", "-c", _HIDE, "husk-hide", layout.unified]
            return ["unshare", "--mount", "--propagation", "unchanged", *shell]
    return []


def find_program(name: str) -> str:
    """Raises MissingProgram."""
    for directory in process.ENVIRONMENT["PATH"].split(":"):
        if os.access(f"{directory}/{name}", os.X_OK):
            return f"{directory}/{name}"
    raise MissingProgram(name, f"apt-get install {name}")


class Starting:
    """conmon, and the answer that it will give."""

    def __init__(self, supervisor: ProcessIdentity, answer: int) -> None:
        self.supervisor = supervisor
        self._answer = answer

    async def created(self, bundle: Bundle) -> ProcessIdentity:
        """The container's first process, which waits. Raises GuestError, DeadlineExceeded."""
        try:
            async with asyncio.timeout(CREATE_TIMEOUT_S):
                line = await _read_line(self._answer)
        except TimeoutError as error:
            raise DeadlineExceeded("making a container", CREATE_TIMEOUT_S) from error
        finally:
            os.close(self._answer)
        try:
            told = json.loads(line)
            pid, text = int(told["data"]), str(told.get("message", ""))
        except (ValueError, KeyError, TypeError):
            pid, text = -1, bundle.errors() or "conmon ended without a word"
        found = process.identify(pid) if pid > 0 else None
        if found is None:
            raise GuestError(CRUN, 0, text.strip() or bundle.errors() or "the container could not be made")
        return found


async def start(bundle: Bundle, wish: ConmonOptions) -> Starting:
    """conmon runs, and makes the container. Raises MissingProgram, OSError."""
    argv = command(bundle, wish)
    find_program(CONMON)
    answer, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(theirs, True)
    errors = os.open(bundle.path / "errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        supervisor = await process.start(
            argv,
            cgroups=wish.cgroups,
            pass_fds=(theirs,),
            stderr=errors,
            environment={"_OCI_SYNCPIPE": str(theirs)},
            umask=0o022,
            new_privs=True,
        )
    except BaseException:
        os.close(answer)
        raise
    finally:
        os.close(theirs)
        os.close(errors)
    return Starting(supervisor, answer)


async def _read_line(fd: int) -> bytes:
    """Up to a newline or the end."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < _ANSWER_MAX:
            await readable.wait()
            readable.clear()
            try:
                chunk = os.read(fd, _ANSWER_MAX)
            except BlockingIOError:
                continue
            if not chunk:
                break
            data += chunk
    finally:
        loop.remove_reader(fd)
    return data


async def run_crun(bundle: Bundle, *arguments: str) -> None:
    """Raises GuestError with what it said, DeadlineExceeded."""
    done = await process.run(bundle.crun(*arguments), timeout_s=RUN_TIMEOUT_S)
    if done.status:
        text = done.stderr.decode(errors="replace").strip()
        raise GuestError(CRUN, 0, text[-_ERRORS_MAX:] or f"{arguments[0]} ended with {done.status}")


# ------------------------------------------------------------------------------------------ orders


def resize(bundle: Bundle, rows: int, columns: int) -> None:
    """Raises GuestError."""
    _order(bundle, f"1 {rows} {columns}\n")


def reopen_log(bundle: Bundle, supervisor: ProcessIdentity, path: Path) -> None:
    """Afterwards a file exists at the path and the old one grows no more; blocks until then. Raises
    GuestError, DeadlineExceeded.

    conmon would put a new file over one that it still writes, so it is asked only once that has gone.
    """
    deadline = time.monotonic() + REOPEN_TIMEOUT_S
    if _writes(supervisor.pid, path):
        return
    _order(bundle, "2 0 0\n")
    while not _writes(supervisor.pid, path):
        if time.monotonic() > deadline:
            raise DeadlineExceeded("reopening the log", REOPEN_TIMEOUT_S)
        time.sleep(_PAUSE_S)  # it gives no notice


def _writes(pid: int, path: Path) -> bool:
    """Whether the process has the file at this path open."""
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


def _order(bundle: Bundle, line: str) -> None:
    try:
        pipe = os.open(bundle.path / "ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(pipe, line.encode())
        finally:
            os.close(pipe)
    except OSError as error:
        raise GuestError("conmon", error.errno or 0, error.strerror or "takes no orders") from error
