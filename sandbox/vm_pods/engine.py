"""Pods in micro-VMs: where a pod's VM comes from, its connection to the agent, and its end.

A lost connection is made again for as long as the VM runs; a VM that ends takes all containers with it.
Recovery after a restart of the daemon is the same as after a lost connection.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from image.stores import RootfsStore
from sandbox.engine import Engine
from sandbox.errors import GuestUnreachable, HelperGone, SandboxError, VersionMismatch, VmmGone
from sandbox.exits import Exits
from sandbox.guest import versions
from sandbox.host.tasks import Tasks
from sandbox.inventory import Inventory
from sandbox.lifecycle import Joined, Steps
from sandbox.plan import vm_size
from sandbox.pod import Pod
from sandbox.records import ContainerState, PodRecord, PodState, VmRuntime
from sandbox.spec import Handler, PodId, PodSpec
from sandbox.stats.host_usage import HostUsage
from sandbox.steps.rootfs import ContainerRootfs
from sandbox.vm_pods.accelerator import AcceleratorChoice
from sandbox.vm_pods.clock_sync import sync_clock
from sandbox.vm_pods.containers import VmContainers
from sandbox.vm_pods.control import VmControl
from sandbox.vm_pods.disks import Disks
from sandbox.vm_pods.guest_mounts import GuestMounts, Recoverable
from sandbox.vm_pods.host_sockets import HostSockets
from sandbox.vm_pods.inode_watch import watch_inodes
from sandbox.vm_pods.link import link_of
from sandbox.vm_pods.live_files import LiveFiles
from sandbox.vm_pods.pool import VmPool
from sandbox.vm_pods.propagation import PropagationSync
from sandbox.vm_pods.received_mounts import ReceivedMounts
from sandbox.vm_pods.reconnects import Reconnects
from sandbox.vm_pods.resize import Resizer
from sandbox.vm_pods.sessions import VmSessions
from sandbox.vm_pods.shared_files import HostChanges, SharedFiles
from sandbox.vm_pods.steps import PodSteps, connect, plan_for_guest
from sandbox.vm_pods.volumes import Volumes
from sandbox.vmm import Hypervisor

log = logging.getLogger(__name__)

ADOPT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class VmDeps:
    """What the engine of pods in VMs is made of."""

    hypervisor: Hypervisor
    steps: PodSteps
    pool: VmPool
    accelerator: Callable[[Handler], Awaitable[AcceleratorChoice]]
    rootfs: RootfsStore
    tasks: Tasks
    resizer: Resizer
    default_profile: Path  # AppArmor's, compiled; it may not exist
    host_usage: Callable[[Pod], HostUsage]  # reads files of the host; may block
    live_paths: Sequence[str] = ()  # patterns of further mounts that the guest has a copy of


def make_engine(inventory: Inventory, exits: Exits, deps: VmDeps) -> Engine:
    """Make the engine of pods in VMs."""
    propagation = PropagationSync(deps.tasks)
    live, sockets = LiveFiles(deps.tasks, inventory, deps.live_paths), HostSockets(deps.tasks, inventory)
    guest_mounts, disks = GuestMounts((live, sockets)), Disks(inventory, deps.tasks)
    received = ReceivedMounts(deps.tasks, inventory)
    shared = SharedFiles(deps.tasks, inventory, deps.live_paths)
    volumes = Volumes(deps.rootfs, deps.resizer, inventory)
    container_steps = (
        ContainerRootfs(deps.rootfs),
        guest_mounts,
        Joined(volumes.name, (disks, volumes, HostChanges(received, shared))),
        plan_for_guest(deps.rootfs, deps.default_profile),
    )
    followed: Sequence[Recoverable] = (*guest_mounts.kinds, received, shared)
    containers = VmContainers(inventory, exits, deps.tasks, propagation, followed, disks, container_steps)
    return Engine(
        pods=VmPods(inventory, exits, containers, deps),
        containers=containers,
        sessions=VmSessions(propagation),
        control=VmControl(inventory, deps.resizer, deps.host_usage),
    )


class VmPods:
    """See `engine.PodRuntime`."""

    def __init__(self, inventory: Inventory, exits: Exits, containers: VmContainers, deps: VmDeps) -> None:
        self._inventory = inventory
        self._exits = exits
        self._containers = containers
        self._deps = deps
        self.pod_steps: Steps[Pod] = deps.steps.whole

    # ------------------------------------------------------------------------------- the seam

    async def acquire(self, spec: PodSpec, handler: Handler) -> tuple[Pod, Steps[Pod]]:
        """Claim a VM of the pool, or begin with a new one if none fits."""
        size = vm_size(spec, handler)
        choice = await self._deps.accelerator(handler)
        pod = await self._deps.pool.acquire(handler, choice, size)
        steps = self._deps.steps.claim if pod else self._deps.steps.whole
        if pod is None:
            pod = self._inventory.make_pod(
                PodRecord(
                    id=PodId(secrets.token_hex(32)),
                    spec=spec,
                    created_at_ns=time.time_ns(),
                    runtime=VmRuntime(
                        accelerator=choice.accelerator,
                        options=choice.options,
                        token=secrets.token_bytes(16),
                    ),
                )
            )
        link_of(pod).on_event = self._containers.handle_event
        pod.record_runtime(size=size)
        return pod, steps

    def replenish(self) -> None:
        """Let the pool make VMs in place of those that were claimed."""
        self._deps.pool.replenish()

    def watch(self, pod: Pod) -> None:
        """Keep the pod connected to its agent until its VM ends."""
        pod.watch = self._deps.tasks.spawn(self._supervise(pod), f"watch of pod {pod.id[:12]}")

    async def adopt(self, pod: Pod) -> None:
        """Attach to the VM, connect to its agent, and settle the containers by what the agent says."""
        link_of(pod).on_event = self._containers.handle_event
        try:
            await self._connect(pod)
        except HelperGone as error:
            await self._vm_gone(pod, str(error))
            return
        except VmmGone as error:
            # nothing is killed for a record's word: if that is damaged, the VM may be in order
            await self._vm_gone(pod, str(error), kill=False)
            return
        except VersionMismatch as error:
            self._set_unknown(pod, error)
            return
        except GuestUnreachable as error:
            # the VM runs and its agent does not answer: it may be slow, so retry while the VM runs
            log.error("pod %s: no connection to its agent yet, retrying: %s", pod.id, error)
            self._deps.tasks.spawn(self._adopt_later(pod), f"recovery of pod {pod.id[:12]}")
            return
        self.watch(pod)
        log.info("pod %s recovered", pod.id)

    async def destroy(self, pod_id: str, run_dir: Path) -> None:
        """End the VMM and its helpers by the pod's id."""
        await self._deps.hypervisor.destroy(pod_id, run_dir)

    # ------------------------------------------------------------------------------- the connection

    async def _connect(self, pod: Pod) -> None:
        """Connect to the agent, and settle the containers by what it says.

        Raises as `steps.connect` does; VersionMismatch for an agent with which nothing can be done at all.
        """
        link_of(pod).settled = False
        try:
            welcome = await connect(self._deps.hypervisor, pod, ADOPT_TIMEOUT_S)
        except VersionMismatch as error:
            await self._connect_foreign(pod, error)
        else:
            await self._containers.recover(pod, welcome)

    async def _connect_foreign(self, pod: Pod, error: VersionMismatch) -> None:
        """Connect to an agent that speaks no protocol version of ours, as after an upgrade over many
        releases.

        The VM and its containers run on, but the pod is NOT_READY, and the kubelet stops and replaces it.
        Until then the daemon does what agents of all versions can do: containers are signalled, and their
        logs and exit codes arrive. Raises as `steps.connect` does.
        """
        if pod.record.ready:
            log.error("pod %s: %s", pod.id, error)
            pod.update_anyway(state=PodState.NOT_READY, problem=str(error))
        version = versions.nearest(error.agent)
        if version < 1:
            raise error
        welcome = await connect(self._deps.hypervisor, pod, ADOPT_TIMEOUT_S, foreign=version)
        await self._containers.settle(pod, welcome)

    async def _supervise(self, pod: Pod) -> None:
        """Keep the pod connected to its agent until the VM ends."""
        link = link_of(pod)
        assert link.machine is not None
        death = asyncio.create_task(link.machine.wait())
        clock = self._deps.tasks.spawn(sync_clock(lambda: link.compatible), f"clock of pod {pod.id[:12]}")
        helpers = [helper.pid for helper in link.machine.handle.helpers.values()]
        inodes = self._deps.tasks.spawn(
            watch_inodes(helpers, lambda: link.compatible), f"inodes of pod {pod.id[:12]}"
        )
        reconnects = Reconnects()
        try:
            while not death.done():
                assert link.client is not None
                reconnects.connected()
                lost = asyncio.create_task(link.client.wait_closed())
                await asyncio.wait({death, lost}, return_when=asyncio.FIRST_COMPLETED)
                lost.cancel()
                if not death.done():
                    await self._reconnect(pod, death, reconnects)
        except VersionMismatch as error:
            self._set_unknown(pod, error)
            return
        finally:
            death.cancel()
            clock.cancel()
            inodes.cancel()
        await self._vm_gone(pod, death.result())

    async def _reconnect(self, pod: Pod, death: asyncio.Task[str], reconnects: Reconnects) -> None:
        """Retry until the pod is connected or its VM has ended. Raises VersionMismatch without a retry."""
        link_of(pod).lose_client()
        problem = "the connection was lost"
        while True:
            reconnects.failed()
            if reconnects.hopeless and pod.record.ready:
                log.error("pod %s: NOT_READY, as its agent cannot be reached: %s", pod.id, problem)
                pod.update_anyway(state=PodState.NOT_READY, problem=f"its agent cannot be reached: {problem}")
            elif reconnects.may_log():
                log.warning("pod %s: no connection to its agent, retrying: %s", pod.id, problem)
            await asyncio.wait({death}, timeout=reconnects.pause_s)
            if death.done():
                return
            try:
                await self._connect(pod)
                return
            except VersionMismatch:
                raise
            except SandboxError as error:
                problem = str(error)

    async def _adopt_later(self, pod: Pod) -> None:
        link = link_of(pod)
        assert link.machine is not None
        death = asyncio.create_task(link.machine.wait())
        try:
            await self._reconnect(pod, death, Reconnects())
        except VersionMismatch as error:
            death.cancel()
            self._set_unknown(pod, error)
            return
        if death.done():
            await self._vm_gone(pod, death.result())
        else:
            death.cancel()
            self.watch(pod)

    def _set_unknown(self, pod: Pod, error: VersionMismatch) -> None:
        """Handle an agent with which nothing can be done: what its containers do is not known. StopPodSandbox
        ends the VM as any other."""
        log.error("pod %s: its containers cannot be reached: %s", pod.id, error)
        for container in self._inventory.containers_of(pod):
            if container.running:
                container.update_anyway(state=ContainerState.UNKNOWN)
            self._containers.detach(container)

    async def _kill(self, pod: Pod) -> None:
        try:
            await self.destroy(pod.id, pod.run_dir)
        except (SandboxError, OSError) as error:
            log.error("pod %s: its VM could not be killed: %s", pod.id, error)

    async def _vm_gone(self, pod: Pod, reason: str, *, kill: bool = True) -> None:
        """Handle the end of a VM, or of a helper of it, that was not asked for.

        With `kill`, what still runs of the VM is killed, as its containers are reported as ended. Other
        resources are held until StopPodSandbox, which also kills what a daemon that ends in between leaves.
        """
        tail = pod.console()
        log.error("pod %s: its VM ended: %s%s", pod.id, reason, f"\n{tail}" if tail else "")
        if pod.record.ready:  # else the first reason stays
            pod.update_anyway(state=PodState.NOT_READY, problem=f"the VM ended: {reason}")
        client = link_of(pod).client
        link_of(pod).fail()
        self._exits.lost(pod, reason)
        # a separate task: StopPodSandbox cancels this one, and what was killed must be reaped
        if kill:
            await asyncio.shield(self._deps.tasks.spawn(self._kill(pod), f"end of pod {pod.id[:12]}"))
        for container in self._inventory.containers_of(pod):
            self._containers.detach(container)
        await pod.disconnect()
        if client is not None:
            await client.close()
