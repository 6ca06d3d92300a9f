"""How large a pod's VM is."""

from __future__ import annotations

from collections.abc import Sequence

from sandbox.errors import InvalidSpec
from sandbox.plan.resources import DEFAULT_PERIOD_US
from sandbox.spec import Handler, PodSpec, Resources, VmSize

MIB = 1 << 20
# Minimum for the guest's kernel and agent before any container runs; with less a VM does not boot.
BOOT_FLOOR_MIB = 128
# Limits of huge pages are in bytes for each page size; this size is the only one that a guest can allocate
# at run time.
HUGE_PAGE = "2MB"
HUGE_PAGE_MIB = 2
# x86-64 without interrupt remapping: APIC ids have 8 bits, and 255 means all CPUs
MAX_VCPUS = 255

NOTHING = VmSize(memory_mib=0, vcpus=0)


def vm_size(pod: PodSpec, handler: Handler) -> VmSize:
    """Return the limits and overhead of a pod that has limits; else the size that the handler configures.

    Memory: containers may use all of their limit, so what the guest itself needs is added: the declared
    overhead, or the boot floor if that is larger. CPUs: rounded up, so that a limit of 1.8 is usable.
    """
    return VmSize(memory_mib=_memory_mib(pod, handler), vcpus=_vcpus(pod, handler))


def grown_size(
    current: VmSize,
    pod: Resources,
    overhead: Resources,
    containers: Sequence[Resources],
    unlimited: VmSize = NOTHING,
) -> VmSize:
    """Return the size with which the VM satisfies the limits of the pod and of its containers together;
    never less than `current`. Beside containers with limits, those without share `unlimited`; by themselves
    they need nothing. Huge pages are added, as memory limits do not count them. Raises InvalidSpec for huge
    pages of a size other than 2 MiB."""
    huge = max(current.huge_mib, huge_mib(pod), sum(huge_mib(each) for each in containers))
    memory = _demand(pod.memory_limit, [each.memory_limit for each in containers], unlimited.memory_mib * MIB)
    cpu = _demand(
        _cpu_microseconds(pod), [_cpu_microseconds(each) for each in containers], unlimited.vcpus * 1_000_000
    )
    return VmSize(
        memory_mib=huge
        + max(current.memory_mib - current.huge_mib, _with_overhead(memory, overhead) if memory > 0 else 0),
        vcpus=min(max(current.vcpus, _cpus(cpu, overhead) if cpu > 0 else 0), MAX_VCPUS),
        huge_mib=huge,
    )


def limited_size(limits: Resources) -> VmSize:
    """Return the memory and the whole CPUs of these limits alone; 0 for no limit."""
    memory = -(-max(0, limits.memory_limit) // MIB)
    return VmSize(memory_mib=memory, vcpus=_cpus(_cpu_microseconds(limits), Resources()))


def huge_mib(resources: Resources) -> int:
    """Return the limit of 2 MiB pages in MiB, rounded up to whole pages.

    Raises InvalidSpec for a limit in another size above 0: clients list every size that the host has.
    """
    for size, limit in resources.hugepage_limits.items():
        if limit > 0 and size != HUGE_PAGE:
            problem = f"{limit} bytes in pages of {size}, which a guest cannot allocate at run time"
            raise InvalidSpec("config.linux.resources.hugepage_limits", problem, f"pages of {HUGE_PAGE}")
    pages = -(-resources.hugepage_limits.get(HUGE_PAGE, 0) // (HUGE_PAGE_MIB * MIB))
    return pages * HUGE_PAGE_MIB


def _demand(pod: int, containers: Sequence[int], unlimited: int) -> int:
    """Return what the limits of a pod and its containers need together; 0 or less means none.

    A container without one may use what the pod's leaves it, or else `unlimited`: a kubelet sends the sum of
    the containers' limits as the pod's, also where some have none.
    """
    limited = [each for each in containers if each > 0]
    extra = unlimited if limited and len(limited) < len(containers) and pod <= sum(limited) else 0
    return max(pod, sum(limited) + extra)


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
    """Return CPU time per second; 0: no limit."""
    if resources.cpu_quota <= 0:
        return 0
    period = resources.cpu_period if resources.cpu_period > 0 else DEFAULT_PERIOD_US
    return -(-resources.cpu_quota * 1_000_000 // period)
