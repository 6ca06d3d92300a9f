"""The metrics of ListMetricDescriptors and ListPodSandboxMetrics, with cAdvisor's names and meaning.

Every metric is one entry of METRICS: name, help, type, and the source of its values. Values are whole numbers
on the wire, so seconds are rounded down. Labels begin with pod, namespace, container, id and image; series of
a pod as a whole have its id, and an empty container and image.
Pure: no clock, files or event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cri.proto import runtime_v1_pb2 as pb
from sandbox.plan.resources import DEFAULT_PERIOD_US
from sandbox.records import ContainerRecord, PodRecord
from sandbox.spec import Resources, Value
from sandbox.stats.kernel_files import InterfaceUsage, Psi
from sandbox.stats.parse import CgroupStats, ContainerStats, PodStats

LABELS = ("pod", "namespace", "container", "id", "image")
DEFAULT_SHARES = 1024
_NS = 1_000_000_000
_US = 1_000_000

# Values, each with the values of the labels after LABELS.
Samples = Iterable[tuple[tuple[str, ...], int]]


class Filesystem(Value, frozen=True, kw_only=True):
    """The filesystem of the writable layers."""

    device: str
    total_bytes: int
    total_inodes: int
    free_inodes: int


class Measured(Value, frozen=True, kw_only=True):
    """A container and everything that its metrics are computed from."""

    record: ContainerRecord
    stats: ContainerStats
    open_files_limit: int
    filesystem: Filesystem
    now_ns: int

    @property
    def resources(self) -> Resources:
        """Limits in force."""
        return self.record.resources

    @property
    def usage(self) -> CgroupStats:
        """Usage of its cgroup."""
        return self.stats.usage


class _Metric(Value, frozen=True, kw_only=True):
    """A metric, whose values are those of a cgroup (of container and pod), a container or an interface."""

    name: str
    help: str
    kind: pb.MetricType.ValueType
    labels: tuple[str, ...] = ()
    of_cgroup: Callable[[CgroupStats], Samples] | None = None
    of_container: Callable[[Measured], Samples] | None = None
    of_interface: Callable[[InterfaceUsage], int] | None = None


def descriptors() -> list[pb.MetricDescriptor]:
    """Return the descriptor of every metric."""
    return [
        pb.MetricDescriptor(name=metric.name, help=metric.help, label_keys=[*LABELS, *metric.labels])
        for metric in METRICS
    ]


def pod_metrics(pod: PodRecord, stats: PodStats, containers: Sequence[Measured]) -> pb.PodSandboxMetrics:
    """Return the metrics of a pod and its containers."""
    labels = [pod.spec.name, pod.spec.namespace, "", pod.id, ""]
    return pb.PodSandboxMetrics(
        pod_sandbox_id=pod.id,
        metrics=[*_of_cgroup(stats.usage, labels), *_of_interfaces(stats.interfaces, labels)],
        container_metrics=[_container_metrics(pod, container) for container in containers],
    )


def _container_metrics(pod: PodRecord, measured: Measured) -> pb.ContainerMetrics:
    spec = measured.record.spec
    labels = [pod.spec.name, pod.spec.namespace, spec.name, measured.record.id, spec.image]
    metrics = list(_of_cgroup(measured.usage, labels))
    for metric in METRICS:
        if metric.of_container is not None:
            metrics += (_sample(metric, labels, *one) for one in metric.of_container(measured))
    return pb.ContainerMetrics(container_id=measured.record.id, metrics=metrics)


def _of_cgroup(usage: CgroupStats, labels: Sequence[str]) -> Iterable[pb.Metric]:
    for metric in METRICS:
        if metric.of_cgroup is not None:
            for more, value in metric.of_cgroup(usage):
                yield _sample(metric, labels, more, value)


def _of_interfaces(interfaces: Sequence[InterfaceUsage], labels: Sequence[str]) -> Iterable[pb.Metric]:
    for metric in METRICS:
        if metric.of_interface is not None:
            for interface in interfaces:
                yield _sample(metric, labels, (interface.name,), metric.of_interface(interface))


def _sample(metric: _Metric, labels: Sequence[str], more: Sequence[str], value: int) -> pb.Metric:
    """Make one sample. Its timestamp is 0: it was read for this call."""
    return pb.Metric(
        name=metric.name,
        metric_type=metric.kind,
        label_values=[*labels, *more],
        value=pb.UInt64Value(value=value),
    )


# ---------------------------------------------------------------------------------- the metrics


def _cgroup(
    kind: pb.MetricType.ValueType, name: str, help: str, value: Callable[[CgroupStats], int]
) -> _Metric:
    return _Metric(
        name=f"container_{name}", help=help, kind=kind, of_cgroup=lambda usage: [((), value(usage))]
    )


def _container(
    kind: pb.MetricType.ValueType, name: str, help: str, value: Callable[[Measured], int]
) -> _Metric:
    return _Metric(
        name=f"container_{name}", help=help, kind=kind, of_container=lambda one: [((), value(one))]
    )


def _pressure(resource: str, of: Callable[[CgroupStats], Psi | None]) -> Iterable[_Metric]:
    for word, who in (("waiting", "some"), ("stalled", "full")):

        def samples(usage: CgroupStats, who: str = who) -> Samples:
            psi = of(usage)
            return [] if psi is None else [((), getattr(psi, who).total_us // _US)]

        yield _Metric(
            name=f"container_pressure_{resource}_{word}_seconds_total",
            help=f"Seconds in which {'some' if who == 'some' else 'all'} tasks waited for {resource}.",
            kind=pb.COUNTER,
            of_cgroup=samples,
        )


def _network(direction: str, what: str, help: str, value: Callable[[InterfaceUsage], int]) -> _Metric:
    return _Metric(
        name=f"container_network_{direction}_{what}_total",
        help=help,
        kind=pb.COUNTER,
        labels=("interface",),
        of_interface=value,
    )


def _filesystem(
    kind: pb.MetricType.ValueType, name: str, help: str, value: Callable[[Measured], int | None]
) -> _Metric:
    def samples(one: Measured) -> Samples:
        found = value(one)
        return [] if found is None else [((one.filesystem.device,), found)]

    return _Metric(
        name=f"container_fs_{name}", help=help, kind=kind, labels=("device",), of_container=samples
    )


def _devices(name: str, help: str, field: str) -> _Metric:
    """Make a metric of the guest's block devices. virtio-fs is not one, so it often has no series."""
    return _Metric(
        name=f"container_fs_{name}",
        help=help,
        kind=pb.COUNTER,
        labels=("device",),
        of_container=lambda one: [((io.device,), getattr(io, field)) for io in one.usage.io],
    )


def _blkio(usage: CgroupStats) -> Samples:
    for io in usage.io:
        major, _, minor = io.device.partition(":")
        for operation, value in (("Read", io.read_bytes), ("Write", io.written_bytes)):
            yield (io.device, major, minor, operation), value


def _failures(usage: CgroupStats) -> Samples:
    yield ("pgfault", "container"), usage.memory.page_faults
    yield ("pgmajfault", "container"), usage.memory.major_page_faults


def _layer_bytes(one: Measured) -> int | None:
    return one.stats.layer.bytes if one.stats.layer else None


def _quota(one: Measured) -> Samples:
    return [((), one.resources.cpu_quota)] if one.resources.cpu_quota > 0 else []


def _reservation(one: Measured) -> Samples:
    low = one.resources.unified.get("memory.low", "").strip()
    return [((), int(low))] if low.isascii() and low.isdigit() and len(low) < 20 else []


_C, _G = pb.COUNTER, pb.GAUGE
METRICS: tuple[_Metric, ...] = (
    # ---- cpu
    _cgroup(_C, "cpu_usage_seconds_total", "CPU time used, in seconds.", lambda u: u.cpu.usage_ns // _NS),
    _cgroup(
        _C,
        "cpu_user_seconds_total",
        "CPU time used in user mode, in seconds.",
        lambda u: u.cpu.user_ns // _NS,
    ),
    _cgroup(
        _C,
        "cpu_system_seconds_total",
        "CPU time used in the kernel, in seconds.",
        lambda u: u.cpu.system_ns // _NS,
    ),
    _cgroup(_C, "cpu_cfs_periods_total", "Elapsed periods of the CPU limit.", lambda u: u.cpu.periods),
    _cgroup(
        _C,
        "cpu_cfs_throttled_periods_total",
        "Periods in which tasks were throttled.",
        lambda u: u.cpu.throttled_periods,
    ),
    _cgroup(
        _C,
        "cpu_cfs_throttled_seconds_total",
        "Time for which tasks were throttled, in seconds.",
        lambda u: u.cpu.throttled_ns // _NS,
    ),
    # ---- memory
    _cgroup(_G, "memory_cache", "Bytes of page cache.", lambda u: u.memory.cache),
    _cgroup(_G, "memory_rss", "Bytes of anonymous memory.", lambda u: u.memory.rss),
    _cgroup(_G, "memory_kernel_usage", "Bytes of kernel memory.", lambda u: u.memory.kernel),
    _cgroup(_G, "memory_mapped_file", "Bytes of mapped files.", lambda u: u.memory.mapped_file),
    _cgroup(_G, "memory_swap", "Bytes in swap.", lambda u: u.memory.swap_usage),
    _cgroup(
        _C, "memory_failcnt", "Number of times that the memory limit was hit.", lambda u: u.memory.limit_hits
    ),
    _cgroup(_G, "memory_usage_bytes", "Bytes of memory, page cache included.", lambda u: u.memory.usage),
    _cgroup(_G, "memory_max_usage_bytes", "Peak of memory usage in bytes.", lambda u: u.memory.peak),
    _cgroup(
        _G,
        "memory_working_set_bytes",
        "Bytes of memory without inactive page cache.",
        lambda u: u.memory.working_set,
    ),
    _Metric(
        name="container_memory_failures_total",
        help="Page faults, minor and major (failure_type).",
        kind=_C,
        labels=("failure_type", "scope"),
        of_cgroup=_failures,
    ),
    _cgroup(_C, "oom_events_total", "Processes killed by the OOM killer.", lambda u: u.memory.oom_kills),
    # ---- file systems
    _filesystem(
        _G,
        "inodes_free",
        "Free inodes of the filesystem of the writable layer.",
        lambda one: one.filesystem.free_inodes,
    ),
    _filesystem(
        _G,
        "inodes_total",
        "Inodes of the filesystem of the writable layer.",
        lambda one: one.filesystem.total_inodes,
    ),
    _filesystem(
        _G,
        "limit_bytes",
        "Size in bytes of the filesystem of the writable layer.",
        lambda one: one.filesystem.total_bytes,
    ),
    _filesystem(_G, "usage_bytes", "Bytes used by the writable layer.", _layer_bytes),
    _devices("reads_total", "Read operations on block devices.", "reads"),
    _devices("writes_total", "Write operations on block devices.", "writes"),
    _devices("reads_bytes_total", "Bytes read from block devices.", "read_bytes"),
    _devices("writes_bytes_total", "Bytes written to block devices.", "written_bytes"),
    _Metric(
        name="container_blkio_device_usage_total",
        help="Bytes read from and written to block devices, by operation.",
        kind=_C,
        labels=("device", "major", "minor", "operation"),
        of_cgroup=_blkio,
    ),
    # ---- network
    _network("receive", "bytes", "Bytes received.", lambda i: i.rx_bytes),
    _network("receive", "packets", "Packets received.", lambda i: i.rx_packets),
    _network("receive", "packets_dropped", "Packets dropped while receiving.", lambda i: i.rx_dropped),
    _network("receive", "errors", "Errors while receiving.", lambda i: i.rx_errors),
    _network("transmit", "bytes", "Bytes sent.", lambda i: i.tx_bytes),
    _network("transmit", "packets", "Packets sent.", lambda i: i.tx_packets),
    _network("transmit", "packets_dropped", "Packets dropped while sending.", lambda i: i.tx_dropped),
    _network("transmit", "errors", "Errors while sending.", lambda i: i.tx_errors),
    # ---- processes
    _container(_G, "processes", "Number of processes.", lambda one: one.stats.processes),
    _cgroup(_G, "threads", "Number of threads.", lambda u: u.threads),
    _cgroup(_G, "threads_max", "Limit of threads; 0: none.", lambda u: u.threads_max),
    _container(_G, "file_descriptors", "Open file descriptors.", lambda one: one.stats.files),
    _container(_G, "sockets", "Open sockets.", lambda one: one.stats.sockets),
    _Metric(
        name="container_ulimits_soft",
        help="Soft limits of the first process.",
        kind=_G,
        labels=("ulimit",),
        of_container=lambda one: [(("max_open_files",), one.open_files_limit)],
    ),
    # ---- pressure, huge pages
    *_pressure("cpu", lambda u: u.cpu.psi),
    *_pressure("memory", lambda u: u.memory.psi),
    *_pressure("io", lambda u: u.io_psi),
    _Metric(
        name="container_hugetlb_usage_bytes",
        help="Bytes of huge pages.",
        kind=_G,
        labels=("pagesize",),
        of_cgroup=lambda usage: [((size,), value) for size, value in usage.hugepages],
    ),
    _Metric(
        name="container_hugetlb_max_usage_bytes",
        help="Peak of huge page usage in bytes; cgroup v2 does not record it.",
        kind=_G,
        labels=("pagesize",),
    ),
    # ---- limits and times
    _container(_G, "last_seen", "Time of this sample, Unix time in seconds.", lambda one: one.now_ns // _NS),
    _container(
        _G,
        "start_time_seconds",
        "Time of the start, Unix time in seconds.",
        lambda one: one.record.started_at_ns // _NS,
    ),
    _container(
        _G,
        "spec_cpu_period",
        "Period of the CPU limit, in microseconds.",
        lambda one: one.resources.cpu_period or DEFAULT_PERIOD_US,
    ),
    _Metric(
        name="container_spec_cpu_quota",
        help="CPU limit, in microseconds per period.",
        kind=_G,
        of_container=_quota,
    ),
    _container(_G, "spec_cpu_shares", "CPU shares.", lambda one: one.resources.cpu_shares or DEFAULT_SHARES),
    _container(
        _G,
        "spec_memory_limit_bytes",
        "Memory limit in bytes; 0: none.",
        lambda one: max(0, one.resources.memory_limit),
    ),
    _container(
        _G,
        "spec_memory_swap_limit_bytes",
        "Limit of memory and swap together, in bytes; 0: none.",
        lambda one: max(0, one.resources.memory_swap_limit),
    ),
    _Metric(
        name="container_spec_memory_reservation_limit_bytes",
        help="Protected memory in bytes (memory.low).",
        kind=_G,
        of_container=_reservation,
    ),
)
