"""What a running pod holds of the host, one step per resource.

    run-dir   the directory of its sockets and shares
    cgroup    where its VMM and helpers live
    netns     the network namespace, and the tap that will carry its first interface
    shares    what virtiofsd exports: shared, so that later binds appear there, and read-only itself
    vm        virtiofsd, the VMM, the conversation with the agent, the shares as mounted in the guest
    size      memory and CPUs that the pod needs beyond what its VM was started with
    identity  what tells its guest from every other: entropy, clock, names
    network   CNI attachments, address leases
    guest     the network as configured in the guest

None before `size` needs to know the pod: that is what the pool does ahead. `network` depends on none
behind `netns`, so it goes beside them. Each `down` needs nothing but the pod's record. See
`lifecycle` for the order.

    alone:  run-dir, cgroup, netns, shares, (vm, size, identity | network), guest
    pool:   run-dir, cgroup, netns, shares, vm    then, with a pod:  (cgroup, size, identity | network), guest
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from network.attach import Attachment, NetworkRequest, Networks, PortMapping
from sandbox.errors import VmmError
from sandbox.guest import guest_pb2 as pb
from sandbox.host import mounts, syscalls
from sandbox.host.cgroup import Cgroups
from sandbox.host.limiter import Limiter
from sandbox.lifecycle import Parallel, Steps
from sandbox.plan import compile_identity, compile_network
from sandbox.plan.encode import encode_configuration
from sandbox.plan.vm import FIRST_MAC, NIC_PORTS
from sandbox.pod import Pod
from sandbox.records import PodState, Source
from sandbox.vm_pods.steps import Size, Vm
from sandbox.vmm import NicSpec


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
    stage: Limiter
    name = "network"

    async def up(self, pod: Pod) -> None:
        async with pod.queued(self.stage):
            pod.update(network=await self.networks.up(self.wish(pod)))

    async def down(self, pod: Pod) -> None:
        await self.networks.detach(pod.id)

    def wish(self, pod: Pod) -> NetworkRequest:
        spec = pod.record.spec
        return NetworkRequest(
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
            mounts.set_propagation(share, syscalls.MS_PRIVATE)
            mounts.set_propagation(share, syscalls.MS_SHARED)

    async def down(self, pod: Pod) -> None:
        await asyncio.to_thread(mounts.unmount_tree, pod.run_dir / "share")


@dataclass(frozen=True, slots=True)
class Identity:
    name = "identity"

    async def up(self, pod: Pod) -> None:
        identity = compile_identity(
            pod.record.spec,
            entropy=secrets.token_bytes(64),
            machine_id=pod.id[:32],
            wall_ns=time.time_ns(),
        )
        await pod.call(pb.Request(configure=encode_configuration(identity)))

    async def down(self, pod: Pod) -> None:
        """It ends with the VM."""


@dataclass(frozen=True, slots=True)
class Guest:
    networks: Networks
    name = "guest"

    async def up(self, pod: Pod) -> None:
        network = pod.record.network
        assert network is not None
        await self._plug_nics(pod, network)
        configuration = compile_network(pod.record.spec, network, first_mac=FIRST_MAC)
        await pod.call(pb.Request(configure=encode_configuration(configuration)))
        if pod.record.source is Source.BOOT:  # another guest is as old as its template
            pod.record_guest_phases()

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


@dataclass(frozen=True, slots=True)
class PodSteps:
    """The ways from nothing to a pod; `whole` is also the way back."""

    whole: Steps[Pod]
    ahead: Steps[Pod]  # of a VM that waits for a pod
    claim: Steps[Pod]  # from there on


def pod_steps(vm: Vm, network_stage: Limiter) -> PodSteps:
    networks, cgroup, size, identity = vm.networks, Cgroup(vm.cgroups), Size(vm), Identity()
    network, guest = Network(networks, network_stage), Guest(networks)
    ahead: Steps[Pod] = (RunDir(), cgroup, Netns(networks), Shares())
    return PodSteps(
        whole=(*ahead, Parallel(((vm, size, identity), (network,))), guest),
        ahead=(*ahead, vm),
        # moving processes between cgroups of v1 takes as long as half a plug-in
        claim=(Parallel(((cgroup, size, identity), (network,))), guest),
    )
