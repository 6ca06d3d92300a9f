"""The metrics have the names that their readers know, and labels as announced."""

from __future__ import annotations

import msgspec
import pytest

from cri.proto import runtime_v1_pb2 as pb
from cri.responses import pod_metrics
from cri.responses.pod_metrics import Filesystem, Measured
from sandbox.records import ContainerRecord, PodRecord
from sandbox.spec import ContainerId, ContainerSpec, ImageDefaults, PodId, PodSpec, Resources
from sandbox.stats.kernel_files import InterfaceUsage, IoUsage, Pressure, Psi
from sandbox.stats.parse import CgroupStats, ContainerStats, CpuStats, LayerStats, MemoryStats, PodStats

# What critest and cAdvisor's readers want, without "container_".
ALWAYS = [
    "cpu_usage_seconds_total",
    "cpu_user_seconds_total",
    "cpu_system_seconds_total",
    "cpu_cfs_periods_total",
    "cpu_cfs_throttled_periods_total",
    "cpu_cfs_throttled_seconds_total",
    "memory_cache",
    "memory_rss",
    "memory_kernel_usage",
    "memory_mapped_file",
    "memory_swap",
    "memory_failcnt",
    "memory_usage_bytes",
    "memory_max_usage_bytes",
    "memory_working_set_bytes",
    "memory_failures_total",
    "oom_events_total",
    "fs_inodes_free",
    "fs_inodes_total",
    "fs_limit_bytes",
    "fs_usage_bytes",
    "network_receive_bytes_total",
    "network_receive_packets_total",
    "network_receive_packets_dropped_total",
    "network_receive_errors_total",
    "network_transmit_bytes_total",
    "network_transmit_packets_total",
    "network_transmit_packets_dropped_total",
    "network_transmit_errors_total",
    "processes",
    "threads",
    "threads_max",
    "file_descriptors",
    "sockets",
    "last_seen",
    "start_time_seconds",
    "spec_cpu_period",
    "spec_cpu_shares",
    "spec_memory_limit_bytes",
    "spec_memory_swap_limit_bytes",
    "ulimits_soft",
]
SOMETIMES = [
    "fs_reads_total",
    "fs_writes_total",
    "fs_reads_bytes_total",
    "fs_writes_bytes_total",
    "blkio_device_usage_total",
    "pressure_cpu_waiting_seconds_total",
    "pressure_cpu_stalled_seconds_total",
    "pressure_memory_waiting_seconds_total",
    "pressure_memory_stalled_seconds_total",
    "pressure_io_waiting_seconds_total",
    "pressure_io_stalled_seconds_total",
    "hugetlb_usage_bytes",
    "hugetlb_max_usage_bytes",
    "spec_cpu_quota",
    "spec_memory_reservation_limit_bytes",
]

POD = PodRecord(id=PodId("p" * 64), spec=PodSpec(name="web", namespace="ns", uid="u"), created_at_ns=1)
CONTAINER = ContainerRecord(
    id=ContainerId("c" * 64),
    pod_id=POD.id,
    spec=ContainerSpec(name="app", image="example/web:1"),
    created_at_ns=1,
    started_at_ns=1_700_000_000_500_000_000,
    image_id="sha256:1",
    image_ref="sha256:1",
    defaults=ImageDefaults(),
)
PSI = Psi(some=Pressure(total_us=3_999_999), full=Pressure(total_us=1_000_000))
USAGE = CgroupStats(
    cpu=CpuStats(usage_ns=2_999_999_999, user_ns=2_000_000_000, psi=PSI),
    memory=MemoryStats(usage=100, page_faults=5, major_page_faults=2),
    threads=4,
)
NIC = InterfaceUsage(name="eth0", rx_bytes=10, tx_dropped=3)


def metrics(
    usage: CgroupStats = USAGE, layer: LayerStats | None = None, **resources: object
) -> pb.PodSandboxMetrics:
    record = msgspec.structs.replace(CONTAINER, resources=Resources(**resources))  # type: ignore[arg-type]
    one = ContainerStats(
        container_id=record.id, at_ns=9, usage=usage, processes=2, files=7, sockets=1, layer=layer
    )
    disk = Filesystem(device="8:1", total_bytes=1000, total_inodes=50, free_inodes=20)
    measured = Measured(record=record, stats=one, open_files_limit=1024, filesystem=disk, now_ns=5 * 10**9)
    pod = PodStats(pod_id=POD.id, at_ns=9, usage=usage, interfaces=(NIC,), containers=(one,))
    return pod_metrics.pod_metrics(POD, pod, [measured])


def sample(found: pb.PodSandboxMetrics, name: str, *labels: str) -> pb.Metric:
    """The container's value of this name whose labels end so."""
    (one,) = [
        metric
        for metric in found.container_metrics[0].metrics
        if metric.name == f"container_{name}" and list(metric.label_values[5:]) == list(labels)
    ]
    return one


def names(found: pb.PodSandboxMetrics) -> set[str]:
    every = [*found.metrics, *(metric for one in found.container_metrics for metric in one.metrics)]
    return {metric.name.removeprefix("container_") for metric in every}


def test_metric_names_are_cadvisors() -> None:
    names = [metric.name for metric in pod_metrics.descriptors()]
    assert sorted(names) == sorted(f"container_{name}" for name in ALWAYS + SOMETIMES)
    for metric in pod_metrics.descriptors():
        assert metric.help
        assert list(metric.label_keys[:5]) == ["pod", "namespace", "container", "id", "image"]
        assert len(set(metric.label_keys)) == len(metric.label_keys)


def test_metrics_of_every_pod_are_present() -> None:
    layer = LayerStats(at_ns=1, bytes=4096, inodes=3)
    bare = metrics(CgroupStats(), layer)
    assert set(ALWAYS) <= names(bare)
    assert not set(SOMETIMES) & names(bare)


def test_metrics_of_some_guests_are_present_where_they_exist() -> None:
    usage = msgspec.structs.replace(
        USAGE,
        io=(IoUsage(device="253:0", read_bytes=1, written_bytes=2, reads=3, writes=4),),
        io_psi=PSI,
        memory=MemoryStats(psi=PSI),
        hugepages=(("2MB", 2 << 20),),
    )
    found = metrics(usage, cpu_quota=20000, unified={"memory.low": "4096"})
    assert set(SOMETIMES) - names(found) == {"hugetlb_max_usage_bytes"}
    assert sample(found, "blkio_device_usage_total", "253:0", "253", "0", "Write").value.value == 2
    assert sample(found, "fs_reads_total", "253:0").value.value == 3
    assert sample(found, "hugetlb_usage_bytes", "2MB").value.value == 2 << 20
    assert sample(found, "spec_cpu_quota").value.value == 20000
    assert sample(found, "spec_memory_reservation_limit_bytes").value.value == 4096


def test_samples_have_the_labels_of_their_descriptor() -> None:
    keys = {metric.name: list(metric.label_keys) for metric in pod_metrics.descriptors()}
    found = metrics()
    for metric in [*found.metrics, *found.container_metrics[0].metrics]:
        assert len(metric.label_values) == len(keys[metric.name]), metric.name
    assert list(sample(found, "processes").label_values) == ["web", "ns", "app", "c" * 64, "example/web:1"]
    assert keys["container_network_receive_bytes_total"][5:] == ["interface"]
    (network,) = [one for one in found.metrics if one.name == "container_network_receive_bytes_total"]
    assert list(network.label_values) == ["web", "ns", "", "p" * 64, "", "eth0"]


def test_series_are_unique() -> None:
    found = metrics()
    series = [
        (metric.name, *metric.label_values)
        for metric in [*found.metrics, *found.container_metrics[0].metrics]
    ]
    assert len(series) == len(set(series))


def test_values_and_types_of_metrics() -> None:
    found = metrics(layer=LayerStats(at_ns=1, bytes=4096, inodes=3), memory_limit=100, memory_swap_limit=-1)
    cpu = sample(found, "cpu_usage_seconds_total")
    assert (cpu.value.value, cpu.metric_type, cpu.timestamp) == (2, pb.COUNTER, 0)
    expected = {
        "pressure_cpu_waiting_seconds_total": 3,
        "pressure_cpu_stalled_seconds_total": 1,
        "threads": 4,
        "file_descriptors": 7,
        "sockets": 1,
        "processes": 2,
        "last_seen": 5,
        "start_time_seconds": 1_700_000_000,
        "spec_cpu_period": 100_000,
        "spec_cpu_shares": 1024,
        "spec_memory_limit_bytes": 100,
        "spec_memory_swap_limit_bytes": 0,
    }
    assert {name: sample(found, name).value.value for name in expected} == expected
    assert sample(found, "fs_usage_bytes", "8:1").value.value == 4096
    assert sample(found, "fs_limit_bytes", "8:1").value.value == 1000
    assert sample(found, "ulimits_soft", "max_open_files").value.value == 1024
    assert sample(found, "memory_failures_total", "pgmajfault", "container").value.value == 2
    assert sample(found, "processes").metric_type == pb.GAUGE


@pytest.mark.parametrize("low", ["max", "", "-1", "9" * 25])
def test_memory_reservation_that_is_not_a_number_is_omitted(low: str) -> None:
    found = metrics(unified={"memory.low": low})
    assert "spec_memory_reservation_limit_bytes" not in names(found)
