"""How large a pod's VM is."""

from __future__ import annotations

from collections.abc import Sequence

from sandbox.resources import DEFAULT_PERIOD_US
from sandbox.spec import Handler, PodSpec, Resources, VmSize

MIB = 1 << 20
# What the guest's kernel and agent need before any container runs; below it a VM does not boot.
BOOT_FLOOR_MIB = 128
# q35 without interrupt remapping
MAX_VCPUS = 255


def vm_size(pod: PodSpec, handler: Handler) -> VmSize:
    """Limits and overhead of the pod, where it has limits; else what the handler is configured for.

    Memory: containers may use all of their limit, so the guest's own share comes on top: the
    declared overhead, or the boot floor where none, or too little, is declared.
    CPUs: rounded up, so that a limit of 1.8 can be used.
    """
    return VmSize(memory_mib=_memory_mib(pod, handler), vcpus=_vcpus(pod, handler))


def grown_size(
    current: VmSize, pod: Resources, overhead: Resources, containers: Sequence[Resources]
) -> VmSize:
    """What the VM needs so that neither the pod nor its containers together can ask for more than it
    has; never less than `current`. Who has no limit asks for nothing."""
    memory = max(pod.memory_limit, sum(max(0, each.memory_limit) for each in containers))
    cpu = max(_cpu_microseconds(pod), sum(_cpu_microseconds(each) for each in containers))
    return VmSize(
        memory_mib=max(current.memory_mib, _with_overhead(memory, overhead) if memory > 0 else 0),
        vcpus=min(max(current.vcpus, _cpus(cpu, overhead) if cpu > 0 else 0), MAX_VCPUS),
    )


def _memory_mib(pod: PodSpec, handler: Handler) -> int:
    limit = pod.resources.memory_limit
    if limit <= 0:
        return max(handler.memory_mib, BOOT_FLOOR_MIB)
    return _with_overhead(limit, pod.overhead)


def _with_overhead(limit: int, overhead: Resources) -> int:
    return -(-(limit + max(overhead.memory_limit, BOOT_FLOOR_MIB * MIB)) // MIB)


def _vcpus(pod: PodSpec, handler: Handler) -> int:
    limit = _cpu_microseconds(pod.resources)
    if limit <= 0:
        return max(handler.vcpus, 1)
    return min(_cpus(limit, pod.overhead), MAX_VCPUS)


def _cpus(microseconds: int, overhead: Resources) -> int:
    return -(-(microseconds + _cpu_microseconds(overhead)) // 1_000_000)


def _cpu_microseconds(resources: Resources) -> int:
    """CPU time a second; 0 where there is no limit."""
    if resources.cpu_quota <= 0:
        return 0
    period = resources.cpu_period if resources.cpu_period > 0 else DEFAULT_PERIOD_US
    return -(-resources.cpu_quota * 1_000_000 // period)
