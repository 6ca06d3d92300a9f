"""The cgroups of pods without a VM: limits, devices, accounting, and killing what runs in them.

Limits and accounting have the names of cgroup v2, as in a VM; where a controller is mounted as v1, its
files are translated here (Documentation/admin-guide/cgroup-v1). All functions block; a path is the same in
every hierarchy.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sandbox.errors import DeadlineExceeded, GuestError, InvalidContainerConfig, InvalidSpec
from sandbox.host import bpf, cgroup
from sandbox.host.cgroup import Layout
from sandbox.host.proc import read_stat
from sandbox.host.process import identify
from sandbox.plan.device_filter import MKNOD, READ, WRITE, Rule, Type
from sandbox.plan.values import CgroupFile
from sandbox.spec import Resources
from sandbox.usage import ProcessCount

_KILL_S = 10.0
_LIMITING = frozenset({"cpu", "cpuset", "hugetlb", "io", "memory", "pids"})  # controllers of v2
_MANY = 1 << 62  # v1 expresses "no limit" as the largest multiple of a page


def make(layout: Layout, path: str) -> None:
    """Create a cgroup, and enable the controllers that v2 needs for its limits in all cgroups above it."""
    cgroup.create(layout, path)
    if not layout.unified:
        return
    current = Path(layout.unified)
    for part in Path(path.lstrip("/")).parts:
        with contextlib.suppress(OSError):
            for controller in _LIMITING.intersection((current / "cgroup.controllers").read_text().split()):
                with contextlib.suppress(OSError):  # it has processes: none can be enabled beneath it
                    (current / "cgroup.subtree_control").write_text(f"+{controller}")
        current /= part


def join(layout: Layout, path: str, pid: int) -> None:
    """Move a process to the cgroup. Raises OSError."""
    for directory in cgroup.directories(layout, path):
        Path(directory, "cgroup.procs").write_text(str(pid))


# --------------------------------------------------------------------------------------- processes


def pids(layout: Layout, path: str) -> list[int]:
    """Return the processes in the cgroup and beneath it."""
    found: set[int] = set()
    for top in cgroup.directories(layout, path):
        for directory in cgroup.tree(top):
            with contextlib.suppress(OSError):
                found.update(map(int, Path(directory, "cgroup.procs").read_text().split()))
    return sorted(found)


def kill(layout: Layout, path: str, choose: Callable[[list[int]], list[int]] = lambda all: all) -> None:
    """Send SIGKILL to the chosen processes, by default all, until none is left.

    Raises DeadlineExceeded after 10 s.
    """
    deadline = time.monotonic() + _KILL_S
    pause = 0.001
    while living := [pid for pid in choose(pids(layout, path)) if identify(pid)]:
        for pid in living:
            send(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"killing process {living[0]}", _KILL_S)
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def send(pid: int, number: int) -> None:
    """Send a signal; a process that has ended is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def started_by(*leaders: int) -> Callable[[list[int]], list[int]]:
    """Return a choice for `kill`: the leaders, their sessions and their descendants."""

    def choose(all: list[int]) -> list[int]:
        facts = {pid: fact for pid in all if (fact := _parent_and_session(pid))}
        chosen = {pid for pid, (_, session) in facts.items() if session in leaders or pid in leaders}
        while more := {pid for pid, (parent, _) in facts.items() if parent in chosen} - chosen:
            chosen |= more
        return sorted(chosen)

    return choose


def _parent_and_session(pid: int) -> tuple[int, int] | None:
    stat = read_stat(pid)
    return (stat.parent, stat.session) if stat else None


# ----------------------------------------------------------------------------------------- devices


def allow_devices(layout: Layout, path: str, rules: Sequence[Rule], program: bytes) -> None:
    """Allow the devices of `rules` alone, where devices are a controller of v1; else attach `program`.

    Raises OSError.
    """
    for directory in map(Path, cgroup.directories(layout, path)):
        if (directory / "devices.deny").exists():
            (directory / "devices.deny").write_text("a")
            for rule in rules:
                (directory / "devices.allow").write_text(_line(rule))
            return
    bpf.attach_device_filter(Path(layout.unified.rstrip("/") + path), program)


def _line(rule: Rule) -> str:
    kind = "b" if rule.type is Type.BLOCK else "c"
    major, minor = ("*" if each is None else each for each in (rule.major, rule.minor))
    access = "".join(letter for letter, bit in (("r", READ), ("w", WRITE), ("m", MKNOD)) if rule.access & bit)
    return f"{kind} {major}:{minor} {access}"


# ------------------------------------------------------------------------------------------ limits


def write_limits(layout: Layout, path: str, files: Sequence[CgroupFile], resources: Resources) -> None:
    """Write limits: `files`, as compiled for a VM, on v2 and `resources` on v1.

    Raises InvalidSpec for what v1 cannot express, GuestError.
    """
    directories = [Path(each) for each in cgroup.directories(layout, path)]
    if not layout.hierarchies:
        for file in files:
            path_of_file = Path(directories[0], file.name)
            if path_of_file.exists() or not file.name.startswith(_OPTIONAL):
                _write(path_of_file, file.value)
        return
    for name in resources.unified:
        field = f"config.linux.resources.unified[{name!r}]"
        raise InvalidSpec(field, "this node's controllers are those of cgroup v1", "an empty map")
    for name, value in _v1_limits(resources):
        found = next((each / name for each in directories if (each / name).exists()), None)
        if found is not None:
            _write(found, value)
        elif not name.startswith(_OPTIONAL):
            raise GuestError(f"write {name}", errno.ENOENT, "the host has no such controller")


# Files that may be missing: a kernel without swap accounting or huge pages has nothing to limit.
_OPTIONAL = ("memory.memsw.", "memory.swap.", "hugetlb.")


def _write(file: Path, value: str) -> None:
    try:
        file.write_text(value)
    except OSError as error:
        raise InvalidContainerConfig(
            f"write {file.name}", error.errno or 0, f"{value!r}: {error.strerror}"
        ) from error


def _v1_limits(resources: Resources) -> Iterator[tuple[str, str]]:
    """Yield files and values in an order in which limits may rise or fall.

    The limit of memory must never exceed that of memory and swap.
    """
    if resources.cpu_shares:
        yield "cpu.shares", str(resources.cpu_shares)
    if resources.cpu_quota:
        yield "cpu.cfs_quota_us", "-1"  # the quota in force may be invalid with another period
        yield "cpu.cfs_period_us", str(resources.cpu_period or 100_000)
        yield "cpu.cfs_quota_us", str(resources.cpu_quota)
    elif resources.cpu_period:
        yield "cpu.cfs_period_us", str(resources.cpu_period)
    if resources.memory_limit:
        yield "memory.memsw.limit_in_bytes", "-1"
        yield "memory.limit_in_bytes", str(resources.memory_limit)
        if resources.memory_swap_limit:
            yield "memory.memsw.limit_in_bytes", str(resources.memory_swap_limit)
    if resources.cpuset_cpus:
        yield "cpuset.cpus", resources.cpuset_cpus
    if resources.cpuset_mems:
        yield "cpuset.mems", resources.cpuset_mems
    for size, limit in resources.hugepage_limits.items():
        if limit > 0:
            yield f"hugetlb.{size}.limit_in_bytes", str(limit)


def set_oom_score(layout: Layout, path: str, score: int) -> None:
    """Set oom_score_adj of the processes that run now; their children inherit it."""
    for pid in pids(layout, path):
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/oom_score_adj").write_text(str(score))


# ---------------------------------------------------------------------------------------- readings


def read(layout: Layout, path: str, name: str) -> bytes:
    """Return a file of cgroup v2, made of v1's files where the controller is v1's; b"": there is none."""
    files = _Files(cgroup.directories(layout, path))
    own = files.read(name) if not layout.hierarchies or name.startswith(("pids.", "cpuset.")) else b""
    translate = _V1.get(name)
    return own if own or translate is None or not layout.hierarchies else translate(files)


def oom_kills(layout: Layout, path: str) -> int:
    """Return the number of OOM kills in the cgroup so far."""
    return _keyed(read(layout, path, "memory.events")).get("oom_kill", 0)


def process_count(layout: Layout, path: str, *, files: bool) -> ProcessCount:
    """Count the processes and, with `files`, their open descriptors."""
    all = pids(layout, path)
    if not files:
        return ProcessCount(processes=len(all))
    links = [link for pid in all for link in _descriptors(pid)]
    sockets = sum(link.startswith("socket:") for link in links)
    return ProcessCount(processes=len(all), files=len(links), sockets=sockets)


def _descriptors(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield str(Path(entry.path).readlink())


class _Files:
    """Files of cgroup v1, searched for in each hierarchy."""

    def __init__(self, directories: Sequence[str]) -> None:
        self._directories = directories

    def read(self, name: str) -> bytes:
        for directory in self._directories:
            with contextlib.suppress(OSError):
                return Path(directory, name).read_bytes()
        return b""

    def number(self, name: str) -> int:
        text = self.read(name).strip()
        return int(text) if text.isdigit() else 0

    def keyed(self, name: str) -> dict[str, int]:
        return _keyed(self.read(name))


def _keyed(text: bytes) -> dict[str, int]:
    pairs = (line.split() for line in text.decode(errors="replace").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _lines(values: dict[str, int]) -> bytes:
    return "".join(f"{name} {value}\n" for name, value in values.items()).encode()


def _limit(value: int) -> bytes:
    return b"max\n" if value >= _MANY else f"{value}\n".encode()


def _cpu_stat(files: _Files) -> bytes:
    stat = files.keyed("cpu.stat")
    return _lines(
        {
            "usage_usec": files.number("cpuacct.usage") // 1000,
            "user_usec": files.number("cpuacct.usage_user") // 1000,
            "system_usec": files.number("cpuacct.usage_sys") // 1000,
            "nr_periods": stat.get("nr_periods", 0),
            "nr_throttled": stat.get("nr_throttled", 0),
            "throttled_usec": stat.get("throttled_time", 0) // 1000,
        }
    )


def _memory_stat(files: _Files) -> bytes:
    stat = files.keyed("memory.stat")
    names = {
        "anon": "total_rss",
        "file": "total_cache",
        "file_mapped": "total_mapped_file",
        "inactive_file": "total_inactive_file",
        "pgfault": "total_pgfault",
        "pgmajfault": "total_pgmajfault",
    }
    kernel = {"kernel": files.number("memory.kmem.usage_in_bytes")}
    return _lines({new: stat.get(old, 0) for new, old in names.items()} | kernel)


def _memory_events(files: _Files) -> bytes:
    kills = files.keyed("memory.oom_control").get("oom_kill", 0)
    return _lines({"max": files.number("memory.failcnt"), "oom_kill": kills})


def _swap_max(files: _Files) -> bytes:
    both = files.read("memory.memsw.limit_in_bytes").strip()
    if not both.isdigit():
        return b""
    return _limit(int(both) if int(both) >= _MANY else int(both) - files.number("memory.limit_in_bytes"))


def _io_stat(files: _Files) -> bytes:
    """Turn lines such as "8:0 Read 4096" into "8:0 rbytes=4096"."""
    names = {"Read": "r", "Write": "w"}
    found: dict[str, list[str]] = {}
    for file, unit in (("service_bytes", "bytes"), ("serviced", "ios")):
        text = files.read(f"blkio.throttle.io_{file}_recursive").decode(errors="replace")
        for fields in map(str.split, text.splitlines()):
            if len(fields) == 3 and fields[1] in names:
                found.setdefault(fields[0], []).append(f"{names[fields[1]]}{unit}={fields[2]}")
    return "".join(f"{device} {' '.join(values)}\n" for device, values in found.items()).encode()


_V1: dict[str, Callable[[_Files], bytes]] = {
    "cpu.stat": _cpu_stat,
    "memory.current": lambda files: files.read("memory.usage_in_bytes"),
    "memory.stat": _memory_stat,
    "memory.max": lambda files: _limit(files.number("memory.limit_in_bytes")),
    "memory.peak": lambda files: files.read("memory.max_usage_in_bytes"),
    "memory.events": _memory_events,
    "memory.swap.current": lambda files: str(files.keyed("memory.stat").get("total_swap", 0)).encode(),
    "memory.swap.max": _swap_max,
    "io.stat": _io_stat,
    "hugetlb.2MB.current": lambda files: files.read("hugetlb.2MB.usage_in_bytes"),
    "hugetlb.1GB.current": lambda files: files.read("hugetlb.1GB.usage_in_bytes"),
}
