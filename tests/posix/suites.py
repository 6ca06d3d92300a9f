"""The suites that others wrote, as cases: what runs in a container, and what its output says.

pjdfstest: the meaning of each system call, with its errors and rights. fsx: random reads, writes, mappings
and truncations of one file, each compared with what was written. fio: files written by several interfaces and
read back with checksums. stress-ng: two processes at a time that use one interface as fast as they can, with
its results verified.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tests.kit.cri import Cri, ExecResult

TOOLS = "/tools"
MESSAGE_LIMIT = 300


class State(StrEnum):
    """The result of a case."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Result:
    """The state of a case, and the tool's message for one that did not pass."""

    state: State
    why: str = ""


Results = Mapping[str, Result]


def tool(name: str, *arguments: str) -> list[str]:
    """Return the argv of a tool, which brings its loader and libraries."""
    loader = f"{TOOLS}/lib/ld-linux-x86-64.so.2"
    return [loader, "--library-path", f"{TOOLS}/lib", f"{TOOLS}/bin/{name}", *arguments]


@dataclass(frozen=True)
class Place:
    """A directory of a container in which suites run, /NAME."""

    cri: Cri
    container: str
    name: str

    def run(self, *argv: str, timeout_s: int) -> ExecResult:
        """Run a program there; one that takes too long is killed and has failed."""
        script = f"cd /{self.name} && exec timeout -s KILL {timeout_s} {shlex.join(argv)}"
        answer = self.cri.call(
            "ExecSync", container_id=self.container, cmd=["sh", "-c", script], timeout_s=timeout_s + 30
        )
        output, errors = (text.decode(errors="replace") for text in (answer.stdout, answer.stderr))
        return ExecResult(answer.exit_code, output, errors)

    def write(self, name: str, text: str) -> None:
        """Write a file outside of the directory under test."""
        done = self.cri.exec(self.container, "sh", "-c", f"cat >/tmp/{name} <<'END'\n{text}\nEND")
        assert done.code == 0, done


# ---------------------------------------------------------------------------------- pjdfstest

PJDFSTEST = """
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.02
[dummy_auth]
entries = [["nobody", "nogroup"], ["worker", "worker"]]
"""
CASE = re.compile(r"^(\S+)\s+(ok|FAILED|skipped)$")
STATES = {"ok": State.PASSED, "FAILED": State.FAILED, "skipped": State.SKIPPED}


def pjdfstest(place: Place) -> Results:
    """Run all cases."""
    place.write("pjdfstest.toml", PJDFSTEST)
    argv = ["env", "NO_COLOR=1", *tool("pjdfstest", "-c", "/tmp/pjdfstest.toml", "-s", "/dev/shm")]
    done = place.run(*argv, timeout_s=900)
    found = dict(parse_pjdfstest(done.stdout))
    assert "Summary:" in done.stdout, done
    return found


def parse_pjdfstest(text: str) -> Iterator[tuple[str, Result]]:
    """Yield each case and its result. The lines after a case that begin with a tab are its message."""
    name, state, why = "", State.PASSED, [""]
    for line in [*text.splitlines(), "end ok"]:
        if match := CASE.match(line):
            if name:
                yield f"pjdfstest {name}", Result(state, " ".join(why).strip()[:MESSAGE_LIMIT])
            name, state, why = match[1], STATES[match[2]], []
        elif line.startswith("\t"):
            why.append(line.strip())


# ---------------------------------------------------------------------------------------- fsx

FSX = """
[weights]
close_open = 2
read = 10
write = 10
mapread = 10
mapwrite = 10
invalidate = 1
truncate = 5
fsync = 1
fdatasync = 1
sendfile = 3
posix_fadvise = 1
"""
FSX_KINDS = {
    "plain": "",
    "fallocate": "posix_fallocate = 5",
    "punch": "punch_hole = 5",
    "copy": "copy_file_range = 5",
}


def fsx(place: Place, operations: int) -> Results:
    """Run so many random operations of each kind, the same ones every time."""
    found = {}
    for seed, (kind, weights) in enumerate(FSX_KINDS.items(), 1):
        place.write("fsx.toml", FSX + weights)
        argv = tool("fsx", "-f", "/tmp/fsx.toml", "-N", str(operations), "-S", str(seed), "-P", "/tmp")
        done = place.run(*argv, f"fsx-{kind}", timeout_s=300)
        found[f"fsx {kind}"] = by_exit_code(done)
    return found


def by_exit_code(done: ExecResult) -> Result:
    """Return the result of a tool that exits with 0 where all is well."""
    text = " ".join((done.stderr + done.stdout).split())[-MESSAGE_LIMIT:]
    return Result(State.PASSED) if done.code == 0 else Result(State.FAILED, f"exit {done.code}: {text}")


# ---------------------------------------------------------------------------------------- fio

FIO = {
    "psync": "--ioengine=psync --rw=randrw",
    "pvsync": "--ioengine=pvsync --rw=randwrite",
    "mmap": "--ioengine=mmap --rw=randrw",
    "libaio-direct": "--ioengine=libaio --iodepth=8 --direct=1 --rw=randwrite",
    "io_uring": "--ioengine=io_uring --iodepth=8 --rw=randwrite",
    "splice": "--ioengine=splice --rw=write",
    "two-jobs": "--ioengine=psync --rw=randwrite --numjobs=2 --fsync=16",
}


def fio(place: Place, mebibytes: int, names: Iterable[str] = FIO) -> Results:
    """Write files of this size by each interface, and verify the checksums of all that was written."""
    found = {}
    for name in names:
        common = f"--name={name} --size={mebibytes}M --bs=16k --verify=crc32c --do_verify=1 --verify_fatal=1"
        argv = tool("fio", *f"{common} --output-format=terse --thread=0 {FIO[name]}".split())
        found[f"fio {name}"] = by_exit_code(place.run(*argv, timeout_s=120))
    return found


# ---------------------------------------------------------------------------------- stress-ng

STRESSORS = (
    "access",
    "chdir",
    "chmod",
    "chown",
    "copy-file",
    "dentry",
    "dir",
    "dirdeep",
    "dirmany",
    "dnotify",
    "dup",
    "fallocate",
    "fanotify",
    "fcntl",
    "fiemap",
    "file-ioctl",
    "filename",
    "flock",
    "fpunch",
    "fstat",
    "getdent",
    "handle",
    "hdd",
    "inotify",
    "io",
    "iomix",
    "lease",
    "link",
    "locka",
    "lockf",
    "lockofd",
    "mknod",
    "mmap",
    "msync",
    "open",
    "readahead",
    "rename",
    "seek",
    "sendfile",
    "splice",
    "symlink",
    "sync-file",
    "touch",
    "utime",
    "xattr",
)
SKIPPED = 3  # exit statuses of stress-ng(1): no resources, or not implemented
NOT_IMPLEMENTED = 4


# what a small VM has memory for
BOUNDS = "--verify --temp-path . " + " ".join(
    f"--{each}-bytes 16M" for each in ("hdd", "iomix", "fallocate", "mmap", "msync")
)


def stress_ng(place: Place, seconds: int, stressors: Sequence[str] = STRESSORS) -> Results:
    """Run each stressor for some seconds, with two processes."""
    found = {}
    for name in stressors:
        argv = tool("stress-ng", f"--{name}", "2", "-t", str(seconds), *BOUNDS.split())
        done = place.run(*argv, timeout_s=seconds + 60)
        found[f"stress-ng {name}"] = (
            Result(State.SKIPPED) if done.code in (SKIPPED, NOT_IMPLEMENTED) else by_exit_code(done)
        )
    return found
