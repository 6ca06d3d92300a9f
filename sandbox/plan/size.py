"""How large a pod's VM is."""

from __future__ import annotations

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


def _memory_mib(pod: PodSpec, handler: Handler) -> int:
    limit = pod.resources.memory_limit
    if limit <= 0:
        return max(handler.memory_mib, BOOT_FLOOR_MIB)
    overhead = max(pod.overhead.memory_limit, BOOT_FLOOR_MIB * MIB)
    return -(-(limit + overhead) // MIB)


def _vcpus(pod: PodSpec, handler: Handler) -> int:
    limit = _cpu_microseconds(pod.resources)
    if limit <= 0:
        return max(handler.vcpus, 1)
    total = limit + _cpu_microseconds(pod.overhead)
    return min(-(-total // 1_000_000), MAX_VCPUS)


def _cpu_microseconds(resources: Resources) -> int:
    """CPU time a second; 0 where there is no limit."""
    if resources.cpu_quota <= 0:
        return 0
    period = resources.cpu_period if resources.cpu_period > 0 else DEFAULT_PERIOD_US
    return -(-resources.cpu_quota * 1_000_000 // period)
