"""The verbs of pods: run, stop, remove, and taking up those that an earlier daemon left.

    run      a pod of its kind's engine, STARTING, the steps, READY; a failure is undone and leaves nothing
    watch    from READY on a task per pod: if what it runs in ends, it is NOT_READY at once
    stop     kills the containers, NOT_READY, the steps down; the record and its address stay
    remove   stop, then the containers and the record
    update   other limits for all containers together

Shutting the daemon down touches no pod.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sandbox.containers import Containers
from sandbox.engine import Engines
from sandbox.errors import InvalidSpec, NotFound, SandboxError
from sandbox.inventory import Inventory, pod_name
from sandbox.lifecycle import Steps, UndoFailed, bring_up, held_steps, take_down
from sandbox.plan.resources import merge_resources
from sandbox.pod import Pod
from sandbox.quarantine import RUNTIMES, Quarantine
from sandbox.records import ContainerRecord, PodRecord, PodState
from sandbox.session import PortConnection
from sandbox.spec import Handler, Isolation, PodId, PodSpec, Resources

log = logging.getLogger(__name__)

STOP_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class PodDeps:
    """What pods need of the host."""

    handler: Callable[[str], Handler]  # raises InvalidSpec for an unknown name
    on_started: Callable[[PodRecord], None]


class Pods:
    def __init__(self, inventory: Inventory, engines: Engines, containers: Containers, host: PodDeps) -> None:
        self._inventory = inventory
        self._engines = engines
        self._containers = containers
        self._host = host

    # ------------------------------------------------------------------------------- look-up

    def find(self, id: str) -> PodRecord:
        return self._inventory.pod(id).record

    def list(self) -> Sequence[PodRecord]:
        # one that is starting is not shown: its client has not been told the id
        return [
            pod.record for pod in self._inventory.pods.values() if pod.record.state is not PodState.STARTING
        ]

    def containers_of(self, pod_id: str) -> Sequence[ContainerRecord]:
        pod = self._inventory.pod(pod_id)
        return [container.record for container in self._inventory.containers_of(pod)]

    async def describe(self, record: PodRecord) -> Mapping[str, object]:
        """Facts for a person: where things are, what runs, how long each phase of the start took."""
        pod = self._inventory.pod(record.id)
        return {
            "runDir": str(pod.run_dir),
            "handler": record.spec.handler,
            "isolation": record.isolation,
            "netns": record.network.netns if record.network else "",
            "interfaces": [
                {"name": nic.name, "mac": nic.mac, "mtu": nic.mtu, "addresses": nic.addresses}
                for nic in (record.network.interfaces if record.network else ())
            ],
            "phases": [
                {
                    "name": phase.name,
                    "side": phase.side,
                    "beginSeconds": phase.begin_s,
                    "endSeconds": phase.end_s,
                }
                for phase in record.phases
            ],
            "problem": record.problem,
            **await self._engines.of(pod).control.describe(pod),
        }

    # ------------------------------------------------------------------------------- run

    async def run(self, spec: PodSpec) -> PodId:
        """Start a pod. Raises Reserved, InvalidSpec, MissingProgram, PhaseFailed; after any of
        them nothing is left of it."""
        self._inventory.check_pod_name(spec)
        handler = self._host.handler(spec.handler)
        name = pod_name(spec)
        self._inventory.starting.add(name)  # it is taken from here on
        try:
            pod, steps = await self._begin(spec, handler)
        finally:
            self._inventory.starting.discard(name)
        try:
            async with pod.lock:
                await bring_up(steps, pod)
                pod.update(state=PodState.READY)
        except Exception as failure:
            await self._give_up(pod, failure)
            raise
        finally:
            self._engines.of(pod).pods.replenish()
        pod.handler = None
        self._engines.of(pod).pods.watch(pod)
        self._host.on_started(pod.record)
        return pod.id

    async def _begin(self, spec: PodSpec, handler: Handler) -> tuple[Pod, Steps[Pod]]:
        """A pod that is STARTING, and the rest of its way. Raises InvalidSpec, MissingProgram."""
        began = time.monotonic()
        engine = self._engines.for_isolation(isolation_of(spec, handler))
        pod, steps = await engine.pods.acquire(spec, handler)
        pod.began = began
        pod.handler = handler
        self._inventory.add_pod(pod)
        try:
            pod.update(
                spec=spec,
                resources=spec.resources,
                overhead=spec.overhead,
                state=PodState.STARTING,
                created_at_ns=time.time_ns(),
                phases=(),
            )
        except Exception as failure:
            await self._give_up(pod, failure)
            engine.pods.replenish()
            raise
        pod.record_phase("queue", began, time.monotonic())
        return pod, steps

    async def _give_up(self, pod: Pod, failure: Exception) -> None:
        """Release all that a pod holds, also what was made ahead of it, and its name."""
        try:
            await self._release(pod)
        except UndoFailed as undo:
            failure.add_note(f"not everything could be released: {undo}")
        else:
            self._inventory.forget_pod(pod)

    # ------------------------------------------------------------------------------- ports

    async def dial(self, id: str, port: int) -> PortConnection:
        """Connect to a TCP port inside the pod. Close the connection in the end.
        Raises NotFound, WrongState, GuestError (nothing listens there), GuestUnreachable,
        DeadlineExceeded."""
        pod = self._inventory.pod(id)
        pod.require_ready()
        return await self._engines.of(pod).sessions.dial(pod, port)

    # ------------------------------------------------------------------------------- stop, remove

    async def stop(self, id: str) -> None:
        """Kill what runs and release all that the pod holds. Unknown ids and stopped pods are fine.
        Raises UndoFailed; what is still held stays in the record, and another call tries again."""
        try:
            pod = self._inventory.pod(id)
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
        self._containers.lost(pod, "the sandbox was stopped")
        await self._release(pod)

    async def _release(self, pod: Pod) -> None:
        """Release what the pod holds, by its steps. Idempotent. Raises UndoFailed."""
        if pod.quarantined:
            await self._release_by_id(pod)
        else:
            await take_down(held_steps(self._engines.of(pod).pods.pod_steps, pod.record.steps), pod)

    async def _release_by_id(self, pod: Pod) -> None:
        """Release whatever any engine's pod of this id can hold: its record does not say."""
        failures: list[tuple[str, BaseException]] = []
        for isolation in self._engines:
            runtime = self._engines.for_isolation(isolation).pods
            pod.update(runtime=RUNTIMES[isolation])
            try:
                await runtime.destroy(pod.id, pod.run_dir)
                await take_down(runtime.pod_steps, pod)
            except UndoFailed as undo:
                failures += undo.failures
            except (SandboxError, OSError) as error:
                failures.append((str(isolation), error))
        if failures:
            raise UndoFailed(failures)

    async def _kill_containers(self, pod: Pod) -> None:
        """First, so that exit codes and the last lines of logs arrive."""
        running = [container for container in self._inventory.containers_of(pod) if container.running]
        stops = (self._containers.stop(container.id, 0) for container in running)
        with contextlib.suppress(TimeoutError, SandboxError):
            async with asyncio.timeout(STOP_GRACE_S):
                await asyncio.gather(*stops)

    async def remove(self, id: str) -> None:
        """Stop, then forget the pod and its containers. Unknown ids are fine. Raises UndoFailed."""
        try:
            pod = self._inventory.pod(id)
        except NotFound:
            return
        async with pod.lock:
            if pod.id not in self._inventory.pods:
                return
            await self._stop(pod)
            for container in self._inventory.containers_of(pod):
                await self._containers.release(container)
            self._inventory.forget_pod(pod)

    # ------------------------------------------------------------------------------- update

    async def update(self, id: str, resources: Resources, overhead: Resources) -> None:
        """Limits of all containers together. Raises NotFound, WrongState, InvalidSpec, GuestError,
        VmmError."""
        pod = self._inventory.pod(id)
        async with pod.lock:
            pod.require_ready()
            merged = merge_resources(pod.record.resources, resources)
            overhead = merge_resources(pod.record.overhead, overhead)
            await self._engines.of(pod).control.limit_pod(pod, merged, overhead)
            pod.update(resources=merged, overhead=overhead)

    # ------------------------------------------------------------------------------- recovery

    async def recover(self) -> None:
        """Reattach to the pods of the records, and undo those that were half made; one bad pod never blocks
        the rest. Quarantined ones are left alone. The stores must be loaded, and no call be served yet.
        Raises OSError when it cannot be known what must be left alone."""
        Quarantine(self._inventory, self._engines).load()
        known = [pod for pod in self._inventory.pods.values() if not pod.quarantined]
        await asyncio.gather(*(self._adopt_contained(pod) for pod in known))

    async def _adopt_contained(self, pod: Pod) -> None:
        try:
            await self._adopt(pod)
        except Exception as error:
            log.error("could not recover pod %s (%s): %s", pod.id, pod_name(pod.record.spec), error)
            log.debug("could not recover pod %s", pod.id, exc_info=True)

    async def _adopt(self, pod: Pod) -> None:
        for container in list(self._inventory.containers_of(pod)):
            await self._containers.settle(container)
        match pod.record.state:
            case PodState.STARTING | PodState.WAITING as state:
                await self._release(pod)
                self._inventory.forget_pod(pod)
                log.info("pod %s was %s when the daemon ended, and was removed", pod.id, state)
            case PodState.READY:
                await self._engines.of(pod).pods.adopt(pod)
            case PodState.NOT_READY:
                self._containers.lost(pod, pod.record.problem or "the sandbox was stopped")

    async def close(self) -> None:
        """Let go of every pod, touching none."""
        for pod in self._inventory.pods.values():
            await pod.disconnect()


def isolation_of(spec: PodSpec, handler: Handler) -> Isolation:
    """Raises InvalidSpec where the handler refuses what the pod asks for."""
    fields = spec.host_namespaces
    if not fields:
        return Isolation.VM
    if handler.host_pods == "refuse":
        name = f"handlers.{handler.name}" if handler.name else "the default handler"
        raise InvalidSpec(
            f"config.linux.security_context.namespace_options.{fields[0]}",
            f'NODE: a VM has no namespace of the node; set host_pods = "process" for {name}, or give the '
            "pod a RuntimeClass whose handler runs such pods as processes of the host",
            "POD",
        )
    return Isolation.PROCESS


def find_handler(handlers: Mapping[str, Handler], name: str) -> Handler:
    """Raises InvalidSpec naming the handlers that there are."""
    handler = handlers.get(name)
    if handler is None:
        names = ", ".join(repr(known) for known in sorted(handlers))
        raise InvalidSpec("runtime_handler", f"{name!r} is not configured", names)
    return handler
