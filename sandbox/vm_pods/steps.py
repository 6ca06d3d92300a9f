"""The steps of a pod's VM: having one, from a template or from a boot, and giving it its size.

See `steps` for where they stand in a pod's walk, and `factory` for the VMs that are made ahead.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec

from network.attach import Networks
from sandbox.errors import DeadlineExceeded, GuestError, GuestUnreachable, VmmError, VmmGone
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.host.cgroup import Cgroups
from sandbox.host.limiter import Limiter
from sandbox.host.tasks import end
from sandbox.plan.vm import HostSize, base_size, can_grow, plan_vm
from sandbox.pod import Pod
from sandbox.records import PodState, Source
from sandbox.spec import VmSize
from sandbox.vm_pods.clock_sync import check_clock
from sandbox.vm_pods.templates import Templates
from sandbox.vmm import Hypervisor, ShareSpec, VmSpec

log = logging.getLogger(__name__)

BOOT_TIMEOUT_S = 120.0
RESTORE_TIMEOUT_S = 20.0
ROOTFS_TAG = "rootfs"
VOLUMES_TAG = "volumes"
GUEST_ROOTFS = "/run/husk/rootfs"
GUEST_VOLUMES = "/run/husk/volumes"
SHM_BYTES = 64 << 20  # contract of every runtime: 64 MiB
PREPARE = pb.Prepare(
    shares=[
        pb.Share(tag=ROOTFS_TAG, path=GUEST_ROOTFS),
        pb.Share(tag=VOLUMES_TAG, path=GUEST_VOLUMES, submounts=True),
    ],
    shm_bytes=SHM_BYTES,
)


@dataclass(frozen=True, slots=True)
class Vm:
    """A VM whose agent answers and has its shares: continued from a template, or booted.

    A template that cannot be continued is given up, and the VM boots instead.
    """

    hypervisor: Hypervisor
    networks: Networks
    cgroups: Cgroups
    templates: Templates
    stage: Limiter
    host: HostSize
    name = "vm"

    async def up(self, pod: Pod) -> None:
        async with pod.queued(self.stage):
            template = await self.find_template(pod)
            if template is None or not await self._continue(pod, template):
                await self.boot(pod)

    async def down(self, pod: Pod) -> None:
        await pod.disconnect()
        await self.hypervisor.destroy(pod.id, pod.run_dir)

    async def find_template(self, pod: Pod) -> Path | None:
        """That of the pod's handler, if it is there and the VM could be grown to the pod's size."""
        handler, size = pod.require_handler(), pod.record.size
        if handler.source == "boot" or size is None:
            return None
        base = self.plan(pod, base_size(handler))
        return self.templates.find(await self.hypervisor.fingerprint(base)) if can_grow(base, size) else None

    def plan(self, pod: Pod, size: VmSize) -> VmSpec:
        record = pod.record
        handler = pod.require_handler()
        return plan_vm(handler, accelerator=record.accelerator, cpu=record.cpu, size=size, host=self.host)

    async def boot(self, pod: Pod) -> None:
        """A VM of the pod's own size, from the kernel on."""
        assert pod.record.size is not None
        source = Source.POOL if pod.record.state is PodState.WAITING else Source.BOOT
        pod.update(source=source)
        spec = self.plan(pod, pod.record.size)
        await self._start(pod, spec, BOOT_TIMEOUT_S, "boot")
        try:
            self._check_clock(pod)
        except VmmError as error:
            log.error("pod %s boots once more: %s", pod.id, error)
            await self.down(pod)
            await self._start(pod, spec, BOOT_TIMEOUT_S, "boot")
            self._check_clock(pod)

    def _check_clock(self, pod: Pod) -> None:
        assert pod.client is not None and pod.record.vm is not None
        check_clock(pod.client, pod.record.vm.vmm)

    async def _continue(self, pod: Pod, template: Path) -> bool:
        spec = self.plan(pod, base_size(pod.require_handler()))
        if pod.record.state is not PodState.WAITING:
            pod.update(source=Source.TEMPLATE)
        try:
            spec = msgspec.structs.replace(spec, template=str(template))
            await self._start(pod, spec, RESTORE_TIMEOUT_S, "restore")
        except (VmmError, GuestUnreachable, GuestError, DeadlineExceeded) as error:
            log.error("template %s is broken and given up; the VM boots instead: %s", template.name, error)
            await asyncio.to_thread(self.templates.discard, template)
            await self.down(pod)
            return False
        return True

    async def _start(self, pod: Pod, spec: VmSpec, timeout_s: float, phase: str) -> None:
        own = msgspec.structs.replace(
            spec,
            pod_id=pod.id,
            run_dir=str(pod.run_dir),
            netns=str(self.networks.netns_of(pod.id)),
            cgroups=self.directories(pod),
            shares=(
                # only the guest writes an image's root filesystem; volumes may change under it
                ShareSpec(tag=ROOTFS_TAG, source=str(pod.rootfs_share), cache="always"),
                ShareSpec(tag=VOLUMES_TAG, source=str(pod.volumes_share), cache="auto"),
            ),
        )
        with pod.phase(phase):
            pod.machine = await self.hypervisor.start(own, (pod.require_tap(),))
            pod.update(vm=pod.machine.handle)
        with pod.phase("agent"):
            welcome = await connect(self.hypervisor, pod, timeout_s)
        with pod.phase("mounts"):
            await pod.call(pb.Request(prepare=PREPARE), timeout_s)
        pod.update(guest_kernel=welcome.kernel)

    def directories(self, pod: Pod) -> tuple[str, ...]:
        waiting = pod.record.state is PodState.WAITING
        parent = self.cgroups.waiting if waiting else pod.record.spec.cgroup_parent
        return self.cgroups.directories(pod.id, parent)


@dataclass(frozen=True, slots=True)
class Size:
    """Wake a VM that waited, and give it what its pod needs beyond its size.

    A guest that cannot take that (a kernel without virtio-mem, say) is replaced by one that boots
    with the right size; nothing is in it yet.
    """

    vm: Vm
    name = "size"

    async def up(self, pod: Pod) -> None:
        try:
            await self._wake_and_grow(pod)
        except (VmmError, GuestError, GuestUnreachable, DeadlineExceeded) as error:
            log.error("pod %s: its VM cannot be used, and another one boots: %s", pod.id, error)
            await self.vm.down(pod)
            async with pod.queued(self.vm.stage):
                await self.vm.boot(pod)
        pod.close_tap()

    async def down(self, pod: Pod) -> None:
        pod.close_tap()

    async def _wake_and_grow(self, pod: Pod) -> None:
        machine, size, vm = pod.machine, pod.record.size, pod.record.vm
        if machine is None or vm is None:
            raise VmmGone("the VM that waited is gone")
        assert size is not None
        if pod.record.source is Source.POOL:
            with pod.phase("resume"):
                await machine.resume()
        spec = vm.spec
        if size.memory_mib > spec.memory_mib or size.vcpus > spec.vcpus:
            with pod.phase("grow"):
                await grow(pod, size)


async def grow(pod: Pod, size: VmSize) -> None:
    """Give a running VM this size, in the guest too. Raises VmmError when it cannot have or take it."""
    if pod.machine is None:
        raise VmmGone("its VM is gone")
    await pod.machine.grow(size.memory_mib, size.vcpus)
    await pod.call(pb.Request(online_cpus=pb.OnlineCpus(count=size.vcpus)))
    pod.update(size=size)


async def connect(hypervisor: Hypervisor, pod: Pod, timeout_s: float) -> pb.Welcome:
    """Attach to the pod's VM and open a new epoch with its agent; for a boot and for an adoption.

    The epoch is saved before it is used, so no two daemons ever share one.
    Raises VmmGone as soon as the VMM ends, GuestUnreachable at the deadline.
    """
    handle = pod.record.vm
    assert handle is not None
    if pod.machine is None:
        pod.machine = await hypervisor.attach(handle)
    pod.update(epoch=pod.record.epoch + 1)
    greeting = asyncio.create_task(
        GuestClient.connect(
            handle.channel,
            token=pod.record.token,
            epoch=pod.record.epoch,
            on_event=pod.take_event,
            timeout_s=timeout_s,
        )
    )
    death = asyncio.create_task(pod.machine.wait())
    try:
        await asyncio.wait({greeting, death}, return_when=asyncio.FIRST_COMPLETED)
        if not greeting.done():
            raise VmmGone(f"the VM ended while its agent was awaited: {death.result()}")
        pod.client = greeting.result()
    finally:
        await end(greeting, death)
    pod.connected.set()
    return pod.client.welcome
