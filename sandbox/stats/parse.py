"""What a pod and its containers use, by their guest's cgroup v2 files.

One ReadCgroup brings all of it: FILES of the cgroup that holds all containers, then of each container,
then PATHS. `parse` makes sense of it. Times are nanoseconds, sizes bytes. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from sandbox.guest import guest_pb2 as pb
from sandbox.spec import ContainerId, PodId, Value
from sandbox.stats.kernel_files import (
    NUMBER_MAX,
    InterfaceUsage,
    IoUsage,
    Psi,
    flat_keyed,
    io_stat,
    limit,
    meminfo,
    net_dev,
    number,
    psi,
)

POD_CGROUP = "."  # the agent's name of the cgroup that holds those of all containers
FILES = (
    "cpu.stat",
    "cpu.pressure",
    "memory.current",
    "memory.stat",
    "memory.max",
    "memory.peak",
    "memory.events",
    "memory.swap.current",
    "memory.swap.max",
    "memory.pressure",
    "pids.current",
    "pids.max",
    "io.stat",
    "io.pressure",
    "hugetlb.2MB.current",
    "hugetlb.1GB.current",
)
PATHS = ("/proc/net/dev", "/proc/meminfo")


class CpuStats(Value, frozen=True, kw_only=True):
    usage_ns: int = 0
    user_ns: int = 0
    system_ns: int = 0
    periods: int = 0
    throttled_periods: int = 0
    throttled_ns: int = 0
    psi: Psi | None = None
    nano_cores: int | None = None  # of late; None: there was no earlier look to compare with


class MemoryStats(Value, frozen=True, kw_only=True):
    usage: int = 0
    working_set: int = 0  # usage less inactive file pages, as the kubelet reckons it
    available: int = 0  # until the lowest limit above it: its own, the pod's, the VM's size
    rss: int = 0
    cache: int = 0
    mapped_file: int = 0
    kernel: int = 0
    peak: int = 0
    limit: int = 0  # 0: none
    limit_hits: int = 0
    oom_kills: int = 0
    page_faults: int = 0
    major_page_faults: int = 0
    swap_usage: int = 0
    swap_available: int = 0
    psi: Psi | None = None


class CgroupStats(Value, frozen=True, kw_only=True):
    cpu: CpuStats = CpuStats()
    memory: MemoryStats = MemoryStats()
    io: tuple[IoUsage, ...] = ()
    io_psi: Psi | None = None
    threads: int = 0
    threads_max: int = 0  # 0: no limit
    hugepages: tuple[tuple[str, int], ...] = ()  # page size, bytes


class LayerStats(Value, frozen=True, kw_only=True):
    """What a container wrote to its root filesystem, as of `at_ns`."""

    at_ns: int
    bytes: int
    inodes: int


class ContainerStats(Value, frozen=True, kw_only=True):
    container_id: ContainerId
    at_ns: int
    usage: CgroupStats = CgroupStats()
    processes: int = 0
    files: int = 0  # open descriptors; 0 unless they were asked for
    sockets: int = 0
    layer: LayerStats | None = None  # None: nobody has looked yet


class PodStats(Value, frozen=True, kw_only=True):
    """All containers together; what the VM costs beyond that is the host's to see (`host_usage`)."""

    pod_id: PodId
    at_ns: int
    usage: CgroupStats = CgroupStats()
    interfaces: tuple[InterfaceUsage, ...] = ()  # in the order in which the pod got them
    containers: tuple[ContainerStats, ...] = ()

    @property
    def processes(self) -> int:
        return sum(container.processes for container in self.containers)


def request(container_ids: Sequence[ContainerId], *, files: bool) -> pb.Request:
    count = pb.ReadCgroup.FILES if files else pb.ReadCgroup.PROCESSES
    ids = [POD_CGROUP, *container_ids]
    return pb.Request(read_cgroup=pb.ReadCgroup(container_ids=ids, names=FILES, paths=PATHS, count=count))


def parse(
    pod_id: PodId,
    container_ids: Sequence[ContainerId],
    interfaces: Sequence[str],
    values: pb.CgroupValues,
    at_ns: int,
) -> PodStats | None:
    """The answer to `request` for these containers. None when the guest answered something else."""
    ids = (POD_CGROUP, *container_ids)
    if len(values.values) != len(ids) * len(FILES) + len(PATHS):
        return None
    net, memory = values.values[-len(PATHS) :]
    machine = meminfo(memory)
    ceiling = _Ceiling(machine.get(b"MemTotal", 0), machine.get(b"SwapFree", 0))
    pod, *each = (_cgroup(values.values, index * len(FILES), ceiling) for index in range(len(ids)))
    if pod.memory.limit:
        each = [_beneath(one, pod.memory.limit) for one in each]
    counts = [*values.counts[1 : len(ids)]]
    counts += [pb.ProcessCount()] * (len(container_ids) - len(counts))
    containers = [
        ContainerStats(
            container_id=id,
            at_ns=at_ns,
            usage=usage,
            processes=count.processes,
            files=count.files,
            sockets=count.sockets,
        )
        for id, usage, count in zip(container_ids, each, counts, strict=True)
    ]
    return PodStats(
        pod_id=pod_id,
        at_ns=at_ns,
        usage=pod,
        interfaces=net_dev(net, interfaces),
        containers=tuple(containers),
    )


class _Ceiling(Value, frozen=True):
    """What the VM itself has: no cgroup of it can use more."""

    memory: int
    swap_free: int


def _cgroup(values: Sequence[bytes], start: int, ceiling: _Ceiling) -> CgroupStats:
    files = dict(zip(FILES, values[start : start + len(FILES)], strict=True))
    hugepages = {size: files[f"hugetlb.{size}.current"] for size in ("2MB", "1GB")}
    return CgroupStats(
        cpu=_cpu(files),
        memory=_memory(files, ceiling),
        io=io_stat(files["io.stat"]),
        io_psi=psi(files["io.pressure"]),
        threads=number(files["pids.current"]),
        threads_max=limit(files["pids.max"]),
        hugepages=tuple((size, number(text)) for size, text in hugepages.items() if text),
    )


def _cpu(files: Mapping[str, bytes]) -> CpuStats:
    stat = flat_keyed(files["cpu.stat"])

    def ns(key: bytes) -> int:
        return min(stat.get(key, 0) * 1000, NUMBER_MAX)

    return CpuStats(
        usage_ns=ns(b"usage_usec"),
        user_ns=ns(b"user_usec"),
        system_ns=ns(b"system_usec"),
        periods=stat.get(b"nr_periods", 0),
        throttled_periods=stat.get(b"nr_throttled", 0),
        throttled_ns=ns(b"throttled_usec"),
        psi=psi(files["cpu.pressure"]),
    )


def _memory(files: Mapping[str, bytes], ceiling: _Ceiling) -> MemoryStats:
    stat, events = flat_keyed(files["memory.stat"]), flat_keyed(files["memory.events"])
    usage, swap_usage = number(files["memory.current"]), number(files["memory.swap.current"])
    working_set = max(0, usage - stat.get(b"inactive_file", 0))
    own_limit, swap_limit = limit(files["memory.max"]), files["memory.swap.max"].strip()
    highest = min(own_limit or NUMBER_MAX, ceiling.memory or NUMBER_MAX)
    swap_left = max(0, number(swap_limit) - swap_usage) if swap_limit.isdigit() else ceiling.swap_free
    return MemoryStats(
        usage=usage,
        working_set=working_set,
        available=max(0, highest - working_set) if highest != NUMBER_MAX else 0,
        rss=stat.get(b"anon", 0),
        cache=stat.get(b"file", 0),
        mapped_file=stat.get(b"file_mapped", 0),
        kernel=stat.get(b"kernel", 0),
        peak=max(usage, number(files["memory.peak"])),  # peak is newer than some guests' kernels
        limit=own_limit,
        limit_hits=events.get(b"max", 0),
        oom_kills=events.get(b"oom_kill", 0),
        page_faults=stat.get(b"pgfault", 0),
        major_page_faults=stat.get(b"pgmajfault", 0),
        swap_usage=swap_usage,
        swap_available=min(swap_left, ceiling.swap_free),
        psi=psi(files["memory.pressure"]),
    )


def _beneath(usage: CgroupStats, pod_limit: int) -> CgroupStats:
    """A container's share of a limit that its pod has as a whole."""
    memory = usage.memory
    left = min(memory.available, max(0, pod_limit - memory.working_set))
    return replace(usage, memory=replace(memory, available=left))
