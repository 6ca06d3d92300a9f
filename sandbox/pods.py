"""The verbs of pods, and their recovery after a restart of the daemon.

    run      acquire a pod from its engine (STARTING), bring its steps up, READY; a failure undoes all
    watch    from READY on, a task per pod: if the VM or the first process ends, NOT_READY at once
    stop     kill the containers, NOT_READY, take the steps down; the record and its addresses stay
    remove   stop, then release the containers and delete the records
    update   change the limits of all containers together
    recover  reattach to READY pods, undo those that were half made, leave quarantined ones alone

The daemon's end touches no pod. Calls for one pod are serialized by `pod.lock`.
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

STOP_GRACE_S = 7.0  # a container's end is reported up to 5 s later, after its log


@dataclass(frozen=True, slots=True)
class PodDeps:
    """What `Pods` is made of, beside other parts of this package."""

    handler: Callable[[str], Handler]  # by name; raises InvalidSpec for an unknown one
    on_started: Callable[[PodRecord], None]


class Pods:
    """The pods of this node, as the CRI's RuntimeService sees them. Belongs to one event loop.

    Methods take a full id or an unambiguous prefix, and return records: immutable snapshots. A call that is
    cancelled in the middle of a start leaves the pod STARTING, for the next daemon to release; so callers
    run each call in its own task (see `host.flights`).
    """

    def __init__(self, inventory: Inventory, engines: Engines, containers: Containers, deps: PodDeps) -> None:
        self._inventory = inventory
        self._engines = engines
        self._containers = containers
        self._deps = deps

    # ------------------------------------------------------------------------------- finding

    def find(self, id: str) -> PodRecord:
        """Return the record of a pod. Raises NotFound, and InvalidSpec for an ambiguous prefix."""
        return self._inventory.pod(id).record

    def list(self) -> Sequence[PodRecord]:
        """Return the records of all pods, quarantined ones included, but for those that are starting: no
        client has their ids yet."""
        return [
            pod.record for pod in self._inventory.pods.values() if pod.record.state is not PodState.STARTING
        ]

    def containers_of(self, pod_id: str) -> Sequence[ContainerRecord]:
        """Return the records of a pod's containers, in the order of their creation. Raises NotFound."""
        pod = self._inventory.pod(pod_id)
        return [container.record for container in self._inventory.containers_of(pod)]

    async def describe(self, record: PodRecord) -> Mapping[str, object]:
        """Return facts for a person: paths, what runs, and how long each phase of the start took. JSON
        values by name. Raises NotFound."""
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
        """Start a pod, and return its id once it is READY. A retry of a call that the daemon's end cut short
        returns the pod of that one, if it had become READY.

        Raises Reserved if the name is in use, InvalidSpec, MissingProgram, PhaseFailed naming the step that
        failed, OSError if a record cannot be written. Then everything is released; what could not be is
        named in a note to the error, and stays in the record for StopPodSandbox or the next daemon.
        """
        if (made := self._made_unanswered(spec)) is not None:
            return made.id
        self._inventory.check_pod_name(spec)
        handler = self._deps.handler(spec.handler)
        name = pod_name(spec)
        self._inventory.starting.add(name)  # reserved from here on
        try:
            pod, steps = await self._begin(spec, handler)
        finally:
            self._inventory.starting.discard(name)
        try:
            async with pod.lock:
                await bring_up(steps, pod)
                pod.update(state=PodState.READY)
        except Exception as failure:
            await self._abandon(pod, failure)
            raise
        finally:
            self._engines.of(pod).pods.replenish()
        pod.handler = None
        self._engines.of(pod).pods.watch(pod)
        self._deps.on_started(pod.record)
        return pod.id

    def _made_unanswered(self, spec: PodSpec) -> Pod | None:
        """Find the pod that this call is a retry for: READY, and without a container, which needs its id."""
        for pod in self._inventory.pods.values():
            same = pod.record.spec == spec and pod.record.ready
            if same and pod.may_be_unanswered(pod.record.created_at_ns):
                return None if any(self._inventory.containers_of(pod)) else pod
        return None

    async def _begin(self, spec: PodSpec, handler: Handler) -> tuple[Pod, Steps[Pod]]:
        """Acquire a pod and save it as STARTING; return it with the steps that are left."""
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
            await self._abandon(pod, failure)
            engine.pods.replenish()
            raise
        pod.record_phase("queue", began, time.monotonic())
        return pod, steps

    async def _abandon(self, pod: Pod, failure: Exception) -> None:
        """Release everything that a pod holds, what the pool prepared included, and its name."""
        try:
            await self._release(pod)
        except UndoFailed as undo:
            failure.add_note(f"not everything could be released: {undo}")
        else:
            self._inventory.forget_pod(pod)

    # ------------------------------------------------------------------------------- ports

    async def dial(self, id: str, port: int) -> PortConnection:
        """Connect to a TCP port on the pod's loopback interface. The caller closes the connection.

        Raises NotFound, WrongState if the pod is not READY, GuestError if nothing listens, GuestUnreachable,
        DeadlineExceeded.
        """
        pod = self._inventory.pod(id)
        pod.require_ready()
        return await self._engines.of(pod).sessions.dial(pod, port)

    # ------------------------------------------------------------------------------- stop, remove

    async def stop(self, id: str) -> None:
        """Kill what runs in the pod and release everything that it holds. Idempotent; an unknown id is fine
        (CRI: "must not return an error if all relevant resources have already been reclaimed").

        Raises UndoFailed; what is still held stays in the record, and another call retries it.
        """
        try:
            pod = self._inventory.pod(id)
        except NotFound:
            return
        async with pod.lock:
            await self._stop(pod)

    async def _stop(self, pod: Pod) -> None:
        await self._kill_containers(pod)
        if pod.watch is not None:
            pod.watch.cancel()
            pod.watch = None
        if pod.record.state is not PodState.NOT_READY:
            pod.update_anyway(state=PodState.NOT_READY)
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
        """Kill the containers while the VM still runs, so that exit codes and last lines of logs arrive.
        Waits up to STOP_GRACE_S; the rest ends with the VM."""
        running = [container for container in self._inventory.containers_of(pod) if container.running]
        stops = (self._containers.stop(container.id, 0) for container in running)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_GRACE_S):
                await asyncio.gather(*stops, return_exceptions=True)

    async def remove(self, id: str) -> None:
        """Stop the pod, release its containers, and delete the records. Idempotent; an unknown id is fine.
        Raises UndoFailed; then the pod stays, and another call retries."""
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
        """Change the limits of all containers together; fields that are 0 or empty stay as they are.
        `overhead` is what the sandbox may use beyond them. On failure the previous limits stay in force.

        Raises NotFound, WrongState if the pod is not READY, InvalidSpec, GuestError, VmmError.
        """
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
        pod.recovered_ns = time.time_ns()
        for container in list(self._inventory.containers_of(pod)):
            await self._containers.settle(container)
        match pod.record.state:
            case PodState.STARTING | PodState.WAITING as state:
                await self._release(pod)
                self._inventory.forget_pod(pod)
                log.info("pod %s was %s when the daemon ended, and was removed", pod.id, state)
            case PodState.READY:
                await self._engines.of(pod).pods.adopt(pod)
            case PodState.NOT_READY if pod.record.may_run:
                await self._engines.of(pod).pods.adopt(pod)
            case PodState.NOT_READY:
                self._containers.lost(pod, pod.record.problem or "the sandbox was stopped")

    async def close(self) -> None:
        """Close the connections to all pods, which run on."""
        for pod in self._inventory.pods.values():
            await pod.disconnect()


def isolation_of(spec: PodSpec, handler: Handler) -> Isolation:
    """Return what kind of engine runs such a pod: those that share namespaces of the node cannot be VMs.
    Raises InvalidSpec if the handler refuses these."""
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
    """Return the handler of this name. Raises InvalidSpec, listing the configured ones."""
    handler = handlers.get(name)
    if handler is None:
        names = ", ".join(repr(known) for known in sorted(handlers))
        raise InvalidSpec("runtime_handler", f"{name!r} is not configured", names)
    return handler
