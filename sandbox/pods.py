"""The verbs of pods: run, stop, remove, and taking up those that an earlier daemon left.

    run      a VM of the pool or a new one, STARTING, the steps, READY; a failure is undone and leaves nothing
    watch    from READY on a task per pod: a dead VM makes it NOT_READY at once, a broken
             connection to the agent is made anew
    stop     kills the containers, NOT_READY, the steps down; the record and its address stay
    remove   stop, then the containers and the record
    update   other limits for all containers together

Shutting the daemon down touches no pod.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox.accelerator import Verdict
from sandbox.containers import Containers
from sandbox.errors import GuestUnreachable, InvalidSpec, NotFound, SandboxError, VmmGone
from sandbox.events import Events
from sandbox.factory import Factory
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.sessions import Forwarded
from sandbox.host_usage import HostUsage
from sandbox.lifecycle import UndoFailed, Walk, bring_up, only, take_down
from sandbox.plan import vm_size
from sandbox.pod import Pod
from sandbox.records import ContainerRecord, PodRecord, PodState, Source
from sandbox.registry import Registry, pod_name
from sandbox.resources import compile_pod_resources, merge_resources
from sandbox.room import Room
from sandbox.spec import Handler, PodId, PodSpec, Resources
from sandbox.stats import POD_CGROUP
from sandbox.steps import Walks, remove_tree
from sandbox.store import Store
from sandbox.tasks import Tasks
from sandbox.vm_steps import connect
from sandbox.vmm import Hypervisor

log = logging.getLogger(__name__)

ADOPT_TIMEOUT_S = 30.0
RECONNECT_PAUSE_S = 0.5
STOP_GRACE_S = 5.0
DIAL_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class PodHost:
    """What pods need of the host."""

    store: Store[PodRecord]
    run: Path
    hypervisor: Hypervisor
    walks: Walks
    handler: Callable[[str], Handler]  # raises InvalidSpec for an unknown name
    accelerator: Callable[[Handler], Awaitable[Verdict]]
    tasks: Tasks
    on_started: Callable[[PodRecord], None]
    events: Events
    room: Room
    usage: Callable[[Pod], HostUsage]  # reads files, of the host alone


class Pods:
    def __init__(self, registry: Registry, containers: Containers, factory: Factory, host: PodHost) -> None:
        self._registry = registry
        self._containers = containers
        self._factory = factory
        self._host = host

    # ------------------------------------------------------------------------------- look-up

    def find(self, id: str) -> PodRecord:
        return self._registry.pod(id).record

    def list(self) -> Sequence[PodRecord]:
        # one that is starting is not shown: its client has not been told the id
        return [
            pod.record for pod in self._registry.pods.values() if pod.record.state is not PodState.STARTING
        ]

    def containers_of(self, pod_id: str) -> Sequence[ContainerRecord]:
        pod = self._registry.pod(pod_id)
        return [container.record for container in self._registry.containers_of(pod)]

    async def describe(self, record: PodRecord) -> Mapping[str, object]:
        """Facts for a person: where things are, what runs, how long each phase of the start took."""
        pod = self._registry.pod(record.id)
        facts: dict[str, object] = {
            "runDir": str(pod.run_dir),
            "handler": record.spec.handler,
            "accelerator": record.accelerator,
            "source": record.source,
            "guestKernel": record.guest_kernel,
            "size": {"memoryMiB": record.size.memory_mib, "vcpus": record.size.vcpus}
            if record.size
            else None,
            "netns": record.network.netns if record.network else "",
            "phases": [
                {
                    "name": phase.name,
                    "side": phase.side,
                    "beginSeconds": phase.begin_s,
                    "endSeconds": phase.end_s,
                }
                for phase in record.phases
            ],
            "console": str(pod.run_dir / "console.log"),
            "problem": record.problem,
        }
        if record.vm is not None:
            facts["pid"] = record.vm.vmm.pid
            facts["helpers"] = {name: identity.pid for name, identity in record.vm.helpers.items()}
            facts["hostUsage"] = _as_facts(await asyncio.to_thread(self._host.usage, pod))
        if pod.machine is not None:
            facts["vmm"] = dict(await pod.machine.describe())
        return facts

    # ------------------------------------------------------------------------------- run

    async def run(self, spec: PodSpec) -> PodId:
        """Start a pod. Raises Reserved, InvalidSpec, MissingProgram, PhaseFailed; after any of
        them nothing is left of it."""
        self._registry.check_pod_name(spec)
        handler = self._host.handler(spec.handler)
        name = pod_name(spec)
        self._registry.starting.add(name)  # it is taken from here on
        try:
            pod, walk = await self._begin(spec, handler)
        finally:
            self._registry.starting.discard(name)
        try:
            async with pod.lock:
                await bring_up(
                    walk,
                    pod,
                    begin=pod.begin,
                    finish=pod.note_phase,
                    ended=pod.ended,
                    console=pod.console,
                )
                if pod.record.source is Source.BOOT:  # another guest is as old as its template
                    pod.note_guest()
                pod.update(state=PodState.READY)
        except Exception as failure:
            try:
                # a claim that failed also gives up what was made ahead
                await take_down(only(self._host.walks.whole, pod.record.steps), pod, ended=pod.ended)
            except UndoFailed as undo:
                failure.add_note(f"and was not wholly undone: {undo}")
            else:
                self._forget(pod)
            raise
        finally:
            # now that it is through: whatever it took, or found broken, is made anew
            self._factory.look()
        pod.handler = None
        self._watch(pod)
        self._host.on_started(pod.record)
        return pod.id

    async def _begin(self, spec: PodSpec, handler: Handler) -> tuple[Pod, Walk[Pod]]:
        """A pod that is STARTING, and the rest of its way. Raises InvalidSpec, MissingProgram."""
        began = time.monotonic()
        size = vm_size(spec, handler)
        verdict = await self._host.accelerator(handler)
        pod = await self._factory.take(handler, verdict, size)
        walk = self._host.walks.claim if pod else self._host.walks.whole
        if pod is None:
            pod = self.make(
                PodRecord(
                    id=PodId(secrets.token_hex(32)),
                    spec=spec,
                    created_at_ns=time.time_ns(),
                    accelerator=verdict.accelerator,
                    cpu=verdict.cpu,
                    token=secrets.token_bytes(16),
                )
            )
        pod.began = began
        pod.handler = handler
        self._registry.pods[pod.id] = pod
        pod.update(
            spec=spec,
            size=size,
            resources=spec.resources,
            overhead=spec.overhead,
            state=PodState.STARTING,
            created_at_ns=time.time_ns(),
            phases=(),
        )
        pod.note_phase("queue", began, time.monotonic())
        return pod, walk

    def make(self, record: PodRecord) -> Pod:
        """The object of a record; not among the pods that are served yet."""
        pod = Pod(record, self._host.store, self._host.run / "pods" / record.id)
        pod.on_event = self._containers.take_event
        pod.on_state = self._host.events.pod_changed
        return pod

    def _forget(self, pod: Pod) -> None:
        pod.forget()
        self._registry.pods.pop(pod.id, None)
        self._host.events.pod_deleted(pod)

    # ------------------------------------------------------------------------------- watch

    def _watch(self, pod: Pod) -> None:
        pod.watch = self._host.tasks.spawn(self._supervise(pod), f"watch of pod {pod.id[:12]}")

    async def _supervise(self, pod: Pod) -> None:
        """Until the VM ends: keep a connection to its agent."""
        assert pod.machine is not None
        death = asyncio.create_task(pod.machine.wait())
        try:
            while not death.done():
                assert pod.client is not None
                lost = asyncio.create_task(pod.client.wait_closed())
                await asyncio.wait({death, lost}, return_when=asyncio.FIRST_COMPLETED)
                lost.cancel()
                if not death.done():
                    await self._reconnect(pod, death)
        finally:
            death.cancel()
        await self._vm_gone(pod, death.result())

    async def _reconnect(self, pod: Pod, death: asyncio.Task[str]) -> None:
        log.warning("pod %s: lost the connection to its agent; connecting again", pod.id)
        pod.client = None
        pod.connected.clear()
        while not death.done():
            try:
                welcome = await connect(self._host.hypervisor, pod, ADOPT_TIMEOUT_S)
                await self._containers.sync(pod, welcome)
                return
            except SandboxError as error:
                log.warning("pod %s: its agent does not answer: %s", pod.id, error)
                await asyncio.wait({death}, timeout=RECONNECT_PAUSE_S)

    async def _vm_gone(self, pod: Pod, reason: str) -> None:
        """The VM ended though nobody asked. What the pod holds stays until StopPodSandbox."""
        tail = pod.console()
        log.error("pod %s: its VM ended: %s%s", pod.id, reason, f"\n{tail}" if tail else "")
        pod.update(state=PodState.NOT_READY, problem=f"the VM ended: {reason}")
        self._containers.vm_gone(pod, reason)
        await pod.disconnect()

    # ------------------------------------------------------------------------------- ports

    async def dial(self, id: str, port: int) -> Forwarded:
        """Connect to a TCP port inside the pod. Close the connection in the end.
        Raises NotFound, WrongState, GuestError (nothing listens there), GuestUnreachable,
        DeadlineExceeded."""
        pod = self._registry.pod(id)
        pod.require_ready()
        return await Forwarded.dial(await pod.guest(), port, DIAL_TIMEOUT_S)

    # ------------------------------------------------------------------------------- stop, remove

    async def stop(self, id: str) -> None:
        """Kill what runs and release all that the pod holds. Unknown ids and stopped pods are fine.
        Raises UndoFailed; what is still held stays in the record, and another call tries again."""
        try:
            pod = self._registry.pod(id)
        except NotFound:
            return
        async with pod.lock:
            await self._stop(pod)

    async def _stop(self, pod: Pod) -> None:
        if pod.record.ready:
            await self._kill_containers(pod)
        if pod.watch is not None:
            pod.watch.cancel()
            pod.watch = None
        if pod.record.state is not PodState.NOT_READY:
            pod.update(state=PodState.NOT_READY)
        self._containers.vm_gone(pod, "the sandbox was stopped")
        await take_down(only(self._host.walks.whole, pod.record.steps), pod, ended=pod.ended)

    async def _kill_containers(self, pod: Pod) -> None:
        """In the guest first, so that exit codes and the last lines of logs arrive."""
        running = [container for container in self._registry.containers_of(pod) if container.running]
        stops = (self._containers.stop(container.id, 0) for container in running)
        with contextlib.suppress(TimeoutError, SandboxError):
            async with asyncio.timeout(STOP_GRACE_S):
                await asyncio.gather(*stops)

    async def remove(self, id: str) -> None:
        """Stop, then forget the pod and its containers. Unknown ids are fine. Raises UndoFailed."""
        try:
            pod = self._registry.pod(id)
        except NotFound:
            return
        async with pod.lock:
            if pod.id not in self._registry.pods:
                return
            await self._stop(pod)
            for container in self._registry.containers_of(pod):
                await self._containers.release(container)
            self._forget(pod)

    # ------------------------------------------------------------------------------- update

    async def update(self, id: str, resources: Resources, overhead: Resources) -> None:
        """Limits of all containers together, in the guest's cgroup that holds theirs; the VM is given
        what it lacks for them. Raises NotFound, WrongState, InvalidSpec, GuestError, VmmError.

        A cpuset counts the host's CPUs, and is the host's to keep (see `compile_resources`).
        """
        pod = self._registry.pod(id)
        async with pod.lock:
            pod.require_ready()
            merged = merge_resources(pod.record.resources, resources)
            files = compile_pod_resources(merged, vcpus=pod.vcpus)
            overhead = merge_resources(pod.record.overhead, overhead)
            await self._host.room.make(pod, merged, overhead)
            write = pb.WriteCgroup(container_id=POD_CGROUP, files=files)
            await pod.call(pb.Request(write_cgroup=write))
            pod.update(resources=merged, overhead=overhead)

    # ------------------------------------------------------------------------------- recovery

    async def adopt_all(self, containers: Sequence[ContainerRecord]) -> None:
        """Take up every pod that the records tell of; one bad pod never blocks the rest.

        Assumes that the stores are loaded and that no call is served yet.
        """
        pods = [self.make(record) for record in self._host.store]
        self._registry.pods.update((pod.id, pod) for pod in pods)
        for record in containers:
            owner = self._registry.pods.get(record.pod_id)
            if owner is None:
                log.error("container %s belongs to no pod; its record is left for inspection", record.id)
                continue
            self._containers.adopt(record, owner)
        await asyncio.gather(*(self._adopt_contained(pod) for pod in pods))

    async def _adopt_contained(self, pod: Pod) -> None:
        try:
            await self._adopt(pod)
        except Exception as error:
            log.error("pod %s (%s) could not be taken up: %s", pod.id, pod_name(pod.record.spec), error)
            log.debug("pod %s could not be taken up", pod.id, exc_info=True)

    async def _adopt(self, pod: Pod) -> None:
        for container in list(self._registry.containers_of(pod)):
            await self._containers.settle(container)
        match pod.record.state:
            case PodState.STARTING | PodState.WAITING as state:
                await take_down(only(self._host.walks.whole, pod.record.steps), pod, ended=pod.ended)
                self._forget(pod)
                log.info("pod %s was %s when the daemon ended; it is undone", pod.id, state)
            case PodState.READY:
                await self._adopt_running(pod)
            case PodState.NOT_READY:
                self._containers.vm_gone(pod, "the sandbox was stopped")

    async def _adopt_running(self, pod: Pod) -> None:
        try:
            welcome = await connect(self._host.hypervisor, pod, ADOPT_TIMEOUT_S)
        except VmmGone as error:
            await self._vm_gone(pod, str(error))
            return
        except GuestUnreachable as error:
            # the VM runs and does not answer: it may be slow, so keep trying while it lives
            log.error("pod %s: %s", pod.id, error)
            self._host.tasks.spawn(self._adopt_later(pod), f"adoption of pod {pod.id[:12]}")
            return
        await self._containers.sync(pod, welcome)
        self._watch(pod)
        log.info("pod %s taken up", pod.id)

    async def _adopt_later(self, pod: Pod) -> None:
        assert pod.machine is not None
        death = asyncio.create_task(pod.machine.wait())
        await self._reconnect(pod, death)
        if death.done():
            await self._vm_gone(pod, death.result())
        else:
            death.cancel()
            self._watch(pod)

    async def sweep(self, known: Collection[str]) -> None:
        """End VMs and remove directories that belong to no record."""
        run = self._host.run / "pods"
        strays = [path for path in run.iterdir() if path.name not in known] if run.exists() else []
        for path in strays:
            log.warning("pod %s has no record; what is left of it is removed", path.name)
            try:
                await self._host.hypervisor.destroy(path.name, path)
                await asyncio.to_thread(remove_tree, path)
            except (SandboxError, OSError) as error:
                log.error("what is left of pod %s cannot be removed: %s", path.name, error)

    async def close(self) -> None:
        """Let go of every pod, touching none."""
        for pod in self._registry.pods.values():
            await pod.disconnect()


def _as_facts(usage: HostUsage) -> Mapping[str, object]:
    return {
        "guestMemoryBytes": usage.guest_memory_bytes,
        "overheadMemoryBytes": usage.overhead_memory_bytes,
        "vmmCpuSeconds": usage.vmm.cpu_seconds,
        "vmmMemoryBytes": usage.vmm.own_bytes,
        "helpersCpuSeconds": usage.helpers.cpu_seconds,
        "helpersMemoryBytes": usage.helpers.own_bytes,
    }


def find_handler(handlers: Mapping[str, Handler], name: str) -> Handler:
    """Raises InvalidSpec naming the handlers that there are."""
    handler = handlers.get(name)
    if handler is None:
        names = ", ".join(repr(known) for known in sorted(handlers))
        raise InvalidSpec("runtime_handler", f"{name!r} is not configured", names)
    return handler
