"""Containers in VMs: each verb is a request or two to the agent, each end is an event of it.

After a lost connection, the agent's Welcome says what became of each container meanwhile, and the log
goes on from the byte after the last one written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from sandbox.container import Container
from sandbox.exits import Exit, Exits
from sandbox.guest import guest_pb2 as pb
from sandbox.host.tasks import Tasks
from sandbox.inventory import Inventory
from sandbox.lifecycle import Steps
from sandbox.logs.file import usable_path
from sandbox.logs.relay import WINDOW, LogRelay
from sandbox.plan.encode import encode_container
from sandbox.pod import Pod
from sandbox.records import ContainerState
from sandbox.spec import ContainerId, ExitCode
from sandbox.vm_pods.disks import Disks
from sandbox.vm_pods.guest_mounts import Recoverable
from sandbox.vm_pods.link import link_of
from sandbox.vm_pods.propagation import PropagationSync
from sandbox.vm_pods.volumes import release_unused

log = logging.getLogger(__name__)

LOG_END_TIMEOUT_S = 5.0  # longer than a busy disk takes; a full one must not hide the exit


class VmContainers:
    """See `engine.ContainerRuntime`."""

    def __init__(
        self,
        inventory: Inventory,
        exits: Exits,
        tasks: Tasks,
        propagation: PropagationSync,
        followed: Sequence[Recoverable],
        disks: Disks,
        container_steps: Steps[Container],
    ) -> None:
        self._inventory = inventory
        self._exits = exits
        self._tasks = tasks
        self._propagation = propagation
        self._followed = followed
        self._disks = disks
        # ends that the guest reported before StartContainer had its answer, or the log was resumed
        self._early: WeakKeyDictionary[Container, Exit] = WeakKeyDictionary()
        self.container_steps = container_steps

    # ------------------------------------------------------------------------------- the seam

    async def start(self, container: Container) -> None:
        """Open the log and send the plan in one Start request."""
        client = await link_of(container.pod).guest()
        request = pb.Request(start=encode_container(container.plan))
        relay = await self._open_log(container)
        request.start.log_stream = await relay.attach(client)
        request.start.log_window = WINDOW
        reply = await link_of(container.pod).call(request)
        await relay.begin()
        container.pid = reply.started.pid

    def watch_exit(self, container: Container) -> None:
        """Report an end that came before the start's reply; later ones arrive as events."""
        self._propagation.watch(container)
        early = self._early.pop(container, None)
        if early is not None:
            self._finish_soon(container, early)

    async def signal(self, container: Container, number: int, *, all: bool) -> None:
        """Let the agent signal the first process, or all processes of the container's cgroup."""
        signal = pb.Signal(container_id=container.id, signal=number, all=all)
        await link_of(container.pod).call(pb.Request(signal=signal))

    async def remove(self, container: Container) -> None:
        """Let the agent kill what is left and unmount; close the log, and end the propagation of mounts."""
        pod = container.pod
        reachable = pod.record.ready or link_of(pod).client is not None
        if reachable and container.record.started_at_ns:
            await link_of(pod).call(pb.Request(remove=pb.Remove(container_id=container.id)))
        self.detach(container)
        await self._propagation.release(container)

    def detach(self, container: Container) -> None:
        """Close the log."""
        if container.relay is not None:
            container.relay.close()
            container.relay = None

    # ------------------------------------------------------------------------------- exits

    def handle_event(self, pod: Pod, event: pb.Event) -> None:
        """Handle an event of the pod's guest, which is believed about the pod's own containers only."""
        if event.WhichOneof("body") != "exited":
            return
        exited = event.exited
        container = self._inventory.containers.get(ContainerId(exited.container_id))
        if container is None or container.pod is not pod or exited.exec_id:
            return
        if container.record.state is ContainerState.CREATED or not link_of(pod).settled:
            self._early[container] = _decode(exited)
        elif container.running:
            self._finish_soon(container, _decode(exited))

    def _finish_soon(self, container: Container, end: Exit) -> None:
        self._tasks.spawn(self._finish(container, end), f"exit of container {container.id[:12]}")

    async def _finish(self, container: Container, end: Exit) -> None:
        """Report the end once the last line is in the file: clients read the log as soon as they know."""
        relay = container.relay
        if relay is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOG_END_TIMEOUT_S):
                    await relay.complete()
        self._exits.exited(container, end)
        await self._disks.release(container)

    # ------------------------------------------------------------------------------- recovery

    async def recover(self, pod: Pod, welcome: pb.Welcome) -> None:
        """Recover a pod whose connection was lost, by what its guest says."""
        await release_unused(self._inventory, pod)
        await self.settle(pod, welcome)
        for each in self._followed:
            await each.recover(pod)
        await self._disks.recover(pod)

    async def settle(self, pod: Pod, welcome: pb.Welcome) -> None:
        """Resume the logs of the pod's containers, and report those that ended meanwhile. Makes only requests
        that agents of all versions know."""
        reported = {state.id: state for state in welcome.containers}
        try:
            for container in self._inventory.containers_of(pod):
                state = reported.get(container.id)
                if container.quarantined:
                    continue  # where its log ends is not known, so the guest keeps the rest
                if state is not None:
                    await self._recover_one(container, state)
                elif container.running:
                    container.record_exit(
                        ExitCode.UNKNOWN, time.time_ns(), "Unknown", "the guest does not know this container"
                    )
        finally:
            link_of(pod).settled = True
            for container in self._inventory.containers_of(pod):
                if container.running and (early := self._early.pop(container, None)):
                    self._finish_soon(container, early)

    async def _recover_one(self, container: Container, state: pb.ContainerState) -> None:
        if container.record.state is ContainerState.CREATED:
            # the daemon was killed after the guest had started it, before that was written down
            container.update(state=ContainerState.RUNNING, started_at_ns=time.time_ns())
        elif container.record.state is ContainerState.UNKNOWN:  # an earlier daemon could not reach it
            container.update(state=ContainerState.RUNNING)
        container.pid = state.pid
        if link_of(container.pod).compatible is not None:
            self._propagation.watch(container)
        await self._resume_log(container)
        if state.state == pb.ContainerState.EXITED and container.running:
            self._finish_soon(container, _decode(state.exited))

    async def _open_log(self, container: Container) -> LogRelay:
        """Raises InvalidSpec for a path that no file can have."""
        if container.relay is None:
            path, position = container.record.log_path, container.record.log
            with usable_path(path):
                container.relay = await LogRelay.open(
                    path, position, lambda position: container.update(log=position)
                )
        return container.relay

    async def _resume_log(self, container: Container) -> None:
        client = await link_of(container.pod).guest()
        relay = await self._open_log(container)
        stream = await relay.attach(client)
        asked = relay.offset
        request = pb.OpenLog(container_id=container.id, offset=asked, stream=stream, window=WINDOW)
        reply = await link_of(container.pod).call(pb.Request(open_log=request))
        opened = reply.log_opened.offset
        if opened != asked:
            log.error("container %s: log bytes %d to %d are lost", container.id, asked, opened)
        await relay.begin(opened)


def _decode(exited: pb.Exited) -> Exit:
    return Exit(exit_code=exited.exit_code, at_ns=exited.at_ns, oom_kills=exited.oom_kills)
