"""Pods without a VM: a first process that holds their namespaces, and its end.

Everything that runs is known by records, cgroups and command lines, so nothing depends on the daemon
running when it happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from image.stores import RootfsStore
from network.attach import Networks
from sandbox.engine import Engine
from sandbox.errors import SandboxError
from sandbox.exits import Exits
from sandbox.host import cgroup, process
from sandbox.host.cgroup import Cgroups
from sandbox.host.limiter import Limiter
from sandbox.host.tasks import Tasks
from sandbox.host_pods import cgroups, conmon
from sandbox.host_pods.containers import ProcessContainers
from sandbox.host_pods.control import ProcessControl
from sandbox.host_pods.layout import HostLayout, runtime_of
from sandbox.host_pods.sessions import ProcessSessions
from sandbox.host_pods.steps import container_steps, end_all, pod_steps
from sandbox.host_pods.sysctls import pod_sysctls
from sandbox.inventory import Inventory
from sandbox.lifecycle import Steps
from sandbox.pod import Pod
from sandbox.records import PodRecord, PodState, ProcessRuntime
from sandbox.spec import Handler, PodId, PodSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProcessDeps:
    """What the engine of pods without a VM is made of."""

    cgroups: Cgroups  # of all hierarchies
    networks: Networks
    stage: Limiter  # of CNI plug-ins
    rootfs: RootfsStore
    tasks: Tasks


def make_engine(inventory: Inventory, exits: Exits, deps: ProcessDeps) -> tuple[Engine, ProcessControl]:
    """Make the engine of pods without a VM, and the part of it that also reads what a pod costs the host."""
    layout = HostLayout(deps.cgroups)
    containers = ProcessContainers(inventory, exits, deps.tasks, layout, container_steps(deps.rootfs))
    control = ProcessControl(inventory, layout)
    engine = Engine(
        pods=ProcessPods(inventory, exits, containers, layout, deps),
        containers=containers,
        sessions=ProcessSessions(layout),
        control=control,
    )
    return engine, control


class ProcessPods:
    """See `engine.PodRuntime`."""

    def __init__(
        self,
        inventory: Inventory,
        exits: Exits,
        containers: ProcessContainers,
        layout: HostLayout,
        deps: ProcessDeps,
    ) -> None:
        self._inventory = inventory
        self._exits = exits
        self._containers = containers
        self._layout = layout
        self._tasks = deps.tasks
        self.pod_steps: Steps[Pod] = pod_steps(layout, deps.networks, deps.stage)

    async def acquire(self, spec: PodSpec, handler: Handler) -> tuple[Pod, Steps[Pod]]:
        """Make a new pod, after checking its sysctls and that conmon and crun are installed."""
        for program in (conmon.CONMON, conmon.CRUN):
            conmon.find_program(program)
        pod_sysctls(spec)
        pod = self._inventory.make_pod(
            PodRecord(
                id=PodId(secrets.token_hex(32)),
                spec=spec,
                created_at_ns=time.time_ns(),
                runtime=ProcessRuntime(),
            )
        )
        return pod, self.pod_steps

    def replenish(self) -> None:
        """Nothing: these pods are not prepared ahead."""

    def watch(self, pod: Pod) -> None:
        """Watch the process that holds the pod's namespaces."""
        pod.watch = self._tasks.spawn(self._await_end(pod), f"watch of pod {pod.id[:12]}")

    async def adopt(self, pod: Pod) -> None:
        """Settle the containers, then watch the pod; without its first process it becomes NOT_READY."""
        for container in self._inventory.containers_of(pod):
            try:
                await self._containers.recover(container)
            except SandboxError as error:
                log.error("could not recover container %s: %s", container.id, error)
        holder, init = runtime_of(pod).holder, runtime_of(pod).init
        if not (holder and init and process.alive(holder) and process.alive(init)):
            await self._ended(pod, "the pod's first process is gone")
            return
        self.watch(pod)
        log.info("pod %s recovered", pod.id)

    async def destroy(self, pod_id: str, run_dir: Path) -> None:
        """Kill the pod's processes. Those in a cgroup of the kubelet's are found by their arguments."""
        path = cgroup.pod_path("", pod_id, root=self._layout.cgroups.root)
        await asyncio.to_thread(end_all, self._layout, run_dir, path)
        await asyncio.to_thread(self._layout.cgroups.remove, pod_id, "")

    async def _await_end(self, pod: Pod) -> None:
        """Wait for the holder of the namespaces; its PID namespace ends with it."""
        holder = runtime_of(pod).holder
        assert holder is not None
        await process.wait_exit(holder)
        await self._ended(pod, "the pod's first process ended")

    async def _ended(self, pod: Pod, reason: str) -> None:
        """Handle an end that was not asked for. Resources are held until StopPodSandbox."""
        log.error("pod %s: %s", pod.id, reason)
        pod.update_anyway(state=PodState.NOT_READY, problem=reason)
        for container in self._inventory.containers_of(pod):
            path = self._layout.container_cgroup(container)
            with contextlib.suppress(SandboxError):
                await asyncio.to_thread(cgroups.kill, self._layout.hierarchies, path)
        self._exits.lost(pod, reason)
