"""What a running pod holds of the host, one step per resource.

    run-dir   the directory of its sockets and shares
    cgroup    where its VMM and helpers live
    netns     the network namespace, and the tap that will carry its first interface
    shares    what virtiofsd exports: shared, so that later binds appear there, and read-only itself
    vm        virtiofsd, the VMM, the conversation with the agent, the shares as mounted in the guest
    size      memory and CPUs that the pod needs beyond what its VM was started with
    network   CNI attachments, address leases
    guest     the pod as configured in the guest

None before `size` needs to know the pod: that is what the pool does ahead. `network` depends on none
behind `netns`, so it goes beside them. Each `down` needs nothing but the pod's record. See
`lifecycle` for the walk.

    alone:  run-dir, cgroup, netns, shares, (vm, size | network), guest
    pool:   run-dir, cgroup, netns, shares, vm           then, with a pod:  (cgroup, size | network), guest
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from network.attach import Attachment, Networks, NetworkWish, PortMapping
from sandbox import mounts
from sandbox.cgroup import Cgroups
from sandbox.errors import DeadlineExceeded, GuestError, GuestUnreachable, VmmError, VmmGone
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.lifecycle import Beside, Walk
from sandbox.plan import compile_configure
from sandbox.plan.vm import FIRST_MAC, NIC_PORTS, HostSize, base_size, can_grow, plan_vm
from sandbox.pod import Pod
from sandbox.records import PodState, Source
from sandbox.spec import VmSize
from sandbox.stages import Stage
from sandbox.templates import Templates
from sandbox.vmm import Hypervisor, NicSpec, ShareSpec, VmSpec

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
        pb.Share(tag=VOLUMES_TAG, path=GUEST_VOLUMES),
    ],
    shm_bytes=SHM_BYTES,
)


@dataclass(frozen=True, slots=True)
class RunDir:
    name = "run-dir"

    async def up(self, pod: Pod) -> None:
        pod.run_dir.mkdir(mode=0o711, parents=True)

    async def down(self, pod: Pod) -> None:
        await asyncio.to_thread(remove_tree, pod.run_dir)


def remove_tree(path: Path) -> None:
    """Detach whatever is mounted in a directory of ours, then delete it. Absent is fine."""
    mounts.unmount_tree(path)
    if path.exists():
        shutil.rmtree(path)


@dataclass(frozen=True, slots=True)
class Cgroup:
    cgroups: Cgroups
    name = "cgroup"

    async def up(self, pod: Pod) -> None:
        if pod.record.state is PodState.WAITING:
            await asyncio.to_thread(self.cgroups.create_waiting, pod.id)
        else:
            await asyncio.to_thread(self.cgroups.claim, pod.id, pod.record.spec.cgroup_parent)

    async def down(self, pod: Pod) -> None:
        await asyncio.to_thread(self.cgroups.remove, pod.id, pod.record.spec.cgroup_parent)


@dataclass(frozen=True, slots=True)
class Netns:
    networks: Networks
    name = "netns"

    async def up(self, pod: Pod) -> None:
        pod.tap = await self.networks.prepare(pod.id)

    async def down(self, pod: Pod) -> None:
        pod.close_tap()
        await self.networks.down(pod.id)


@dataclass(frozen=True, slots=True)
class Network:
    networks: Networks
    stage: Stage
    name = "network"

    async def up(self, pod: Pod) -> None:
        async with pod.queued(self.stage):
            pod.update(network=await self.networks.up(self.wish(pod)))

    async def down(self, pod: Pod) -> None:
        await self.networks.detach(pod.id)

    def wish(self, pod: Pod) -> NetworkWish:
        spec = pod.record.spec
        return NetworkWish(
            pod_id=pod.id,
            name=spec.name,
            namespace=spec.namespace,
            uid=spec.uid,
            annotations=spec.annotations,
            port_mappings=tuple(
                PortMapping(
                    protocol=port.protocol,
                    container_port=port.container_port,
                    host_port=port.host_port,
                    host_ip=port.host_ip,
                )
                for port in spec.port_mappings
                if port.host_port
            ),
        )


@dataclass(frozen=True, slots=True)
class Shares:
    """The directories that virtiofsd exports.

    `back/TAG` is where the host makes mount points; `share/TAG` is the same directory bound
    read-only and shared: binds made there reach virtiofsd's mount namespace, and the guest, which
    is not trusted, cannot plant a link for the host to follow.
    """

    name = "shares"

    async def up(self, pod: Pod) -> None:
        for share in (pod.rootfs_share, pod.volumes_share):
            back = pod.back_of(share)
            back.mkdir(mode=0o755, parents=True)
            share.mkdir(mode=0o755, parents=True)
            mounts.bind(back, share, recursive=False)
            mounts.make_readonly(share)
            mounts.set_propagation(share, mounts.MS_PRIVATE)
            mounts.set_propagation(share, mounts.MS_SHARED)

    async def down(self, pod: Pod) -> None:
        await asyncio.to_thread(mounts.unmount_tree, pod.run_dir / "share")


@dataclass(frozen=True, slots=True)
class Vm:
    """A VM whose agent answers and has its shares: continued from a template, or booted.

    A template that cannot be continued is given up, and the VM boots instead.
    """

    hypervisor: Hypervisor
    networks: Networks
    cgroups: Cgroups
    templates: Templates
    stage: Stage
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
        await self._start(pod, self.plan(pod, pod.record.size), BOOT_TIMEOUT_S, "boot")

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
            pod.update(vm=await self.hypervisor.start(own, (pod.require_tap(),)))
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


@dataclass(frozen=True, slots=True)
class Guest:
    networks: Networks
    name = "guest"

    async def up(self, pod: Pod) -> None:
        network = pod.record.network
        assert network is not None
        await self._plug_nics(pod, network)
        await pod.call(pb.Request(configure=self.configure(pod, network)))

    async def down(self, pod: Pod) -> None:
        await pod.disconnect()

    async def _plug_nics(self, pod: Pod, network: Attachment) -> None:
        """Interfaces beyond the first, which only the CNI configuration tells of."""
        others = network.interfaces[1:]
        if not others:
            return
        if len(others) > len(NIC_PORTS):
            raise VmmError(f"the network has {len(others) + 1} interfaces, a VM at most {len(NIC_PORTS) + 1}")
        assert pod.machine is not None
        taps = await self.networks.open_taps(pod.id, begin=1)
        try:
            for port, nic, tap in zip(NIC_PORTS, others, taps, strict=False):
                await pod.machine.plug_nic(port, NicSpec(mac=nic.mac, mtu=nic.mtu), tap)
        finally:
            for tap in taps:
                os.close(tap)

    def configure(self, pod: Pod, network: Attachment) -> pb.Configure:
        return compile_configure(
            pod.record.spec,
            network,
            entropy=secrets.token_bytes(64),
            machine_id=pod.id[:32],
            wall_ns=time.time_ns(),
            first_mac=FIRST_MAC,
        )


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
        for task in (greeting, death):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
    pod.connected.set()
    return pod.client.welcome


@dataclass(frozen=True, slots=True)
class Walks:
    """The ways from nothing to a pod; `whole` is also the way back."""

    whole: Walk[Pod]
    ahead: Walk[Pod]  # of a VM that waits for a pod
    claim: Walk[Pod]  # from there on


def pod_walks(vm: Vm, network_stage: Stage) -> Walks:
    networks, cgroup, size = vm.networks, Cgroup(vm.cgroups), Size(vm)
    network, guest = Network(networks, network_stage), Guest(networks)
    ahead: Walk[Pod] = (RunDir(), cgroup, Netns(networks), Shares())
    return Walks(
        whole=(*ahead, Beside(((vm, size), (network,))), guest),
        ahead=(*ahead, vm),
        # moving processes between cgroups of v1 takes as long as half a plug-in
        claim=(Beside(((cgroup, size), (network,))), guest),
    )
