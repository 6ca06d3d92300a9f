"""Everything that Husk holds on this host, with its owner and cost, read from the host itself: for `husk ps`.

Works without the daemon, and changes nothing. What is held is found by its place and name:

    record      ROOT/pods/ID.json, ROOT/containers/ID.json
    process     in a cgroup husk-ID, or started by husk with an argument in RUN; VMM and helpers by the record
    cgroup      husk-ID in any hierarchy
    namespace   RUN/netns/ID; the taps and other interfaces in it
    network     ROOT/cni/ID.json; leases of host-local with this ID
    mount       below RUN or ROOT
    directory   RUN/pods/ID, RUN/templates/KEY, ROOT/rootfs/CONTAINER, ROOT/containers/ID.plan

The owner is a pod, by the id in the name. A pod whose record cannot be used, or is lost while its run
directory exists, is quarantined (see `quarantine`). What belongs to an id without either is an orphan, if it
lies in a place of this daemon's own; a cgroup elsewhere can be another daemon's.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path

from network import holdings as network
from sandbox.host import cgroup, mountinfo, proc
from sandbox.host.process import MARK
from sandbox.records import ContainerRecord, PodRecord, PodState
from sandbox.spec import Value
from sandbox.store import Unreadable, read_record

_ID = r"(?:[a-z]+-[0-9a-f]{16}|[0-9a-f]{64})"  # of a pod or container, or of a VM without a pod
_CGROUP = re.compile(rf"husk-({_ID})(?=/|$)", re.MULTILINE)
_IDS = re.compile(rf"(?<![0-9a-z]){_ID}(?![0-9a-f])")
_TICKS_S = os.sysconf("SC_CLK_TCK")


class State(StrEnum):
    """What is known of a holding's owner. The first four are those of its pod's record."""

    READY = "ready"
    NOT_READY = "not-ready"
    STARTING = "starting"
    POOLED = "pooled"
    SHARED = "shared"  # of no pod: templates, and the VMs that they are made of
    QUARANTINED = "quarantined"
    ORPHAN = "orphan"
    UNKNOWN = "unknown"  # an orphan, or of another daemon on this host


MARKED = (State.QUARANTINED, State.ORPHAN, State.UNKNOWN)


class Holding(Value, frozen=True, kw_only=True):
    """One thing that is held."""

    kind: str
    name: str
    pod: str = ""  # id of the owner
    container: str = ""
    owner: str = ""  # NAMESPACE/NAME of the pod, where that is known
    state: State
    detail: str = ""
    age_s: float | None = None  # None: the host does not say
    memory_bytes: int | None = None  # of a process its proportional share (PSS)
    cpu_s: float | None = None


class Places(Value, frozen=True, kw_only=True):
    """Where a daemon keeps things, as its configuration says."""

    root: Path
    run: Path
    cgroup_root: str
    cni_conf: Path


class _Found(Value, frozen=True, kw_only=True):
    """A holding before its owner is known; `own` if it lies in a place of this daemon's own."""

    kind: str
    name: str
    id: str = ""  # of a pod or container; empty: shared
    own: bool = True
    detail: str = ""
    age_s: float | None = None
    memory_bytes: int | None = None
    cpu_s: float | None = None


def find_holdings(places: Places) -> list[Holding]:
    """Find everything, by owner and kind. Blocking: reads /proc as a whole. Raises OSError."""
    return _Finder(places).holdings()


class _Finder:
    def __init__(self, places: Places) -> None:
        self._places = places
        self._now = time.time()
        self._pods: dict[str, PodRecord] = {}
        self._containers: dict[str, ContainerRecord] = {}
        self._problems: dict[str, str] = {}  # by the id of a record that cannot be used
        self._pod_of: dict[str, str] = {}  # by container

    def holdings(self) -> list[Holding]:
        found = [*self._records()]
        found += self._directories()
        found += self._processes()
        found += self._cgroups()
        found += self._networks()
        found += self._mounts()
        own = {each.id for each in found if each.own}
        holdings = [self._owned(each, own) for each in found]
        return sorted(
            holdings, key=lambda each: (each.state in MARKED, each.owner, each.pod, each.kind, each.name)
        )

    # -------------------------------------------------------------------------------- owners

    def _owned(self, found: _Found, own: set[str]) -> Holding:
        container = found.id if found.id in self._pod_of or found.id in self._containers else ""
        pod = self._pod_of.get(found.id, "") if container else found.id
        record = self._pods.get(pod)
        state = self._state(found, pod, container, found.id in own)
        problem = self._problems.get(found.id) or self._problems.get(pod, "")
        return Holding(
            kind=found.kind,
            name=found.name,
            pod=pod,
            container=container,
            owner=f"{record.spec.namespace}/{record.spec.name}" if record and record.spec.name else "",
            state=state,
            detail=problem if problem and found.kind == "record" else found.detail,
            age_s=found.age_s,
            memory_bytes=found.memory_bytes,
            cpu_s=found.cpu_s,
        )

    def _state(self, found: _Found, pod: str, container: str, own: bool) -> State:
        if not found.id or (own and re.match("[a-z]+-", found.id)):
            return State.SHARED  # such as a template; that of another daemon is not ours
        if pod in self._problems or found.id in self._problems:
            return State.QUARANTINED
        record = self._pods.get(pod)
        if record is None or (container and container not in self._containers):
            return State.ORPHAN if own else State.UNKNOWN
        match record.state:
            case PodState.READY:
                return State.READY
            case PodState.STARTING:
                return State.STARTING
            case PodState.WAITING:
                return State.POOLED
        return State.NOT_READY

    # -------------------------------------------------------------------------------- files

    def _records(self) -> Iterator[_Found]:
        root = self._places.root
        for kind, directory, type in (
            ("pod", root / "pods", PodRecord),
            ("container", root / "containers", ContainerRecord),
        ):
            for path in _list(directory):
                if path.suffix == ".json":
                    self._read(path, type)
                    yield self._file("record", path, path.stem, detail=f"of a {kind}")
        for container in self._containers.values():
            self._pod_of[container.id] = container.pod_id
            if container.pod_id not in self._pods:
                self._problems.setdefault(
                    container.pod_id, f"the record of its pod {container.pod_id} is lost"
                )

    def _read(self, path: Path, type: type[PodRecord] | type[ContainerRecord]) -> None:
        try:
            record = read_record(path, path.stem, type)
        except Unreadable as error:
            self._problems[path.stem] = str(error)
            return
        if isinstance(record, PodRecord):
            self._pods[record.id] = record
        else:
            self._containers[record.id] = record

    def _directories(self) -> Iterator[_Found]:
        root, run = self._places.root, self._places.run
        for path in _list(run / "pods"):
            yield self._file("directory", path, path.name)
            if path.name not in self._pods:
                self._problems.setdefault(path.name, "its record is lost")
            for point in _list(path / "back" / "rootfs"):
                self._pod_of.setdefault(point.name, path.name)
                if point.name not in self._containers and _IDS.fullmatch(point.name):
                    self._problems.setdefault(point.name, "its record is lost")
        for path in _list(run / "templates"):
            yield self._file("template", path, "")
        for path in _list(root / "rootfs"):
            yield self._file("rootfs", path, path.name.partition(".")[0])
        for path in _list(root / "containers"):
            if ".plan" in path.name:
                yield self._file("plan", path, path.name.partition(".")[0])

    def _file(self, kind: str, path: Path, id: str, detail: str = "") -> _Found:
        age_s = None
        with contextlib.suppress(OSError):
            age_s = self._now - path.stat().st_mtime
        record = self._pods.get(id) or self._containers.get(id)
        if record is not None:
            age_s = self._now - record.created_at_ns / 1e9
        return _Found(kind=kind, name=str(path), id=id, detail=detail, age_s=age_s)

    # -------------------------------------------------------------------------------- processes

    def _processes(self) -> Iterator[_Found]:
        roles = dict(self._roles())
        uptime_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, ValueError):
                    if found := self._process(int(entry.name), entry, roles, uptime_s):
                        yield found

    def _roles(self) -> Iterator[tuple[tuple[int, int], tuple[str, str]]]:
        """Yield kind and name of the processes that records name, by pid and start time."""
        for pod in self._pods.values():
            if pod.vm_handle is not None:
                vmm = pod.vm_handle.vmm
                yield (vmm.pid, vmm.start_time), ("vm", pod.vm_handle.hypervisor)
                for name, helper in pod.vm_handle.helpers.items():
                    yield (helper.pid, helper.start_time), ("helper", name)

    def _process(
        self, pid: int, entry: Path, roles: Mapping[tuple[int, int], tuple[str, str]], uptime_s: float
    ) -> _Found | None:
        member = _CGROUP.search((entry / "cgroup").read_text())
        id, own = (member[1], False) if member else self._named(entry)
        stat = proc.read_stat(pid)
        if not (id or own) or stat is None:
            return None
        kind, role = roles.get((pid, stat.start_time), ("process", ""))
        program = (entry / "comm").read_text().strip()
        return _Found(
            kind=kind,
            name=str(pid),
            id=id,
            own=own or bool(role),
            detail=f"{role} ({program})" if role else program,
            age_s=uptime_s - stat.start_time / _TICKS_S,
            memory_bytes=_proportional_bytes(entry),
            cpu_s=stat.cpu_ticks / _TICKS_S,
        )

    def _named(self, entry: Path) -> tuple[str, bool]:
        """Find a process outside of a pod's cgroup by its arguments, if husk has started it."""
        run = os.fsencode(f"{self._places.run}/")
        arguments = (entry / "cmdline").read_bytes()
        if run not in arguments or f"{MARK}=".encode() not in (entry / "environ").read_bytes():
            return "", False
        found = _IDS.search(arguments.partition(run)[2].decode(errors="replace"))
        return found[0] if found else "", True

    # -------------------------------------------------------------------------------- the rest

    def _cgroups(self) -> Iterator[_Found]:
        layout = cgroup.find_layout(whole=True)
        own = (f"{self._places.cgroup_root}/", f"{self._places.cgroup_root}-waiting/")
        found: dict[str, list[Path]] = {}
        for root in layout.roots:
            for folder, names, _ in os.walk(root):
                for name in names:
                    if _CGROUP.fullmatch(name):
                        path = Path(folder, name)
                        found.setdefault(f"/{path.relative_to(root)}", []).append(path)
        for name, places in sorted(found.items()):
            yield _Found(
                kind="cgroup",
                name=name,
                id=Path(name).name.removeprefix("husk-"),
                own=name.startswith(own),
                detail=f"in {len(places)} hierarchies" if len(places) > 1 else "",
                memory_bytes=_first_number(places, "memory.current", "memory.usage_in_bytes"),
            )

    def _networks(self) -> Iterator[_Found]:
        cache = self._places.root / "cni"
        for held in network.held_networks(cache, self._places.run / "netns"):
            if held.netns:
                yield self._file("namespace", Path(held.netns), held.pod_id, held.problem)
            for name in held.interfaces:
                kind = "tap" if name.startswith("tap") else "interface"
                yield _Found(kind=kind, name=name, id=held.pod_id, detail=f"in {held.netns}")
            if held.cache:
                detail = " ".join(held.addresses) or held.problem
                yield self._file("network", Path(held.cache), held.pod_id, detail)
        for lease in network.leases(self._places.cni_conf, cache):
            if _IDS.fullmatch(lease.pod_id):
                yield self._file("lease", Path(lease.path), lease.pod_id)

    def _mounts(self) -> Iterator[_Found]:
        bases = [str(base.resolve()) for base in (self._places.run, self._places.root)]
        for mounted in mountinfo.read():
            inside = [rest for base in bases if (rest := mountinfo.relative(mounted.point, base))]
            if inside and not inside[0].startswith("netns/"):
                ids = _IDS.findall(inside[0])
                yield _Found(kind="mount", name=mounted.point, id=ids[-1] if ids else "", detail=mounted.kind)


def _list(directory: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(directory.iterdir())
    return []


def _proportional_bytes(entry: Path) -> int | None:
    with contextlib.suppress(OSError):
        for line in (entry / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return None


def _first_number(directories: list[Path], *names: str) -> int | None:
    for directory in directories:
        for name in names:
            with contextlib.suppress(OSError, ValueError):
                return int((directory / name).read_text())
    return None
