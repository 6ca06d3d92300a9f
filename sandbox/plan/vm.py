"""The VM that a handler's pods get, before any of them is known."""

from __future__ import annotations

from collections.abc import Mapping

from sandbox.errors import BeyondNode
from sandbox.plan.size import BOOT_FLOOR_MIB, limited_size
from sandbox.spec import Handler, Resources, Value, VmSize
from sandbox.vmm import NicSpec, VmSpec

# MAC of the first NIC until its pod is known; locally administered.
FIRST_MAC = "02:00:00:68:75:73"
MAX_NICS = 5  # interfaces that a network may give a pod
MAX_DISKS = 24  # disks that the containers of a pod may have at one time
# A guest reserves memory for each CPU and each GiB that may be added, so growth is bounded.
# Pods that need more boot a VM of their size.
GROWTH_MIB = 16 << 10
GROWTH_VCPUS = 16
SECTION_MIB = 128  # granularity in which a kernel for x86-64 adds memory


class HostSize(Value, frozen=True, kw_only=True):
    """Memory and CPUs of this machine: see `sandbox.host.size`."""

    memory_mib: int
    cpus: int


def base_size(handler: Handler) -> VmSize:
    """Return the size of a VM whose pod is not known: the handler's, at least what a guest needs to boot."""
    return VmSize(memory_mib=max(handler.memory_mib, BOOT_FLOOR_MIB), vcpus=max(handler.vcpus, 1))


def plan_vm(
    handler: Handler, *, accelerator: str, options: Mapping[str, str], size: VmSize, host: HostSize
) -> VmSpec:
    """Return the VmSpec of a handler's VM, without the names and paths of a pod.

    `options` are those that the accelerator needs; the handler's own take precedence over them.
    """
    return VmSpec(
        hypervisor=handler.hypervisor,
        pod_id="",
        run_dir="",
        kernel=handler.kernel,
        initramfs=handler.initramfs,
        accelerator=accelerator,
        options={**options, **handler.options},
        memory_mib=size.memory_mib,
        vcpus=size.vcpus,
        max_memory_mib=size.memory_mib + _growth_mib(size, host),
        max_vcpus=max(size.vcpus, min(host.cpus, GROWTH_VCPUS)),
        max_nics=MAX_NICS,
        max_disks=MAX_DISKS,
        nics=(NicSpec(mac=FIRST_MAC),),
    )


def _growth_mib(size: VmSize, host: HostSize) -> int:
    growth = max(0, min(host.memory_mib - size.memory_mib, GROWTH_MIB))
    return growth - growth % SECTION_MIB


def within_node(wanted: VmSize, current: VmSize, host: HostSize) -> VmSize:
    """Return what of a size this machine has: limits may together exceed that, as on a node without VMs.
    Never less than `current`."""
    whole = host.memory_mib - host.memory_mib % SECTION_MIB
    return VmSize(
        memory_mib=min(wanted.memory_mib, max(whole, current.memory_mib)),
        vcpus=min(wanted.vcpus, max(host.cpus, current.vcpus)),
        huge_mib=wanted.huge_mib,
    )


def check_limits(limits: Resources, current: VmSize, host: HostSize) -> None:
    """Raise BeyondNode for a limit that neither the machine has nor the VM, which may have booted larger."""
    wanted = limited_size(limits)
    has = f"the node has {host.memory_mib} MiB and {host.cpus} CPUs"
    if wanted.memory_mib > max(host.memory_mib, current.memory_mib):
        raise BeyondNode("memory_limit_in_bytes", f"{wanted.memory_mib} MiB", has)
    if wanted.vcpus > max(host.cpus, current.vcpus):
        raise BeyondNode("cpu_quota", f"{wanted.vcpus} CPUs", has)


def check_growth(spec: VmSpec, size: VmSize, host: HostSize) -> None:
    """Raise BeyondNode where a running VM cannot be grown to this size."""
    if not can_grow(spec, size):
        raise BeyondNode(
            "limits of the pod's containers",
            f"{size.memory_mib} MiB and {size.vcpus} CPUs, with what the guest needs,",
            f"this VM can have {spec.max_memory_mib} MiB and {spec.max_vcpus} CPUs, "
            f"the node {host.memory_mib} MiB and {host.cpus} CPUs",
        )


def can_grow(spec: VmSpec, size: VmSize) -> bool:
    """Return whether a VM of this spec can be grown to this size."""
    return size.memory_mib <= spec.max_memory_mib and size.vcpus <= spec.max_vcpus
