"""Usage on the wire."""

from __future__ import annotations

from typing import Any

from cri.proto import runtime_v1_pb2 as pb
from cri.responses import usage
from sandbox.records import ContainerRecord, PodRecord
from sandbox.spec import ContainerId, ContainerSpec, ImageDefaults, PodId, PodSpec
from sandbox.stats.kernel_files import InterfaceUsage, Pressure, Psi
from sandbox.stats.parse import CgroupStats, ContainerStats, CpuStats, LayerStats, MemoryStats, PodStats

PSI = Psi(some=Pressure(avg10=1.5, total_us=7), full=Pressure(avg60=2.5))
USAGE = CgroupStats(
    cpu=CpuStats(usage_ns=42, nano_cores=7, psi=PSI),
    memory=MemoryStats(usage=50, working_set=30, available=70, rss=20, page_faults=3, swap_usage=4),
)
POD = PodRecord(id=PodId("p"), spec=PodSpec(name="n", namespace="ns", uid="u"), created_at_ns=1)
CONTAINER = ContainerRecord(
    id=ContainerId("c"),
    pod_id=POD.id,
    spec=ContainerSpec(name="app", image="i", labels={"a": "b"}),
    created_at_ns=1,
    image_id="i",
    image_ref="i",
    defaults=ImageDefaults(),
)


def container(**fields: Any) -> pb.ContainerStats:
    stats = ContainerStats(container_id=CONTAINER.id, at_ns=9, **fields)
    return usage.container_stats(CONTAINER, stats, "/var/lib/husk")


def test_container_stats_have_every_value() -> None:
    answer = container(usage=USAGE, layer=LayerStats(at_ns=8, bytes=4096, inodes=2))
    assert (answer.attributes.metadata.name, dict(answer.attributes.labels)) == ("app", {"a": "b"})
    assert (answer.cpu.timestamp, answer.cpu.usage_core_nano_seconds.value) == (9, 42)
    assert answer.cpu.usage_nano_cores.value == 7
    assert (answer.cpu.psi.Some.Avg10, answer.cpu.psi.Some.Total, answer.cpu.psi.Full.Avg60) == (
        1.5,
        7000,
        2.5,
    )
    memory = answer.memory
    assert (memory.usage_bytes.value, memory.working_set_bytes.value, memory.rss_bytes.value) == (50, 30, 20)
    assert (memory.available_bytes.value, memory.page_faults.value) == (70, 3)
    assert not memory.HasField("psi")
    assert (answer.swap.swap_usage_bytes.value, answer.swap.swap_available_bytes.value) == (4, 0)
    assert (answer.io.timestamp, answer.io.HasField("psi")) == (9, False)
    layer = answer.writable_layer
    assert (layer.timestamp, layer.fs_id.mountpoint) == (8, "/var/lib/husk")
    assert (layer.used_bytes.value, layer.inodes_used.value) == (4096, 2)


def test_unknown_values_are_unset() -> None:
    answer = container()
    assert not answer.HasField("writable_layer")
    assert not answer.cpu.HasField("usage_nano_cores")
    gone = usage.container_stats(CONTAINER, None, "/")
    assert gone.attributes.id == "c"
    assert not gone.HasField("cpu")


def test_pod_stats_have_interfaces_processes_and_containers() -> None:
    nics = tuple(InterfaceUsage(name=name, rx_bytes=1, tx_errors=2) for name in ("eth0", "eth1"))
    stats = PodStats(
        pod_id=POD.id,
        at_ns=9,
        usage=USAGE,
        interfaces=nics,
        containers=(ContainerStats(container_id=CONTAINER.id, at_ns=9, processes=3),),
    )
    answer = usage.pod_stats(POD, stats, [container(usage=USAGE)])
    linux = answer.linux
    assert answer.attributes.metadata.namespace == "ns"
    assert (linux.cpu.usage_core_nano_seconds.value, linux.memory.working_set_bytes.value) == (42, 30)
    assert (linux.process.process_count.value, linux.process.timestamp, linux.io.timestamp) == (3, 9, 9)
    default = linux.network.default_interface
    assert (default.name, default.rx_bytes.value, default.tx_errors.value) == ("eth0", 1, 2)
    assert [nic.name for nic in linux.network.interfaces] == ["eth1"], "the default one is not listed twice"
    assert [one.attributes.id for one in linux.containers] == ["c"]


def test_pod_stats_without_network_or_sample_leave_it_unset() -> None:
    alone = usage.pod_stats(POD, PodStats(pod_id=POD.id, at_ns=9), [])
    assert not alone.linux.HasField("network"), "a kubelet would expect its default interface"
    ended = usage.pod_stats(POD, None, [])
    assert ended.attributes.id == "p"
    assert not ended.HasField("linux")
