"""The VM that a handler's pods get, before any of them is known."""

from __future__ import annotations

from sandbox.plan.size import BOOT_FLOOR_MIB
from sandbox.spec import Handler, Value, VmSize
from sandbox.vmm import NicSpec, VmSpec

# What the first NIC has until its pod is known; locally administered.
FIRST_MAC = "02:00:00:68:75:73"
# Two shares, and what a network may have beyond its first interface.
PORTS = 6
NIC_PORTS = range(2, PORTS)
# A guest sets aside memory for each CPU and each GiB that it might be given, so there is a bound.
# Pods beyond it boot a VM of their own size.
GROWTH_MIB = 16 << 10
GROWTH_VCPUS = 16
SECTION_MIB = 128  # in which a kernel for x86-64 adds memory


class HostSize(Value, frozen=True, kw_only=True):
    """What this machine has: see `sandbox.host.size`."""

    memory_mib: int
    cpus: int


def base_size(handler: Handler) -> VmSize:
    """Of a VM that does not know its pod."""
    return VmSize(memory_mib=max(handler.memory_mib, BOOT_FLOOR_MIB), vcpus=max(handler.vcpus, 1))


def plan_vm(handler: Handler, *, accelerator: str, cpu: str, size: VmSize, host: HostSize) -> VmSpec:
    """Without names and places: those are a pod's own."""
    return VmSpec(
        pod_id="",
        run_dir="",
        kernel=handler.kernel,
        initramfs=handler.initramfs,
        machine=handler.machine,
        accelerator=accelerator,
        cpu=cpu,
        memory_mib=size.memory_mib,
        vcpus=size.vcpus,
        max_memory_mib=size.memory_mib + _room_mib(size, host),
        max_vcpus=max(size.vcpus, min(host.cpus, GROWTH_VCPUS)),
        ports=PORTS,
        nics=(NicSpec(mac=FIRST_MAC),),
    )


def _room_mib(size: VmSize, host: HostSize) -> int:
    room = max(0, min(host.memory_mib - size.memory_mib, GROWTH_MIB))
    return room - room % SECTION_MIB


def can_grow(spec: VmSpec, size: VmSize) -> bool:
    return size.memory_mib <= spec.max_memory_mib and size.vcpus <= spec.max_vcpus
