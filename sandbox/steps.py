"""What a running pod holds of the host, one step per resource, in the order in which they are made.

    run-dir   the directory of its sockets and shares
    cgroup    where its VMM and helpers live
    network   namespace, CNI attachments, address leases
    shares    what virtiofsd exports: shared, so that later binds appear there, and read-only itself
    vm        virtiofsd and the VMM
    guest     the conversation with the agent, and the pod as configured in the guest

Each `down` needs nothing but the pod's record. See `lifecycle` for the walk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from network.attach import Attachment, Networks, NetworkWish, PortMapping
from sandbox import mounts
from sandbox.cgroup import Cgroups
from sandbox.errors import VmmGone
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.lifecycle import Step
from sandbox.plan import compile_configure
from sandbox.pod import Pod
from sandbox.vmm import Hypervisor, NicSpec, ShareSpec, VmSpec

BOOT_TIMEOUT_S = 120.0
ROOTFS_TAG = "rootfs"
VOLUMES_TAG = "volumes"
GUEST_ROOTFS = "/run/husk/rootfs"
GUEST_VOLUMES = "/run/husk/volumes"
SHM_BYTES = 64 << 20  # contract of every runtime: 64 MiB


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
        await asyncio.to_thread(self.cgroups.create, pod.id, pod.record.spec.cgroup_parent)

    async def down(self, pod: Pod) -> None:
        await asyncio.to_thread(self.cgroups.remove, pod.id, pod.record.spec.cgroup_parent)


@dataclass(frozen=True, slots=True)
class Network:
    networks: Networks
    name = "network"

    async def up(self, pod: Pod) -> None:
        pod.update(network=await self.networks.up(self.wish(pod)))

    async def down(self, pod: Pod) -> None:
        await self.networks.down(pod.id)

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
    hypervisor: Hypervisor
    networks: Networks
    cgroups: Cgroups
    name = "vm"

    async def up(self, pod: Pod) -> None:
        taps = await self.networks.open_taps(pod.id)
        try:
            handle = await self.hypervisor.start(self.spec(pod), taps)
        finally:
            for tap in taps:
                os.close(tap)
        pod.update(vm=handle)

    async def down(self, pod: Pod) -> None:
        await pod.disconnect()
        await self.hypervisor.destroy(pod.id, pod.run_dir)

    def spec(self, pod: Pod) -> VmSpec:
        record, handler = pod.record, pod.handler
        assert handler is not None and record.size is not None and record.network is not None
        return VmSpec(
            pod_id=pod.id,
            run_dir=str(pod.run_dir),
            kernel=handler.kernel,
            initramfs=handler.initramfs,
            machine=handler.machine,
            accelerator=record.accelerator,
            cpu=record.cpu,
            memory_mib=record.size.memory_mib,
            vcpus=record.size.vcpus,
            shares=(
                # only the guest writes an image's root filesystem; volumes may change under it
                ShareSpec(tag=ROOTFS_TAG, source=str(pod.rootfs_share), cache="always"),
                ShareSpec(tag=VOLUMES_TAG, source=str(pod.volumes_share), cache="auto"),
            ),
            nics=tuple(NicSpec(mac=nic.mac, mtu=nic.mtu) for nic in record.network.interfaces),
            netns=record.network.netns,
            cgroups=self.cgroups.directories(pod.id, record.spec.cgroup_parent),
        )


@dataclass(frozen=True, slots=True)
class Guest:
    hypervisor: Hypervisor
    name = "guest"

    async def up(self, pod: Pod) -> None:
        welcome = await connect(self.hypervisor, pod, BOOT_TIMEOUT_S)
        pod.update(guest_kernel=welcome.kernel)
        assert pod.record.network is not None
        configure = self.configure(pod, pod.record.network)
        await pod.call(pb.Request(configure=configure))

    async def down(self, pod: Pod) -> None:
        await pod.disconnect()

    def configure(self, pod: Pod, network: Attachment) -> pb.Configure:
        return compile_configure(
            pod.record.spec,
            network,
            shares=((ROOTFS_TAG, GUEST_ROOTFS), (VOLUMES_TAG, GUEST_VOLUMES)),
            entropy=secrets.token_bytes(64),
            machine_id=pod.id[:32],
            shm_bytes=SHM_BYTES,
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


def pod_steps(hypervisor: Hypervisor, networks: Networks, cgroups: Cgroups) -> Sequence[Step[Pod]]:
    return (
        RunDir(),
        Cgroup(cgroups),
        Network(networks),
        Shares(),
        Vm(hypervisor, networks, cgroups),
        Guest(hypervisor),
    )
