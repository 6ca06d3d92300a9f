"""What a pod and its containers use, parsed from a sample of their cgroup v2 files.

Times are nanoseconds, sizes bytes, and counters start with the cgroup. The contents of the files are not
trusted, as a guest may send them: see `kernel_files`. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

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
from sandbox.usage import UsageSample


class CpuStats(Value, frozen=True, kw_only=True):
    """CPU time since the start of a cgroup, in ns, and throttling by its quota."""

    usage_ns: int = 0
    user_ns: int = 0
    system_ns: int = 0
    periods: int = 0
    throttled_periods: int = 0
    throttled_ns: int = 0
    psi: Psi | None = None
    nano_cores: int | None = None  # current rate; None: there is no earlier sample to compare with


class MemoryStats(Value, frozen=True, kw_only=True):
    """Memory of a cgroup, in bytes, and counts of events."""

    usage: int = 0
    working_set: int = 0  # usage less inactive file pages, as the kubelet computes it
    available: int = 0  # up to the lowest limit that applies: its own, the pod's, the size of the VM
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
    """All usage of a cgroup."""

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
    """A container's usage, sampled at `at_ns` of the host's wall clock."""

    container_id: ContainerId
    at_ns: int
    usage: CgroupStats = CgroupStats()
    processes: int = 0
    files: int = 0  # open descriptors; 0 unless they were asked for
    sockets: int = 0
    layer: LayerStats | None = None  # None: not measured yet


class PodStats(Value, frozen=True, kw_only=True):
    """All containers together. What the VM costs the host beyond that is in `host_usage`."""

    pod_id: PodId
    at_ns: int
    usage: CgroupStats = CgroupStats()
    interfaces: tuple[InterfaceUsage, ...] = ()  # in the order in which the pod got them
    containers: tuple[ContainerStats, ...] = ()

    @property
    def processes(self) -> int:
        """Sum over the containers."""
        return sum(container.processes for container in self.containers)


def parse(
    pod_id: PodId,
    container_ids: Sequence[ContainerId],
    interfaces: Sequence[str],
    sample: UsageSample,
    at_ns: int,
) -> PodStats:
    """Make the stats of a pod of its sample, whose containers are those of `container_ids`, in that order.

    `interfaces` names those of the pod's network; others are left out. `at_ns` is the time of the sample.
    """
    machine = meminfo(sample.meminfo)
    ceiling = _Ceiling(machine.get(b"MemTotal", 0), machine.get(b"SwapFree", 0))
    pod = _cgroup(sample.pod.files, ceiling)
    return PodStats(
        pod_id=pod_id,
        at_ns=at_ns,
        usage=pod,
        interfaces=net_dev(sample.net_dev, interfaces),
        containers=tuple(
            ContainerStats(
                container_id=id,
                at_ns=at_ns,
                usage=_beneath(_cgroup(each.files, ceiling), pod.memory.limit),
                processes=each.count.processes,
                files=each.count.files,
                sockets=each.count.sockets,
            )
            for id, each in zip(container_ids, sample.containers, strict=True)
        ),
    )


class _Ceiling(Value, frozen=True):
    """What the machine has that the pod runs on: none of its cgroups can use more."""

    memory: int
    swap_free: int


def _cgroup(files: Mapping[str, bytes], ceiling: _Ceiling) -> CgroupStats:
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
    """Lower what is available to a container to what the limit of its pod leaves (0: no limit)."""
    if not pod_limit:
        return usage
    memory = usage.memory
    left = min(memory.available, max(0, pod_limit - memory.working_set))
    return replace(usage, memory=replace(memory, available=left))
