"""How large a pod's VM is."""

from __future__ import annotations

from collections.abc import Sequence

from sandbox.errors import InvalidSpec
from sandbox.plan.resources import DEFAULT_PERIOD_US
from sandbox.spec import Handler, PodSpec, Resources, VmSize

MIB = 1 << 20
# What the guest's kernel and agent need before any container runs; below it a VM does not boot.
BOOT_FLOOR_MIB = 128
# Limits of huge pages are bytes of one page size each; this is the one that a guest can find at run time.
HUGE_PAGE = "2MB"
HUGE_PAGE_MIB = 2
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
    has; never less than `current`. Who has no limit asks for nothing. Huge pages come on top, as no
    limit of memory counts them. Raises InvalidSpec for pages of another size than 2 MiB."""
    huge = max(current.huge_mib, huge_mib(pod), sum(huge_mib(each) for each in containers))
    memory = max(pod.memory_limit, sum(max(0, each.memory_limit) for each in containers))
    cpu = max(_cpu_microseconds(pod), sum(_cpu_microseconds(each) for each in containers))
    return VmSize(
        memory_mib=huge
        + max(current.memory_mib - current.huge_mib, _with_overhead(memory, overhead) if memory > 0 else 0),
        vcpus=min(max(current.vcpus, _cpus(cpu, overhead) if cpu > 0 else 0), MAX_VCPUS),
        huge_mib=huge,
    )


def huge_mib(resources: Resources) -> int:
    """Whole huge pages. Raises InvalidSpec; 0 of a size is no wish, as clients list all sizes of the host."""
    for size, limit in resources.hugepage_limits.items():
        if limit > 0 and size != HUGE_PAGE:
            problem = f"{limit} bytes in pages of {size}, which a guest cannot find once it runs"
            raise InvalidSpec("config.linux.resources.hugepage_limits", problem, f"pages of {HUGE_PAGE}")
    pages = -(-resources.hugepage_limits.get(HUGE_PAGE, 0) // (HUGE_PAGE_MIB * MIB))
    return pages * HUGE_PAGE_MIB


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
