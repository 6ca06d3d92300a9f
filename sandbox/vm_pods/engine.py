"""Containers in micro-VMs: each verb is a message or two to the agent in the pod's VM.

The agent's answers and events settle the containers' states; a connection that is lost is made anew
while the VM lives, and what happened meanwhile is told by its Welcome. A dead VM takes all with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from image.stores import RootfsStore
from sandbox.container import Container
from sandbox.errors import GuestError, GuestUnreachable, SandboxError, VmmGone
from sandbox.exits import Exits
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.execs import ExecResult
from sandbox.guest.sessions import AttachSession, ExecSession, Forwarded
from sandbox.host.tasks import Tasks
from sandbox.inventory import Inventory
from sandbox.lifecycle import Step, Steps
from sandbox.logs.file import usable_path
from sandbox.logs.relay import WINDOW, LogRelay
from sandbox.plan import vm_size
from sandbox.plan.encode import encode_cgroup_files, encode_container, encode_process
from sandbox.plan.resources import compile_pod_resources, compile_resources
from sandbox.plan.values import ProcessPlan
from sandbox.pod import GUEST_CALL_TIMEOUT_S, Pod
from sandbox.records import ContainerState, PodRecord, PodState
from sandbox.spec import ContainerId, ExitCode, Handler, PodId, PodSpec, Resources
from sandbox.stats.host_usage import HostUsage
from sandbox.steps.rootfs import ContainerRootfs
from sandbox.usage import UsageSample
from sandbox.vm_pods.accelerator import AcceleratorChoice
from sandbox.vm_pods.clock_sync import keep_clock
from sandbox.vm_pods.pool import VmPool
from sandbox.vm_pods.propagation import PropagationSync
from sandbox.vm_pods.resize import Resizer
from sandbox.vm_pods.steps import PodSteps, connect, plan_for_guest
from sandbox.vm_pods.usage import POD_CGROUP, decode_usage, usage_request
from sandbox.vm_pods.volumes import Volumes
from sandbox.vmm import Hypervisor

log = logging.getLogger(__name__)

ADOPT_TIMEOUT_S = 30.0
RECONNECT_PAUSE_S = 0.5
DIAL_TIMEOUT_S = 30.0
LOG_END_TIMEOUT_S = 5.0  # longer than a busy disk takes; a full one must not hide the exit


@dataclass(frozen=True, slots=True)
class VmDeps:
    """What pods in VMs need of the host."""

    hypervisor: Hypervisor
    steps: PodSteps
    factory: VmPool
    accelerator: Callable[[Handler], Awaitable[AcceleratorChoice]]
    rootfs: RootfsStore
    tasks: Tasks
    room: Resizer
    default_profile: Path  # AppArmor's, compiled; it need not be there
    usage: Callable[[Pod], HostUsage]  # reads files, of the host alone


class VmEngine:
    def __init__(self, inventory: Inventory, exits: Exits, host: VmDeps) -> None:
        self._inventory = inventory
        self._exits = exits
        self._host = host
        self._mirror = PropagationSync(host.tasks)
        self.pod_steps: Steps[Pod] = host.steps.whole
        self.container_steps: Sequence[Step[Container]] = (
            ContainerRootfs(host.rootfs),
            Volumes(host.rootfs, host.room),
            plan_for_guest(host.rootfs, host.default_profile),
        )

    # ------------------------------------------------------------------------------- pods

    async def take(self, spec: PodSpec, handler: Handler) -> tuple[Pod, Steps[Pod]]:
        """One that waits in the pool, or a new one."""
        size = vm_size(spec, handler)
        verdict = await self._host.accelerator(handler)
        pod = await self._host.factory.take(handler, verdict, size)
        steps = self._host.steps.claim if pod else self._host.steps.whole
        if pod is None:
            pod = self._inventory.make_pod(
                PodRecord(
                    id=PodId(secrets.token_hex(32)),
                    spec=spec,
                    created_at_ns=time.time_ns(),
                    accelerator=verdict.accelerator,
                    cpu=verdict.cpu,
                    token=secrets.token_bytes(16),
                )
            )
        pod.on_event = self._take_event
        pod.record_size(size)
        return pod, steps

    def settled(self) -> None:
        """Whatever it took, or found broken, is made anew."""
        self._host.factory.look()

    def watch(self, pod: Pod) -> None:
        pod.watch = self._host.tasks.spawn(self._supervise(pod), f"watch of pod {pod.id[:12]}")

    async def _supervise(self, pod: Pod) -> None:
        """Until the VM ends: keep a connection to its agent."""
        assert pod.machine is not None
        death = asyncio.create_task(pod.machine.wait())
        clock = self._host.tasks.spawn(keep_clock(lambda: pod.client), f"clock of pod {pod.id[:12]}")
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
            clock.cancel()
        await self._vm_gone(pod, death.result())

    async def _reconnect(self, pod: Pod, death: asyncio.Task[str]) -> None:
        log.warning("pod %s: lost the connection to its agent; connecting again", pod.id)
        pod.client = None
        pod.connected.clear()
        while not death.done():
            try:
                welcome = await connect(self._host.hypervisor, pod, ADOPT_TIMEOUT_S)
                await self._sync(pod, welcome)
                return
            except SandboxError as error:
                log.warning("pod %s: its agent does not answer: %s", pod.id, error)
                await asyncio.wait({death}, timeout=RECONNECT_PAUSE_S)

    async def _vm_gone(self, pod: Pod, reason: str) -> None:
        """The VM ended though nobody asked. What the pod holds stays until StopPodSandbox."""
        tail = pod.console()
        log.error("pod %s: its VM ended: %s%s", pod.id, reason, f"\n{tail}" if tail else "")
        pod.update(state=PodState.NOT_READY, problem=f"the VM ended: {reason}")
        self._exits.lost(pod, reason)
        for container in self._inventory.containers_of(pod):
            self.let_go(container)
        await pod.disconnect()

    async def adopt(self, pod: Pod) -> None:
        pod.on_event = self._take_event
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
        await self._sync(pod, welcome)
        self.watch(pod)
        log.info("pod %s taken up", pod.id)

    async def _adopt_later(self, pod: Pod) -> None:
        assert pod.machine is not None
        death = asyncio.create_task(pod.machine.wait())
        await self._reconnect(pod, death)
        if death.done():
            await self._vm_gone(pod, death.result())
        else:
            death.cancel()
            self.watch(pod)

    async def describe(self, pod: Pod) -> Mapping[str, object]:
        record = pod.record
        facts: dict[str, object] = {
            "accelerator": record.accelerator,
            "source": record.source,
            "guestKernel": record.guest_kernel,
            "size": {
                "memoryMiB": record.size.memory_mib,
                "vcpus": record.size.vcpus,
                "hugePagesMiB": record.size.huge_mib,
            }
            if record.size
            else None,
            "console": str(pod.run_dir / "console.log"),
            "guestPids": {
                container.id: container.pid
                for container in self._inventory.containers_of(pod)
                if container.running
            },
        }
        if record.vm is not None:
            facts["pid"] = record.vm.vmm.pid
            facts["helpers"] = {name: identity.pid for name, identity in record.vm.helpers.items()}
            facts["hostUsage"] = _as_facts(await asyncio.to_thread(self._host.usage, pod))
        if pod.machine is not None:
            facts["vmm"] = dict(await pod.machine.describe())
        return facts

    def pids(self, container: Container) -> Mapping[str, int]:
        vm = container.pod.record.vm
        if not container.running or vm is None:
            return {}
        return {"pid": vm.vmm.pid, "guestPid": container.pid}

    async def limit_pod(self, pod: Pod, resources: Resources, overhead: Resources) -> None:
        """In the guest's cgroup that holds those of all containers; the VM is given what it lacks.

        A cpuset counts the host's CPUs, and is the host's to keep (see `compile_resources`).
        """
        files = compile_pod_resources(resources, vcpus=pod.vcpus)
        await self._host.room.make(pod, resources, overhead)
        write = pb.WriteCgroup(container_id=POD_CGROUP, files=encode_cgroup_files(files))
        await pod.call(pb.Request(write_cgroup=write))

    async def dial(self, pod: Pod, port: int) -> Forwarded:
        return await Forwarded.dial(await pod.guest(), port, DIAL_TIMEOUT_S)

    async def usage(self, pod: Pod, ids: Sequence[ContainerId], *, files: bool) -> UsageSample:
        """A caller does not wait for a connection that is being re-established."""
        if pod.client is None:
            raise GuestUnreachable(f"pod {pod.id}: no connection to its agent")
        reply = await pod.client.call(usage_request(ids, files=files), GUEST_CALL_TIMEOUT_S)
        return decode_usage(reply.values, len(ids))

    async def destroy(self, pod_id: str, run_dir: Path) -> None:
        await self._host.hypervisor.destroy(pod_id, run_dir)

    # ------------------------------------------------------------------------------- containers

    async def start(self, container: Container) -> None:
        client = await container.pod.guest()
        request = pb.Request(start=encode_container(container.plan))
        relay = await self._open_log(container)
        request.start.log_stream = await relay.attach(client)
        request.start.log_window = WINDOW
        reply = await container.pod.call(request)
        await relay.begin()
        container.pid = reply.started.pid

    def follow(self, container: Container) -> None:
        self._mirror.watch(container)
        if container.early_exit is not None:
            self._spawn_finish(container, container.early_exit)

    def _take_event(self, pod: Pod, event: pb.Event) -> None:
        """An event of the pod's guest: believed only about the pod's own containers."""
        if event.WhichOneof("body") != "exited":
            return
        exited = event.exited
        container = self._inventory.containers.get(ContainerId(exited.container_id))
        if container is None or container.pod is not pod or exited.exec_id:
            return
        if container.record.state is ContainerState.CREATED:
            container.early_exit = exited
        elif container.running:
            self._spawn_finish(container, exited)

    def _spawn_finish(self, container: Container, exited: pb.Exited) -> None:
        self._host.tasks.spawn(self._finish(container, exited), f"exit of container {container.id[:12]}")

    async def _finish(self, container: Container, exited: pb.Exited) -> None:
        """Told once the last line is in the file: clients read the log right then."""
        relay = container.relay
        if relay is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOG_END_TIMEOUT_S):
                    await relay.complete()
        self._exits.exited(container, exited)

    async def _sync(self, pod: Pod, welcome: pb.Welcome) -> None:
        """Settle the containers of an adopted pod by what its guest says of them, and go on with
        their logs from the byte after the last one written."""
        told = {state.id: state for state in welcome.containers}
        for container in self._inventory.containers_of(pod):
            state = told.get(container.id)
            if state is not None:
                await self._sync_one(container, state)
            elif container.running:
                now = time.time_ns()
                container.record_exit(
                    ExitCode.UNKNOWN, now, "Unknown", "the guest has forgotten this container"
                )

    async def _sync_one(self, container: Container, state: pb.ContainerState) -> None:
        if container.record.state is ContainerState.CREATED:
            # killed between asking the guest and writing down its answer
            container.update(state=ContainerState.RUNNING, started_at_ns=time.time_ns())
        container.pid = state.pid
        self._mirror.watch(container)
        await self._resume_log(container)
        if state.state == pb.ContainerState.EXITED and container.running:
            self._spawn_finish(container, state.exited)

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
        client = await container.pod.guest()
        relay = await self._open_log(container)
        stream = await relay.attach(client)
        asked = relay.offset
        request = pb.OpenLog(container_id=container.id, offset=asked, stream=stream, window=WINDOW)
        reply = await container.pod.call(pb.Request(open_log=request))
        opened = reply.log_opened.offset
        if opened != asked:
            log.error("container %s: log bytes %d to %d are lost", container.id, asked, opened)
        await relay.begin(opened)

    def let_go(self, container: Container) -> None:
        if container.relay is not None:
            container.relay.close()
            container.relay = None

    async def signal(self, container: Container, number: int, *, all: bool) -> None:
        signal = pb.Signal(container_id=container.id, signal=number, all=all)
        await container.pod.call(pb.Request(signal=signal))

    async def remove(self, container: Container) -> None:
        pod = container.pod
        if pod.record.ready and container.record.started_at_ns:
            await pod.call(pb.Request(remove=pb.Remove(container_id=container.id)))
        self.let_go(container)
        await self._mirror.release(container)

    async def exec_sync(
        self, container: Container, process: ProcessPlan, timeout_s: float | None, limit: int
    ) -> ExecResult:
        client = await container.pod.guest()
        result = await client.exec_sync(container.id, encode_process(process), timeout_s, limit)
        # whoever called it to mount something looks at the host next
        await self._mirror.look(container)
        return result

    async def exec(
        self, container: Container, process: ProcessPlan, *, stdin: bool, stdout: bool, stderr: bool
    ) -> ExecSession:
        client = await container.pod.guest()
        return await ExecSession.start(
            client, container.id, encode_process(process), stdin=stdin, stdout=stdout, stderr=stderr
        )

    async def attach(self, container: Container, *, stdin: bool, stdout: bool, stderr: bool) -> AttachSession:
        client = await container.pod.guest()
        return await AttachSession.start(
            client,
            container.id,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            stdin_once=container.record.spec.stdin_once,
        )

    async def reopen_log(self, container: Container) -> None:
        if container.relay is not None:
            await container.relay.reopen()

    async def limit(self, container: Container, resources: Resources) -> None:
        pod, current = container.pod, container.record.resources
        compile_resources(resources, vcpus=pod.vcpus)  # what is wrong is found before anything changes
        await self._host.room.make(pod, pod.record.resources, pod.record.overhead, {container.id: resources})
        try:
            await pod.call(_limits(container, resources))
        except GuestError:
            # one file of several: those written before it go back
            with contextlib.suppress(SandboxError):
                await pod.call(_limits(container, current))
            raise


def _limits(container: Container, resources: Resources) -> pb.Request:
    files = encode_cgroup_files(compile_resources(resources, vcpus=container.pod.vcpus))
    score = pb.OomScore(adj=resources.oom_score_adj)
    return pb.Request(write_cgroup=pb.WriteCgroup(container_id=container.id, files=files, oom_score=score))


def _as_facts(usage: HostUsage) -> Mapping[str, object]:
    return {
        "guestMemoryBytes": usage.guest_memory_bytes,
        "overheadMemoryBytes": usage.overhead_memory_bytes,
        "vmmCpuSeconds": usage.vmm.cpu_seconds,
        "vmmMemoryBytes": usage.vmm.own_bytes,
        "helpersCpuSeconds": usage.helpers.cpu_seconds,
        "helpersMemoryBytes": usage.helpers.own_bytes,
    }
