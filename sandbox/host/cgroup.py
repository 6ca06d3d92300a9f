"""Control groups of pods on the host: where they are, making, joining and removing them.

A pod's cgroup holds its VMM and helpers and nothing else; limits are the kubelet's, which sets
them on the parent that it names. Being in it keeps the processes out of the daemon's own service
group, so nobody ends them with the daemon. On cgroup v1 and in the hybrid layout that takes a
directory in several hierarchies, the service manager's among them; on v2 one.

Crash story: the path derives from the parent and the pod id. `create` may be repeated, `remove`
ends whatever is inside, and works when only some of the directories exist. The daemon's own root
is made with the first pod that needs it and goes with the last one; daemons may share it.

    kubelet, cgroupfs driver:  /kubepods/burstable/podUID          taken as it is
    kubelet, systemd driver:   kubepods-burstable-podUID.slice     each dash is a level
    neither:                   the daemon's own root, "/husk"
    a VM that waits for a pod: "/husk-waiting", which gets what CPU time nobody else wants

What a VM has used before it is moved to its pod's cgroup stays accounted where it waited.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from sandbox.errors import DeadlineExceeded, InvalidSpec
from sandbox.host.process import find_by_cgroup

# Hierarchies of v1 worth a directory: what accounts or limits a pod as a whole, and the service
# manager's own. Device access and block weights of a VMM are inherited from the parent.
_V1_WANTED = frozenset({"cpu", "cpuacct", "cpuset", "memory", "pids", "hugetlb", "name=systemd"})
_V1_WHOLE = _V1_WANTED | {"blkio", "devices", "freezer", "net_cls", "net_prio", "perf_event", "rdma", "misc"}
_ATTEMPTS = 100


class Mode(StrEnum):
    V1 = "v1"
    HYBRID = "hybrid"
    V2 = "v2"


class Driver(StrEnum):
    """What RuntimeConfig tells the kubelet; both forms of parent names are served anyway."""

    SYSTEMD = "systemd"
    CGROUPFS = "cgroupfs"


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """Mount points of the hierarchies that matter here. `unified` is empty without cgroup v2."""

    mode: Mode
    hierarchies: tuple[str, ...]
    unified: str = ""

    @property
    def roots(self) -> tuple[str, ...]:
        return (*self.hierarchies, self.unified) if self.unified else self.hierarchies


def parse_layout(mountinfo: str, *, whole: bool = False) -> Layout:
    """Read the layout out of /proc/PID/mountinfo (proc(5)): the first mount of each hierarchy. `whole`:
    also of those that only an ordinary container needs."""
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
    return parse_layout(Path("/proc/self/mountinfo").read_text(), whole=whole)


def find_driver(layout: Layout) -> Driver:
    """On v2 a service manager wants to own the tree, so the kubelet should ask it for the parents
    (Kubernetes documentation, "Container runtimes", cgroup drivers); elsewhere plain directories."""
    booted = Path("/run/systemd/system").is_dir()  # sd_booted(3)
    return Driver.SYSTEMD if booted and layout.mode is Mode.V2 else Driver.CGROUPFS


class Cgroups(msgspec.Struct, frozen=True, kw_only=True):
    """The pods' cgroups on this host; `root` is where those go that come without a parent."""

    layout: Layout
    root: str = "/husk"

    def create(self, pod_id: str, parent: str) -> None:
        """Blocks a little. Raises OSError, InvalidSpec. May be repeated."""
        create(self.layout, pod_path(parent, pod_id, root=self.root))

    @property
    def waiting(self) -> str:
        """The parent of pods that nobody has asked for yet."""
        return f"{self.root}-waiting"

    def create_waiting(self, pod_id: str) -> None:
        """For a VM of the pool, or one that a template is made of. Raises OSError. May be repeated."""
        self.create(pod_id, self.waiting)
        _weaken(directories(self.layout, self.waiting))

    def claim(self, pod_id: str, parent: str) -> None:
        """Move what waits to the pod's own cgroup. Raises OSError, InvalidSpec. May be repeated."""
        self.create(pod_id, parent)
        _move(self.directories(pod_id, self.waiting), self.directories(pod_id, parent))
        self._remove(pod_id, self.waiting)

    def remove(self, pod_id: str, parent: str) -> None:
        """End what is inside, and remove it; blocks up to 5 s. Idempotent. See `remove` below."""
        self._remove(pod_id, parent)
        self._remove(pod_id, self.waiting)

    def _remove(self, pod_id: str, parent: str) -> None:
        remove(self.layout, pod_path(parent, pod_id, root=self.root))
        if parent in ("", self.waiting):
            remove_empty(self.layout, parent or self.root)

    def directories(self, pod_id: str, parent: str) -> tuple[str, ...]:
        """What a process of the pod has to join."""
        return directories(self.layout, pod_path(parent, pod_id, root=self.root))


def find_cgroups(root: str) -> Cgroups:
    return Cgroups(layout=find_layout(), root=root)


def pod_path(parent: str, pod_id: str, *, root: str = "/husk") -> str:
    """The pod's cgroup below each hierarchy's mount point.

    Raises InvalidSpec for a parent that would lead out of the hierarchy.
    """
    parent = parent or root
    if parent.endswith(".slice") and "/" not in parent:
        parent = expand_slice(parent)
    parts = [part for part in parent.split("/") if part]
    if ".." in parts or "." in parts or "\0" in parent:
        raise InvalidSpec("cgroup_parent", f"{parent!r} is not a plain path")
    return "/" + "/".join([*parts, f"husk-{pod_id}"])


def expand_slice(name: str) -> str:
    """Directories of a slice: `a-b.slice` lies in `a.slice` (systemd.slice(5))."""
    stem = name.removesuffix(".slice")
    if stem == "-":
        return "/"
    words = stem.split("-")
    if not all(words):
        raise InvalidSpec("cgroup_parent", f"{name!r} is not a slice name")
    return "/" + "/".join("-".join(words[: n + 1]) + ".slice" for n in range(len(words)))


def directories(layout: Layout, path: str) -> tuple[str, ...]:
    """What a process has to join, and what has to be made for it."""
    return tuple(root.rstrip("/") + path for root in layout.roots)


def create(layout: Layout, path: str) -> None:
    """Make the pod's cgroup in every hierarchy. May be repeated.

    No controller is enabled on v2: limits sit on the parent, and what is accounted there includes
    the pod. Raises OSError.
    """
    for root, directory in zip(layout.roots, directories(layout, path), strict=True):
        _make_patiently(Path(root), Path(directory))


def _make_patiently(root: Path, directory: Path) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            _make_below(root, directory)
        except OSError as error:
            # the last pod to go has just taken the empty parent away: missing, or gone while open
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


def _weaken(directories: Sequence[str]) -> None:
    """The least share of the CPUs (cgroup-v1/... cpu.shares; cgroup-v2, cpu.weight): where the
    controller is not enabled, work that nobody waits for is as strong as any other."""
    for directory in directories:
        for name, least in (("cpu.shares", "2"), ("cpu.weight", "1")):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                Path(directory, name).write_text(least)


def _move(sources: Sequence[str], targets: Sequence[str]) -> None:
    """All processes, hierarchy by hierarchy. One that forks meanwhile is seen by the next look."""
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
    """A new v1 cpuset is empty and takes no process until it has CPUs and nodes (cpusets(7))."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        file = directory / name
        if (directory / "cgroup.controllers").exists() or not file.exists():
            return
        if not file.read_text().strip():
            file.write_text((directory.parent / name).read_text())


def remove(layout: Layout, path: str, *, timeout_s: float = 5.0) -> None:
    """End what is in the pod's cgroup and remove it; blocks up to `timeout_s`. Idempotent.

    Parents are left alone: most are the kubelet's. Raises DeadlineExceeded when a process will not
    go, and OSError when the kernel refuses for another reason.
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
            time.sleep(pause)  # the kernel gives no notice of the last exit that covers v1
            pause = min(pause * 2, 0.05)


def tree(top: str) -> list[str]:
    """A cgroup and all beneath it, the innermost first; those that are gone are left out."""
    return [folder for folder, _, _ in os.walk(top, topdown=False)]


def remove_empty(layout: Layout, path: str) -> None:
    """Remove a cgroup wherever nothing is in it; one in use stays (EBUSY), as does what lies above."""
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
