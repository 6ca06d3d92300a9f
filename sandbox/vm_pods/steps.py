"""The steps of a pod in a VM, and their order.

    run-dir, cgroup, netns, shares    see `steps.pod`
    vm        virtiofsd, the VMM, the connection to the agent, the shares as mounted in the guest
    size      memory and CPUs that the pod needs beyond what its VM was started with
    identity  what distinguishes its guest from every other: entropy, clock, names
    network   CNI attachments, address leases
    guest     the network as configured in the guest

None before `size` needs the pod's specification, so the pool runs these ahead. `network` needs none but
`netns`, so it runs beside the VM's.

    boot, template:  run-dir, cgroup, netns, shares, (vm, size, identity | network), guest
    pool:            run-dir, cgroup, netns, shares, vm   then: (cgroup, size, identity | network), guest
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from image.stores import RootfsStore
from network.attach import Attachment, Networks
from sandbox.apparmor import policy_for
from sandbox.errors import DeadlineExceeded, GuestError, GuestUnreachable, VmmError, VmmGone
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.host import process
from sandbox.host.cgroup import Cgroups
from sandbox.host.limiter import Limiter
from sandbox.host.tasks import end
from sandbox.lifecycle import Parallel, Steps
from sandbox.plan import compile_identity, compile_network
from sandbox.plan.devices import guest_devices
from sandbox.plan.encode import encode_configuration
from sandbox.plan.shares import GUEST_ROOTFS, GUEST_VOLUMES, ROOTFS_TAG, SHM_BYTES, VOLUMES_TAG
from sandbox.plan.values import HostShare
from sandbox.plan.vm import FIRST_MAC, MAX_NICS, HostSize, base_size, can_grow, plan_vm
from sandbox.pod import Pod
from sandbox.records import PodState, Source
from sandbox.spec import VmSize
from sandbox.steps.container import CompiledPlan
from sandbox.steps.pod import Cgroup, Netns, Network, RunDir, Shares
from sandbox.vm_pods.boot_image import modules_of
from sandbox.vm_pods.boot_phases import guest_phases
from sandbox.vm_pods.clock_sync import check_clock
from sandbox.vm_pods.disks import guest_disks
from sandbox.vm_pods.inode_watch import guest_bound, lowest_limit
from sandbox.vm_pods.link import link_of
from sandbox.vm_pods.rootfs import guest_root
from sandbox.vm_pods.runtime import handle_of, runtime_of
from sandbox.vm_pods.templates import Templates
from sandbox.vm_pods.volumes import find_sources
from sandbox.vmm import Hypervisor, NicSpec, ShareSpec, VmSpec

log = logging.getLogger(__name__)

UNSAVED_EPOCHS = 1 << 40  # how far an epoch that cannot be saved is from the saved one at most

# What the host limits a VM to beyond its memory, where no client does: VMM (its cache of translated code has
# 128 MiB under emulation), virtiofsd, and the kernel's share of both.
MARGIN_MIB = 512
MAX_PROCESSES = 1024  # and threads
BOOT_TIMEOUT_S = 120.0
RESTORE_TIMEOUT_S = 20.0
EXIT_GRACE_S = 1.0  # between the end of the connection and the exit of the VMM, where that is the cause
SHARES = (
    pb.Share(tag=ROOTFS_TAG, path=GUEST_ROOTFS),
    pb.Share(tag=VOLUMES_TAG, path=GUEST_VOLUMES, submounts=True),
)


@dataclass(frozen=True, slots=True)
class Vm:
    """A VM whose agent answers and has mounted its shares: restored from a template, or booted.

    A template that cannot be restored is deleted, and the VM boots instead. `stage` limits how many VMs start
    at the same time.
    """

    hypervisor: Hypervisor
    networks: Networks
    cgroups: Cgroups
    templates: Templates
    stage: Limiter
    host: HostSize
    name = "vm"

    async def up(self, pod: Pod) -> None:
        """Start the VM. Raises VmmError, GuestUnreachable, GuestError, DeadlineExceeded."""
        async with pod.queued(self.stage):
            template = await self.find_template(pod)
            if template is None or not await self._continue(pod, template):
                await self.boot(pod)

    async def down(self, pod: Pod) -> None:
        """End the VM and its helpers, which are found by the pod's id. Idempotent."""
        await pod.disconnect()
        await self.hypervisor.destroy(pod.id, pod.run_dir)

    async def find_template(self, pod: Pod) -> Path | None:
        """Return the template of the pod's handler, if there is one and its VM can grow to the pod's size."""
        handler, size = pod.require_handler(), runtime_of(pod).size
        if handler.source == "boot" or size is None:
            return None
        base = self.plan(pod, base_size(handler))
        return self.templates.find(await self.hypervisor.fingerprint(base)) if can_grow(base, size) else None

    def plan(self, pod: Pod, size: VmSize) -> VmSpec:
        """Return the specification of a VM of this size for the pod's handler, without the pod's names."""
        runtime, handler = runtime_of(pod), pod.require_handler()
        return plan_vm(
            handler, accelerator=runtime.accelerator, options=runtime.options, size=size, host=self.host
        )

    async def boot(self, pod: Pod) -> None:
        """Boot a VM of the pod's size. One whose clock is wrong is booted once more. Raises as `up`."""
        size = runtime_of(pod).size
        assert size is not None
        source = Source.POOL if pod.record.state is PodState.WAITING else Source.BOOT
        pod.update_runtime(source=source)
        spec = self.plan(pod, size)
        await self._start(pod, spec, BOOT_TIMEOUT_S, "boot")
        try:
            self._check_clock(pod)
        except VmmError as error:
            log.error("pod %s: its VM is booted once more: %s", pod.id, error)
            await self.down(pod)
            await self._start(pod, spec, BOOT_TIMEOUT_S, "boot")
            self._check_clock(pod)

    def _check_clock(self, pod: Pod) -> None:
        client = link_of(pod).client
        assert client is not None
        check_clock(client, handle_of(pod).vmm)

    async def _continue(self, pod: Pod, template: Path) -> bool:
        spec = self.plan(pod, base_size(pod.require_handler()))
        if pod.record.state is not PodState.WAITING:
            pod.update_runtime(source=Source.TEMPLATE)
        try:
            spec = msgspec.structs.replace(spec, template=str(template))
            await self._start(pod, spec, RESTORE_TIMEOUT_S, "restore")
        except (VmmError, GuestUnreachable, GuestError, DeadlineExceeded) as error:
            problem = "template %s cannot be restored and is deleted; the VM boots instead: %s"
            log.error(problem, template.name, error)
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
        await self.limit(pod, own.memory_mib)
        with pod.phase(phase):
            machine = await self.hypervisor.start(own, (pod.require_tap(),))
            link_of(pod).machine = machine
            pod.update_runtime(handle=machine.handle)
        with pod.phase("agent"):
            welcome = await connect(self.hypervisor, pod, timeout_s)
        with pod.phase("mounts"):
            helpers = [helper.pid for helper in machine.handle.helpers.values()]
            inodes = guest_bound(await asyncio.to_thread(lowest_limit, helpers))
            prepare = pb.Prepare(shares=SHARES, shm_bytes=SHM_BYTES, cached_inodes=inodes)
            await link_of(pod).call(pb.Request(prepare=prepare), timeout_s)
        pod.update_runtime(guest_kernel=welcome.kernel)

    async def grow(self, pod: Pod, size: VmSize) -> None:
        """Grow a running VM to this size, after the host's limit. Raises as the function `grow` does."""
        await self.limit(pod, size.memory_mib)
        await grow(pod, size)

    async def limit(self, pod: Pod, memory_mib: int) -> None:
        """Limit what the host gives to a VM of this size, where no client has limited the cgroup above."""
        if not pod.record.spec.cgroup_parent and pod.record.state is not PodState.WAITING:
            memory = (memory_mib + MARGIN_MIB) << 20
            await asyncio.to_thread(self.cgroups.limit, pod.id, memory, MAX_PROCESSES)

    async def confine(self, pod: Pod, share: HostShare) -> None:
        """Set what the VM's processes may use of the host. Raises InvalidSpec, OSError."""
        await asyncio.to_thread(self._confine, pod, share)

    def _confine(self, pod: Pod, share: HostShare) -> None:
        parent = pod.record.spec.cgroup_parent
        self.cgroups.confine(pod.id, parent, share.cpus, share.mems)
        if not parent:
            shares, quota_us, period_us = share.cpu_shares, share.cpu_quota_us, share.cpu_period_us
            self.cgroups.weigh(pod.id, shares=shares, quota_us=quota_us, period_us=period_us)
        score = share.oom_score_adj
        if score is not None and not self.cgroups.set_oom_score(pod.id, parent, score):
            log.warning(
                "pod %s: oom_score_adj of its VM is the daemon's, not %d: CAP_SYS_RESOURCE is missing",
                pod.id, score,
            )  # fmt: skip

    def directories(self, pod: Pod) -> tuple[str, ...]:
        """Return the cgroup directories that the VMM and its helpers join."""
        waiting = pod.record.state is PodState.WAITING
        parent = self.cgroups.pool_parent if waiting else pod.record.spec.cgroup_parent
        return self.cgroups.directories(pod.id, parent)


@dataclass(frozen=True, slots=True)
class Size:
    """Resume a pooled VM, and hot-plug the memory and CPUs that its pod needs.

    A guest that does not accept them (a kernel without virtio-mem, for example) is replaced by one that boots
    with the right size: it holds nothing yet.
    """

    vm: Vm
    name = "size"

    async def up(self, pod: Pod) -> None:
        """Bring the VM to the pod's size. Raises as `Vm.up`."""
        try:
            await self._resume_and_grow(pod)
        except (VmmError, GuestError, GuestUnreachable, DeadlineExceeded) as error:
            log.error("pod %s: its VM cannot be used, booting another one: %s", pod.id, error)
            await self.vm.down(pod)
            async with pod.queued(self.vm.stage):
                await self.vm.boot(pod)
        pod.close_tap()

    async def down(self, pod: Pod) -> None:
        """Close the tap; memory and CPUs end with the VM."""
        pod.close_tap()

    async def _resume_and_grow(self, pod: Pod) -> None:
        machine, runtime = link_of(pod).machine, runtime_of(pod)
        size, handle = runtime.size, runtime.handle
        if machine is None or handle is None:
            raise VmmGone("the pooled VM has ended")
        assert size is not None
        await self.vm.limit(pod, handle.spec.memory_mib)
        if runtime.source is Source.POOL:
            with pod.phase("resume"):
                await machine.resume()
        spec = handle.spec
        if size.memory_mib > spec.memory_mib or size.vcpus > spec.vcpus:
            with pod.phase("grow"):
                await self.vm.grow(pod, size)


async def grow(pod: Pod, size: VmSize) -> None:
    """Grow a running VM to this size, and bring the new CPUs online in the guest.

    Raises VmmError if the hypervisor cannot or the guest does not accept it, VmmGone, GuestError,
    GuestUnreachable.
    """
    link = link_of(pod)
    if link.machine is None:
        raise VmmGone("the VM has ended")
    await link.machine.grow(size.memory_mib, size.vcpus)
    await link.call(pb.Request(online_cpus=pb.OnlineCpus(count=size.vcpus)))
    pod.update_runtime(size=size)


async def connect(hypervisor: Hypervisor, pod: Pod, timeout_s: float, *, foreign: int = 0) -> pb.Welcome:
    """Attach to the pod's VM and connect to its agent with a new epoch: after a start, a lost connection and
    a restart of the daemon. Returns what the agent says of its containers. `foreign` as in `GuestClient`.

    The epoch is saved before it is used, so no two daemons ever share one; where a full disk does not take
    it, a random one is used that the next daemon will not use either. Raises VmmGone as soon as the VMM
    has ended, GuestUnreachable after `timeout_s`.
    """
    handle, link = handle_of(pod), link_of(pod)
    if link.machine is None:
        link.machine = await hypervisor.attach(handle)
    runtime = msgspec.structs.replace(runtime_of(pod), epoch=runtime_of(pod).epoch + 1)
    try:
        pod.update(runtime=runtime)
    except OSError:
        skipped = secrets.randbelow(UNSAVED_EPOCHS)
        runtime = msgspec.structs.replace(runtime, epoch=runtime.epoch + skipped)
        pod.update_anyway(runtime=runtime)
    greeting = asyncio.create_task(
        GuestClient.connect(
            handle.channel,
            token=runtime.token,
            epoch=runtime.epoch,
            on_event=link.handle_event,
            timeout_s=timeout_s,
            foreign=foreign,
        )
    )
    death = asyncio.create_task(link.machine.wait())
    try:
        await asyncio.wait({greeting, death}, return_when=asyncio.FIRST_COMPLETED)
        if greeting.done() and isinstance(greeting.exception(), GuestUnreachable):
            # the kernel resets a vsock connection shortly before the VMM has exited
            await asyncio.wait({death}, timeout=EXIT_GRACE_S)
        if death.done() and not (greeting.done() and greeting.exception() is None):
            raise VmmGone(f"the VM ended before its agent answered: {death.result()}")
        link.client = greeting.result()
    finally:
        await end(greeting, death)
    link.connected.set()
    return link.client.welcome


@dataclass(frozen=True, slots=True)
class Identity:
    """What distinguishes the guest from others of the same template: entropy, clock, hostname, machine id,
    sysctls."""

    name = "identity"

    async def up(self, pod: Pod) -> None:
        """Configure the guest. Raises GuestError for a sysctl that its kernel refuses, GuestUnreachable."""
        identity = compile_identity(
            pod.record.spec,
            entropy=secrets.token_bytes(64),
            machine_id=pod.id[:32],
            wall_ns=time.time_ns(),
        )
        await link_of(pod).call(pb.Request(configure=encode_configuration(identity)))

    async def down(self, pod: Pod) -> None:
        """Do nothing: it ends with the VM."""


@dataclass(frozen=True, slots=True)
class Guest:
    """The pod's network as the guest sees it: interfaces, addresses, routes."""

    networks: Networks
    name = "guest"

    async def up(self, pod: Pod) -> None:
        """Plug further interfaces and configure all. Raises VmmError for too many, GuestError,
        GuestUnreachable."""
        network = pod.record.network
        assert network is not None
        await self._plug_nics(pod, network)
        configuration = compile_network(pod.record.spec, network, first_mac=FIRST_MAC)
        await link_of(pod).call(pb.Request(configure=encode_configuration(configuration)))
        if runtime_of(pod).source is Source.BOOT:  # a restored guest booted when its template was made
            record_guest_phases(pod)

    async def down(self, pod: Pod) -> None:
        """Close the connections; the configuration ends with the VM."""
        await pod.disconnect()

    async def _plug_nics(self, pod: Pod, network: Attachment) -> None:
        """Plug the interfaces beyond the first, whose number only the CNI's result says."""
        others = network.interfaces[1:]
        if not others:
            return
        if len(network.interfaces) > MAX_NICS:
            raise VmmError(f"the network has {len(network.interfaces)} interfaces, a VM at most {MAX_NICS}")
        machine = link_of(pod).machine
        assert machine is not None
        taps = await self.networks.open_taps(pod.id, begin=1)
        try:
            for nic, tap in zip(others, taps, strict=False):
                await machine.plug(NicSpec(mac=nic.mac, mtu=nic.mtu), tap)
        finally:
            for tap in taps:
                os.close(tap)


def record_guest_phases(pod: Pod) -> None:
    """Record the phases of its boot that the guest reported when the connection was made."""
    client = link_of(pod).client
    if client is None:
        return
    pod.record_phases(
        *guest_phases(
            client.welcome,
            received_s=client.welcomed_s,
            began_s=pod.began,
            vmm_started_s=process.started_s(handle_of(pod).vmm),
        )
    )


@dataclass(frozen=True, slots=True)
class PodSteps:
    """The steps of a pod in a VM: all of them, and the same in two parts for the pool."""

    whole: Steps[Pod]  # also what is taken down, however the pod was started
    ahead: Steps[Pod]  # of a pooled VM
    claim: Steps[Pod]  # from a pooled VM to a pod


def _modules_of(pod: Pod) -> Path | None:
    return modules_of(pod.require_handler().kernel)


def pod_steps(vm: Vm, network_stage: Limiter) -> PodSteps:
    """Return the steps of pods in VMs. `network_stage` limits how many CNI ADDs run at the same time."""
    networks, cgroup, size, identity = vm.networks, Cgroup(vm.cgroups), Size(vm), Identity()
    network, guest = Network(networks, network_stage), Guest(networks)
    ahead: Steps[Pod] = (RunDir(), cgroup, Netns(networks), Shares(_modules_of))
    return PodSteps(
        whole=(*ahead, Parallel(((vm, size, identity), (network,))), guest),
        ahead=(*ahead, vm),
        # moving processes between cgroups of v1 takes as long as half a plug-in
        claim=(Parallel(((cgroup, size, identity), (network,))), guest),
    )


def plan_for_guest(store: RootfsStore, default_profile: Path) -> CompiledPlan:
    """Return the step that compiles plans for guests. `default_profile` is AppArmor's compiled RuntimeDefault
    profile, which may not exist."""
    return CompiledPlan(
        store,
        guest_root,
        find_sources,
        lambda container: guest_devices(container.record.spec, guest_disks(container)),
        lambda wanted: policy_for(wanted, default_profile),
    )
