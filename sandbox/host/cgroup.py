"""Control groups of pods on the host: find the hierarchies, create, join and remove a pod's cgroup.

A pod's cgroup holds its VMM and helpers and nothing else; limits are the kubelet's, which sets them on the
parent that it names. Membership keeps the processes out of the daemon's service cgroup, so the service
manager does not kill them with the daemon. On cgroup v1 and in the hybrid layout a cgroup is a directory in
several hierarchies, the service manager's among them; on v2 in one.

Crash story: the path derives from the parent and the pod id. `create` is idempotent; `remove` kills what is
inside, and works when only some of the directories exist. The daemon's own root is created with the first pod
that needs it and removed with the last one; several daemons may share it.

    kubelet, cgroupfs driver:  /kubepods/burstable/podUID          used as it is
    kubelet, systemd driver:   kubepods-burstable-podUID.slice     each dash is a level
    neither:                   the daemon's own root, "/husk"
    a pooled VM:               "/husk-waiting", with the lowest CPU weight

What a pooled VM used before it was moved to its pod's cgroup stays accounted in the pool's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from sandbox.errors import DeadlineExceeded, InvalidSpec
from sandbox.host.process import find_by_cgroup

# The v1 hierarchies in which a pod gets a directory: those that account or limit it as a whole, and the
# service manager's. Device access and block weights of a VMM are inherited from the parent.
_V1_WANTED = frozenset({"cpu", "cpuacct", "cpuset", "memory", "pids", "hugetlb", "name=systemd"})
_V1_WHOLE = _V1_WANTED | {"blkio", "devices", "freezer", "net_cls", "net_prio", "perf_event", "rdma", "misc"}
_ATTEMPTS = 100
_FIELD = "config.linux.resources"


class Mode(StrEnum):
    """Which cgroup versions the host mounts; hybrid: v1 controllers, and v2 without controllers."""

    V1 = "v1"
    HYBRID = "hybrid"
    V2 = "v2"


class Driver(StrEnum):
    """The cgroup driver that RuntimeConfig recommends to the kubelet; both forms of parents are accepted."""

    SYSTEMD = "systemd"
    CGROUPFS = "cgroupfs"


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """Mount points of the hierarchies in use: `hierarchies` of v1, `unified` of v2 (empty without it)."""

    mode: Mode
    hierarchies: tuple[str, ...]
    unified: str = ""

    @property
    def roots(self) -> tuple[str, ...]:
        """All mount points, that of v2 last."""
        return (*self.hierarchies, self.unified) if self.unified else self.hierarchies


def parse_layout(mountinfo: str, *, whole: bool = False) -> Layout:
    """Parse /proc/PID/mountinfo (proc(5)): the first mount of each hierarchy. `whole` includes those that
    only a container without a VM needs (devices, freezer ...)."""
    hierarchies: dict[frozenset[str], str] = {}
    unified = ""
    for line in mountinfo.splitlines():
        left, separator, right = line.partition(" - ")
        if not separator:
            continue
        path = left.split()[4].replace("\\040", " ")
        kind, _, options = right.split(maxsplit=2)
        if kind == "cgroup2":
            unified = unified or path
        elif kind == "cgroup":
            wanted = frozenset(options.split(",")) & (_V1_WHOLE if whole else _V1_WANTED)
            if wanted:
                hierarchies.setdefault(wanted, path)
    mode = Mode.V2 if not hierarchies else Mode.HYBRID if unified else Mode.V1
    return Layout(mode=mode, hierarchies=tuple(sorted(hierarchies.values())), unified=unified)


def find_layout(*, whole: bool = False) -> Layout:
    """Read the layout of this host, see `parse_layout`. Raises OSError."""
    return parse_layout(Path("/proc/self/mountinfo").read_text(), whole=whole)


def find_driver(layout: Layout) -> Driver:
    """Return the driver to recommend: systemd where it is running on cgroup v2, whose tree it must own alone
    (Kubernetes documentation, "Container runtimes", cgroup drivers), else cgroupfs."""
    booted = Path("/run/systemd/system").is_dir()  # sd_booted(3)
    return Driver.SYSTEMD if booted and layout.mode is Mode.V2 else Driver.CGROUPFS


class Cgroups(msgspec.Struct, frozen=True, kw_only=True):
    """The cgroups of pods on this host; `root` is the parent of those for which the CRI names none."""

    layout: Layout
    root: str = "/husk"

    def create(self, pod_id: str, parent: str) -> None:
        """Create the pod's cgroup in every hierarchy. Idempotent. Blocking. Raises OSError, InvalidSpec."""
        create(self.layout, pod_path(parent, pod_id, root=self.root))

    @property
    def pool_parent(self) -> str:
        """The parent of pooled VMs and of those that templates are made of."""
        return f"{self.root}-waiting"

    def create_pooled(self, pod_id: str) -> None:
        """Create the cgroup of a pooled VM, or of one that becomes a template. Idempotent. Raises OSError."""
        self.create(pod_id, self.pool_parent)
        _set_lowest_share(directories(self.layout, self.pool_parent))

    def claim(self, pod_id: str, parent: str) -> None:
        """Move a pooled VM to the pod's cgroup, which is created. Idempotent. Raises OSError, InvalidSpec."""
        self.create(pod_id, parent)
        _move(self.directories(pod_id, self.pool_parent), self.directories(pod_id, parent))
        self._remove(pod_id, self.pool_parent)

    def limit(self, pod_id: str, memory_bytes: int, processes: int) -> None:
        """Limit what the host gives to the pod's cgroup in the daemon's own root, where no client limits the
        parent. Again with other limits, as its VM grows. Without a controller there is no limit. Blocking."""
        for root, directory in zip(self.layout.roots, self.directories(pod_id, ""), strict=True):
            if root == self.layout.unified:
                _enable(Path(root), Path(directory), ("memory", "pids"))
            for name, value in (
                ("memory.limit_in_bytes", memory_bytes),
                ("memory.max", memory_bytes),
                ("pids.max", processes),
            ):
                # EBUSY: it holds more already, which cannot be reclaimed
                with contextlib.suppress(OSError):
                    if Path(directory, name).exists():
                        Path(directory, name).write_text(str(value))

    def confine(self, pod_id: str, parent: str, cpus: Collection[int], mems: Collection[int]) -> None:
        """Let the pod's processes run on these CPUs alone and take memory from these nodes; none of either
        gives all that the cgroup above has. What the guest has already moves with it. Blocking.

        Raises InvalidSpec for CPUs or nodes that the cgroup above lacks, and where the host has no cpusets.
        """
        for root, directory in zip(self.layout.roots, self.directories(pod_id, parent), strict=True):
            if root == self.layout.unified and (cpus or mems):
                _enable(Path(root), Path(directory), ("cpuset",))
            if Path(directory, "cpuset.cpus").exists():
                _set_cpuset(Path(directory), {"cpuset.cpus": cpus, "cpuset.mems": mems})
                return
        if cpus or mems:
            raise InvalidSpec(f"{_FIELD}.cpuset_cpus", "this host has no controller for it", "nothing")

    def weigh(self, pod_id: str, *, shares: int, quota_us: int, period_us: int) -> None:
        """Set the CPU weight and quota of the pod's cgroup in the daemon's own root, as cgroup v1 gives them;
        0: none. Without a controller there is none. Blocking."""
        weight = 1 + (max(shares, 2) - 2) * 9999 // 262_142  # as runc and systemd convert it
        quota, period = quota_us or -1, period_us or 100_000
        for root, directory in zip(self.layout.roots, self.directories(pod_id, ""), strict=True):
            if root == self.layout.unified:
                _enable(Path(root), Path(directory), ("cpu",))
            for name, value in (
                ("cpu.shares", str(shares or 1024)),
                ("cpu.weight", str(weight if shares else 100)),
                ("cpu.cfs_quota_us", "-1"),  # the quota in force may be invalid with another period
                ("cpu.cfs_period_us", str(period)),
                ("cpu.cfs_quota_us", str(quota)),
                ("cpu.max", f"{quota_us or 'max'} {period}"),
            ):
                with contextlib.suppress(OSError):
                    if Path(directory, name).exists():
                        Path(directory, name).write_text(value)

    def set_oom_score(self, pod_id: str, parent: str, score: int) -> bool:
        """Set oom_score_adj (proc(5)) of the pod's processes; what they start inherits it. Blocking.

        Return whether it could be: without CAP_SYS_RESOURCE it is this process's at least.
        """
        able = True
        for pid in _processes(Path(self.directories(pod_id, parent)[-1])):
            file = Path(f"/proc/{pid}/oom_score_adj")
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                try:
                    file.write_text(str(score))
                except PermissionError:
                    able = False
                    file.write_text(Path("/proc/self/oom_score_adj").read_text())
        return able

    def remove(self, pod_id: str, parent: str) -> None:
        """Kill what is inside and remove it, also from the pool. Blocks up to 5 s. Idempotent.

        Raises as the function `remove` does.
        """
        self._remove(pod_id, parent)
        self._remove(pod_id, self.pool_parent)

    def remove_anywhere(self, pod_id: str) -> None:
        """Do as `remove` for a pod whose parent is not known: search every hierarchy for its cgroup."""
        name = f"husk-{pod_id}"
        for root in self.layout.roots:
            for folder, names, _ in os.walk(root):
                if name in names:
                    remove(self.layout, f"/{Path(folder, name).relative_to(root)}")
                    names.remove(name)
        self.remove(pod_id, "")

    def _remove(self, pod_id: str, parent: str) -> None:
        remove(self.layout, pod_path(parent, pod_id, root=self.root))
        if parent in ("", self.pool_parent):
            remove_empty(self.layout, parent or self.root)

    def directories(self, pod_id: str, parent: str) -> tuple[str, ...]:
        """Return the directories that a process of the pod has to join."""
        return directories(self.layout, pod_path(parent, pod_id, root=self.root))


def find_cgroups(root: str) -> Cgroups:
    """Return the cgroups of this host with `root` as the default parent. Raises OSError."""
    return Cgroups(layout=find_layout(), root=root)


def pod_path(parent: str, pod_id: str, *, root: str = "/husk") -> str:
    """Return the path of the pod's cgroup, relative to each hierarchy's mount point.

    Raises InvalidSpec for a parent that could leave the hierarchy, with a component "." or "..", or a NUL.
    """
    parent = parent or root
    if parent.endswith(".slice") and "/" not in parent:
        parent = expand_slice(parent)
    parts = [part for part in parent.split("/") if part]
    if ".." in parts or "." in parts or "\0" in parent:
        raise InvalidSpec(
            "cgroup_parent", f"{parent!r} is not a cgroup path: it has a component . or .., or a NUL"
        )
    return "/" + "/".join([*parts, f"husk-{pod_id}"])


def expand_slice(name: str) -> str:
    """Return the path of a slice: `a-b.slice` lies in `a.slice` (systemd.slice(5)). Raises InvalidSpec."""
    stem = name.removesuffix(".slice")
    if stem == "-":
        return "/"
    words = stem.split("-")
    if not all(words):
        raise InvalidSpec("cgroup_parent", f"{name!r} is not a slice name")
    return "/" + "/".join("-".join(words[: n + 1]) + ".slice" for n in range(len(words)))


def directories(layout: Layout, path: str) -> tuple[str, ...]:
    """Return the directory of a cgroup in every hierarchy, in the order of `layout.roots`."""
    return tuple(root.rstrip("/") + path for root in layout.roots)


def create(layout: Layout, path: str) -> None:
    """Create a cgroup and its missing parents in every hierarchy. Idempotent. Raises OSError.

    No controller is enabled on v2: limits are set on the parent, and its accounting includes the pod.
    """
    for root, directory in zip(layout.roots, directories(layout, path), strict=True):
        _make_with_retries(Path(root), Path(directory))


def _make_with_retries(root: Path, directory: Path) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            _make_below(root, directory)
        except OSError as error:
            # the removal of the last other pod has just removed the empty parent: missing, or gone while open
            if error.errno not in (errno.ENOENT, errno.ENODEV) or attempt + 1 == _ATTEMPTS:
                raise
        else:
            return


def _make_below(root: Path, directory: Path) -> None:
    current = root
    for part in directory.relative_to(root).parts:
        current /= part
        with contextlib.suppress(FileExistsError):
            current.mkdir(0o755)
        _fill_cpuset(current)


def _enable(root: Path, directory: Path, controllers: Sequence[str]) -> None:
    """Enable controllers of v2 on the way down to a cgroup, as far as each cgroup has them."""
    current = root
    for part in directory.relative_to(root).parts:
        for name in controllers:
            with contextlib.suppress(OSError):
                (current / "cgroup.subtree_control").write_text(f"+{name}")
        current /= part


def _set_lowest_share(directories: Sequence[str]) -> None:
    """Set the lowest share of the CPUs (cpu.shares of v1, cpu.weight of cgroup-v2.rst). Where the controller
    is not enabled, pooled VMs compete as equals."""
    for directory in directories:
        for name, least in (("cpu.shares", "2"), ("cpu.weight", "1")):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                Path(directory, name).write_text(least)


def _move(sources: Sequence[str], targets: Sequence[str]) -> None:
    """Move all processes, hierarchy by hierarchy. The next read finds one that was forked meanwhile."""
    for source, target in zip(sources, targets, strict=True):
        while pids := _processes(Path(source)):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    Path(target, "cgroup.procs").write_text(pid)


def _processes(directory: Path) -> list[str]:
    try:
        return (directory / "cgroup.procs").read_text().split()
    except FileNotFoundError:
        return []


def _fill_cpuset(directory: Path) -> None:
    """Copy the parent's CPUs and nodes: a new v1 cpuset has none, and no process can join it (cpuset(7))."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        file = directory / name
        if (directory / "cgroup.controllers").exists() or not file.exists():
            return
        if not file.read_text().strip():
            file.write_text((directory.parent / name).read_text())


def _set_cpuset(directory: Path, wanted: Mapping[str, Collection[int]]) -> None:
    """Write the files of a cpuset, after all were compared with what the cgroup above has: v2 would accept
    any, and use what it can."""
    unified = (directory / "cgroup.controllers").exists()
    values: dict[str, str] = {}
    for name, numbers in wanted.items():
        above = (directory.parent / (f"{name}.effective" if unified else name)).read_text().strip()
        if missing := sorted(set(numbers) - set(_numbers(above))):
            field = f"{_FIELD}.{name.replace('.', '_')}"
            raise InvalidSpec(field, f"there is no {missing[0]} for the pod", f"some of {above}")
        # none is "all that is above" on v2, and may be written on neither while there are processes (ENOSPC)
        if numbers or (directory / name).read_text().strip():
            values[name] = ",".join(map(str, sorted(numbers))) or above
    if not unified:
        (directory / "cpuset.memory_migrate").write_text("1")  # v2 always does
    for name, value in values.items():
        (directory / name).write_text(value)


def _numbers(text: str) -> Iterator[int]:
    """Yield the numbers of a kernel's list such as "0-3,7" (cpuset(7), "List format")."""
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def remove(layout: Layout, path: str, *, timeout_s: float = 5.0) -> None:
    """Kill what is in a cgroup and remove it with all below it. Blocks up to `timeout_s`. Idempotent.

    Parents stay: most are the kubelet's. Raises DeadlineExceeded when a process does not exit in time, and
    OSError when the kernel refuses for another reason.
    """
    deadline = time.monotonic() + timeout_s
    tops = [d for d in directories(layout, path) if Path(d).exists()]
    pending = [d for top in tops for d in tree(top)]
    pause = 0.001
    while pending:
        for identity in find_by_cgroup(pending):
            with contextlib.suppress(ProcessLookupError):
                os.kill(identity.pid, signal.SIGKILL)
        pending = [d for d in pending if not _removed(Path(d))]
        if pending and time.monotonic() > deadline:
            raise DeadlineExceeded(f"removing cgroup {pending[0]}", timeout_s)
        if pending:
            time.sleep(pause)  # v1 has no notification of the last exit
            pause = min(pause * 2, 0.05)


def tree(top: str) -> list[str]:
    """List a cgroup's directory and all below it, children before parents; empty when it does not exist."""
    return [folder for folder, _, _ in os.walk(top, topdown=False)]


def remove_empty(layout: Layout, path: str) -> None:
    """Remove a cgroup from every hierarchy in which it is empty; one in use stays (EBUSY), as do parents."""
    for directory in directories(layout, path):
        with contextlib.suppress(OSError):
            Path(directory).rmdir()


def _removed(directory: Path) -> bool:
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.EBUSY:  # zombies and dying memory cgroups keep it for a moment
            raise
        return False
    return True
