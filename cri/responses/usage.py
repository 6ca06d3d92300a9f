"""Converts samples of usage to CRI messages. Pure: no clock, files or event loop."""

from __future__ import annotations

from cri.proto import runtime_v1_pb2 as pb
from cri.responses import objects
from sandbox.records import ContainerRecord, PodRecord
from sandbox.stats.kernel_files import InterfaceUsage, Pressure, Psi
from sandbox.stats.parse import ContainerStats, CpuStats, MemoryStats, PodStats


def container_stats(
    record: ContainerRecord, stats: ContainerStats | None, layers_mountpoint: str
) -> pb.ContainerStats:
    """Return usage of a container; without `stats`, as it does not run, only its attributes."""
    attributes = pb.ContainerAttributes(
        id=record.id,
        metadata=objects.container_metadata(record),
        labels=record.spec.labels,
        annotations=record.spec.annotations,
    )
    if stats is None:
        return pb.ContainerStats(attributes=attributes)
    at_ns, usage = stats.at_ns, stats.usage
    response = pb.ContainerStats(
        attributes=attributes,
        cpu=_cpu(usage.cpu, at_ns),
        memory=_memory(usage.memory, at_ns),
        swap=pb.SwapUsage(
            timestamp=at_ns,
            swap_available_bytes=_count(usage.memory.swap_available),
            swap_usage_bytes=_count(usage.memory.swap_usage),
        ),
        io=pb.IoUsage(timestamp=at_ns, psi=_psi(usage.io_psi)),
    )
    if stats.layer is not None:
        layer = stats.layer
        response.writable_layer.CopyFrom(
            objects.filesystem(layers_mountpoint, layer.at_ns, layer.bytes, layer.inodes)
        )
    return response


def pod_stats(
    record: PodRecord, stats: PodStats | None, containers: list[pb.ContainerStats]
) -> pb.PodSandboxStats:
    """Return usage of a pod; without `stats`, as it is not ready, only its attributes."""
    attributes = pb.PodSandboxAttributes(
        id=record.id,
        metadata=objects.pod_metadata(record.spec),
        labels=record.spec.labels,
        annotations=record.spec.annotations,
    )
    if stats is None:
        return pb.PodSandboxStats(attributes=attributes)
    at_ns, usage = stats.at_ns, stats.usage
    return pb.PodSandboxStats(
        attributes=attributes,
        linux=pb.LinuxPodSandboxStats(
            cpu=_cpu(usage.cpu, at_ns),
            memory=_memory(usage.memory, at_ns),
            network=_network(stats),
            process=pb.ProcessUsage(timestamp=at_ns, process_count=_count(stats.processes)),
            containers=containers,
            io=pb.IoUsage(timestamp=at_ns, psi=_psi(usage.io_psi)),
        ),
    )


def _count(value: int) -> pb.UInt64Value:
    return pb.UInt64Value(value=value)


def _cpu(cpu: CpuStats, at_ns: int) -> pb.CpuUsage:
    return pb.CpuUsage(
        timestamp=at_ns,
        usage_core_nano_seconds=_count(cpu.usage_ns),
        usage_nano_cores=None if cpu.nano_cores is None else _count(cpu.nano_cores),
        psi=_psi(cpu.psi),
    )


def _memory(memory: MemoryStats, at_ns: int) -> pb.MemoryUsage:
    return pb.MemoryUsage(
        timestamp=at_ns,
        working_set_bytes=_count(memory.working_set),
        available_bytes=_count(memory.available),
        usage_bytes=_count(memory.usage),
        rss_bytes=_count(memory.rss),
        page_faults=_count(memory.page_faults),
        major_page_faults=_count(memory.major_page_faults),
        psi=_psi(memory.psi),
    )


def _network(stats: PodStats) -> pb.NetworkUsage | None:
    """Return usage of the interfaces, of which the first one is the default.

    None without any, as with the node's network: a kubelet crashes on a usage without a default interface.
    """
    if not stats.interfaces:
        return None
    default, *others = stats.interfaces
    return pb.NetworkUsage(
        timestamp=stats.at_ns,
        default_interface=_interface(default),
        interfaces=[_interface(other) for other in others],
    )


def _interface(usage: InterfaceUsage) -> pb.NetworkInterfaceUsage:
    return pb.NetworkInterfaceUsage(
        name=usage.name,
        rx_bytes=_count(usage.rx_bytes),
        rx_errors=_count(usage.rx_errors),
        tx_bytes=_count(usage.tx_bytes),
        tx_errors=_count(usage.tx_errors),
    )


def _psi(psi: Psi | None) -> pb.PsiStats | None:
    return None if psi is None else pb.PsiStats(Full=_pressure(psi.full), Some=_pressure(psi.some))


def _pressure(pressure: Pressure) -> pb.PsiData:
    return pb.PsiData(
        Total=min(pressure.total_us * 1000, 2**64 - 1),
        Avg10=pressure.avg10,
        Avg60=pressure.avg60,
        Avg300=pressure.avg300,
    )
