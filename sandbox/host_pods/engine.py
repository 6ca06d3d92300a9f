"""The verbs of pods without a VM: conmon holds each container, crun makes it, cgroups limit it.

A container that runs is followed by its supervisor's end: then its exit code is in a file, and its log
complete. So nothing depends on the daemon being there when it happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from image.stores import RootfsStore
from network import netns
from network.attach import Networks
from sandbox.container import Container
from sandbox.engine import Engine
from sandbox.errors import DeadlineExceeded, GuestError, SandboxError
from sandbox.exits import Exit, Exits
from sandbox.host import cgroup, process
from sandbox.host.cgroup import Cgroups
from sandbox.host.limiter import Limiter
from sandbox.host.openat import make_beneath
from sandbox.host.tasks import Tasks
from sandbox.host_pods import conmon, control, sessions
from sandbox.host_pods.conmon import Bundle
from sandbox.host_pods.host_files import all_devices, find_devices, node_limits
from sandbox.host_pods.oci import RuntimeEnv, compile_config
from sandbox.host_pods.sessions import AttachSession, ExecSession, Forwarded, Place
from sandbox.host_pods.steps import Processes, container_steps, pod_path, pod_steps, runtime_of, shm_of
from sandbox.host_pods.sysctls import pod_sysctls
from sandbox.inventory import Inventory
from sandbox.lifecycle import Steps
from sandbox.logs.file import make_log, usable_path
from sandbox.plan.device_filter import device_rules
from sandbox.plan.resources import compile_pod_resources, compile_resources
from sandbox.plan.values import CgroupFile, ProcessPlan
from sandbox.pod import Pod
from sandbox.records import ContainerState, HostProcess, PodRecord, PodState, ProcessRuntime
from sandbox.session import ExecResult
from sandbox.spec import ContainerId, ExitCode, Handler, PidMode, PodId, PodSpec, Resources
from sandbox.stats.kernel_files import flat_keyed, number
from sandbox.steps.pod import remove_tree
from sandbox.usage import CGROUP_FILES, CgroupSample, UsageSample

log = logging.getLogger(__name__)

T = TypeVar("T")

DIAL_TIMEOUT_S = 30.0
SUPERVISOR_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class ProcessDeps:
    """What pods without a VM need of the host."""

    cgroups: Cgroups  # of all hierarchies
    networks: Networks
    stage: Limiter  # of plug-ins
    rootfs: RootfsStore
    tasks: Tasks


class ProcessEngine:
    def __init__(self, inventory: Inventory, exits: Exits, host: ProcessDeps) -> None:
        self._inventory = inventory
        self._exits = exits
        self._host = host
        self._layout = host.cgroups.layout
        self.pod_steps: Steps[Pod] = pod_steps(host.cgroups, host.networks, host.stage)
        self.container_steps = container_steps(host.rootfs)

    # ------------------------------------------------------------------------------- pods

    async def acquire(self, spec: PodSpec, handler: Handler) -> tuple[Pod, Steps[Pod]]:
        for program in (conmon.CONMON, conmon.CRUN):
            conmon.find_program(program)
        pod_sysctls(spec)  # what is wrong is found before anything is made
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
        return None

    def watch(self, pod: Pod) -> None:
        pod.watch = self._host.tasks.spawn(self._await_first(pod), f"watch of pod {pod.id[:12]}")

    async def _await_first(self, pod: Pod) -> None:
        """Who holds the namespaces has ended: what is in its PID namespace has too."""
        holder = runtime_of(pod).holder
        assert holder is not None
        await process.wait_exit(holder)
        await self._gone(pod, "the pod's first process ended")

    async def _gone(self, pod: Pod, reason: str) -> None:
        log.error("pod %s: %s", pod.id, reason)
        pod.update(state=PodState.NOT_READY, problem=reason)
        for container in self._inventory.containers_of(pod):
            with contextlib.suppress(SandboxError):
                await asyncio.to_thread(control.kill, self._layout, self._path_of(container))
        self._exits.lost(pod, reason)

    async def adopt(self, pod: Pod) -> None:
        for container in self._inventory.containers_of(pod):
            try:
                await self._adopt_container(container)
            except SandboxError as error:
                log.error("container %s cannot be taken up: %s", container.id, error)
        holder, init = runtime_of(pod).holder, runtime_of(pod).init
        if not (holder and init and process.alive(holder) and process.alive(init)):
            await self._gone(pod, "the pod's first process is gone")
            return
        self.watch(pod)
        log.info("pod %s taken up", pod.id)

    async def _adopt_container(self, container: Container) -> None:
        bundle = self._bundle(container)
        held = container.record.process
        if container.record.state is ContainerState.CREATED and bundle.path.exists():
            started = await self._was_started(container, bundle)
            if not started:
                await self._end(container)
                return
            container.update(state=ContainerState.RUNNING, started_at_ns=time.time_ns())
        if container.running:
            await asyncio.to_thread(sessions.end_execs, self._place(container))
            container.pid = held.init.pid if held and held.init else 0
            self.watch_exit(container)

    async def _was_started(self, container: Container, bundle: Bundle) -> bool:
        """Killed between the order to start and writing down that it was done."""
        held = container.record.process
        if held is None or held.init is None or not bundle.started.exists():
            return False
        if bundle.exit_code() is not None or not process.alive(held.init):
            return True
        done = await process.run(bundle.crun("state", bundle.id), timeout_s=conmon.RUN_TIMEOUT_S)
        with contextlib.suppress(ValueError):
            return bool(json.loads(done.stdout).get("status") != "created")
        return False

    def pids(self, container: Container) -> Mapping[str, int]:
        held = container.record.process
        return {"pid": held.init.pid} if container.running and held and held.init else {}

    async def describe(self, pod: Pod) -> Mapping[str, object]:
        record, init = pod.record, runtime_of(pod).init
        containers = {
            container.id: pids["pid"]
            for container in self._inventory.containers_of(pod)
            if (pids := self.pids(container))
        }
        return {
            "hostNamespaces": list(record.spec.host_namespaces),
            "cgroup": self._path(pod),
            "pid": init.pid if init else None,
            "containerPids": containers,
        }

    async def limit_pod(self, pod: Pod, resources: Resources, overhead: Resources) -> None:
        files = compile_pod_resources(resources)
        current = pod.record.resources
        await self._limit(self._path(pod), files, resources, compile_pod_resources(current), current)

    async def dial(self, pod: Pod, port: int) -> Forwarded:
        return Forwarded(
            await asyncio.to_thread(self._in_network, pod, lambda: sessions.dial(port, DIAL_TIMEOUT_S))
        )

    def _in_network(self, pod: Pod, action: Callable[[], T]) -> T:
        network = pod.record.network
        return action() if network is None else netns.run_in(Path(network.netns), action)

    async def usage(self, pod: Pod, ids: Sequence[ContainerId], *, files: bool) -> UsageSample:
        return await asyncio.to_thread(self._usage, pod, ids, files)

    def _usage(self, pod: Pod, ids: Sequence[ContainerId], files: bool) -> UsageSample:
        def sample(path: str) -> CgroupSample:
            contents = {name: control.read(self._layout, path, name) for name in CGROUP_FILES}
            return CgroupSample(files=contents, count=control.process_count(self._layout, path, files=files))

        top = self._path(pod)
        return UsageSample(
            pod=sample(top),
            containers=tuple(sample(f"{top}/{id}") for id in ids),
            net_dev=self._in_network(pod, Path("/proc/thread-self/net/dev").read_bytes),
            meminfo=Path("/proc/meminfo").read_bytes(),
            wall_ns=time.time_ns(),
        )

    def cost(self, pod: Pod) -> tuple[float, int]:
        """Seconds of CPU time and bytes of memory of all its processes; blocking, in any thread."""
        path = self._path(pod)
        usage = flat_keyed(control.read(self._layout, path, "cpu.stat")).get(b"usage_usec", 0)
        return usage / 1e6, number(control.read(self._layout, path, "memory.current"))

    async def destroy(self, pod_id: str, run_dir: Path) -> None:
        """Where its cgroup's parent was the kubelet's, processes are found by their arguments alone."""
        path = cgroup.pod_path("", pod_id, root=self._host.cgroups.root)
        await asyncio.to_thread(Processes(self._host.cgroups).end_all, run_dir, path)
        await asyncio.to_thread(self._host.cgroups.remove, pod_id, "")

    # ------------------------------------------------------------------------------- containers

    async def start(self, container: Container) -> None:
        bundle = self._bundle(container)
        config = await asyncio.to_thread(self._configure, container)
        try:
            await asyncio.to_thread(self._prepare, container, bundle, config)
            await self._start(container, bundle)
        except (SandboxError, OSError) as error:
            await self._end(container)
            if isinstance(error, OSError):
                raise GuestError("start", error.errno or 0, str(error)) from error
            raise

    def _configure(self, container: Container) -> Mapping[str, object]:
        """Raises InvalidSpec."""
        plan, pod = container.plan, container.pod
        privileged = container.record.spec.security.privileged
        bundle, limits = self._bundle(container), node_limits()
        around = RuntimeEnv(
            shm=shm_of(pod),
            namespaces=self._namespaces(container),
            files=tuple(str(bundle.path / "files" / str(number)) for number in range(len(plan.files))),
            limits=limits,
            devices=tuple(all_devices()) if privileged else (),
        )
        return compile_config(plan, around)

    def _namespaces(self, container: Container) -> Mapping[str, str]:
        pod, first = container.pod.record, runtime_of(container.pod).init
        assert first is not None
        shared = f"/proc/{first.pid}/ns"
        found = {"mount": "", "cgroup": "", "uts": f"{shared}/uts"}
        if not pod.spec.host_ipc:
            found["ipc"] = f"{shared}/ipc"
        if pod.network is not None:
            found["network"] = pod.network.netns
        security = container.record.spec.security
        match security.pid_mode:
            case PidMode.CONTAINER:
                found["pid"] = ""
            case PidMode.POD if pod.spec.pid_mode is not PidMode.NODE:
                found["pid"] = f"{shared}/pid"
            case PidMode.TARGET:
                found["pid"] = self._namespace_of_target(container, security.pid_target)
        return found

    def _namespace_of_target(self, container: Container, id: str) -> str:
        target = self._inventory.container(id)
        held = target.record.process
        if target.pod is not container.pod or not target.running or held is None or held.init is None:
            raise GuestError("namespace", 0, f"container {id} does not run in this pod")
        return f"/proc/{held.init.pid}/ns/pid"

    def _prepare(self, container: Container, bundle: Bundle, config: Mapping[str, object]) -> None:
        if bundle.path.exists():
            remove_tree(bundle.path)
        for directory in (bundle.path, bundle.exit_file.parent, bundle.execs, bundle.path / "files"):
            directory.mkdir(mode=0o700)
        (bundle.path / "config.json").write_text(json.dumps(config, ensure_ascii=False))
        for place, file in enumerate(container.plan.files):
            path = bundle.path / "files" / str(place)
            path.write_bytes(file.content)
            path.chmod(file.mode)
        if log_path := container.record.log_path:
            with usable_path(log_path):
                make_log(Path(log_path))
        make_beneath(Path(container.plan.rootfs), container.plan.process.cwd, directory=True)
        control.make(self._layout, self._path_of(container))

    async def _start(self, container: Container, bundle: Bundle) -> None:
        spec, path = container.record.spec, self._path_of(container)
        wish = conmon.ConmonOptions(
            log_path=container.record.log_path,
            tty=spec.tty,
            stdin=spec.stdin,
            stdin_once=spec.stdin_once,
            cgroups=cgroup.directories(self._layout, path),
            layout=self._layout,
        )
        starting = await conmon.start(bundle, wish)
        container.update(process=HostProcess(supervisor=starting.supervisor))
        first = await starting.created(bundle)
        container.update(process=HostProcess(supervisor=starting.supervisor, init=first))
        await asyncio.to_thread(self._confine, container, starting.supervisor.pid)
        await asyncio.to_thread(bundle.started.touch)
        await conmon.run_crun(bundle, "start", bundle.id)
        container.pid = first.pid

    def _confine(self, container: Container, supervisor: int) -> None:
        """What the container's program finds in force. Raises GuestError, OSError, InvalidSpec."""
        path = self._path_of(container)
        control.join(self._layout, f"{self._path(container.pod)}/{control.SUPERVISOR}", supervisor)
        resources = container.record.resources
        control.write_limits(self._layout, path, compile_resources(resources), resources)
        spec = container.record.spec
        if not spec.security.privileged:
            rules = device_rules(find_devices(spec))
            control.allow_devices(self._layout, path, rules, container.plan.device_filter)

    def watch_exit(self, container: Container) -> None:
        self._host.tasks.spawn(self._await_end(container), f"end of container {container.id[:12]}")

    async def _await_end(self, container: Container) -> None:
        held, bundle = container.record.process, self._bundle(container)
        assert held is not None
        await process.wait_exit(held.supervisor)
        found = bundle.exit_code()
        path = self._path_of(container)
        kills = await asyncio.to_thread(control.oom_kills, self._layout, path)
        # what its first process left behind, where that was no first process of a namespace
        with contextlib.suppress(DeadlineExceeded):
            await asyncio.to_thread(control.kill, self._layout, path)
        if found is None:
            log.error("container %s: conmon ended without an exit code; what it held is killed", container.id)
        code, at_ns = found or (ExitCode.KILLED, time.time_ns())
        self._exits.exited(container, Exit(exit_code=code, at_ns=at_ns, oom_kills=kills))

    async def signal(self, container: Container, number: int, *, all: bool) -> None:
        if all and number == signal.SIGKILL:
            await asyncio.to_thread(control.kill, self._layout, self._path_of(container))
            return
        held = container.record.process
        if held is not None and held.init is not None and process.alive(held.init):
            control.send(held.init.pid, number)

    async def remove(self, container: Container) -> None:
        await self._end(container)

    async def _end(self, container: Container) -> None:
        """Kill and remove all of it that a start has made, however far it came. Idempotent."""
        path, bundle = self._path_of(container), self._bundle(container)
        await asyncio.to_thread(control.kill, self._layout, path)
        held = container.record.process
        if held is not None:
            with contextlib.suppress(TimeoutError):  # it collects what was killed, and ends
                async with asyncio.timeout(SUPERVISOR_TIMEOUT_S):
                    await process.wait_exit(held.supervisor)
            await process.kill(held.supervisor)
        if not bundle.path.exists():
            return
        for stray in await asyncio.to_thread(process.find_by_argument, f"{bundle.path}"):
            await process.kill(stray)
        await asyncio.to_thread(control.kill, self._layout, path)
        await asyncio.to_thread(cgroup.remove, self._layout, path)
        await asyncio.to_thread(remove_tree, bundle.state / bundle.id)
        await asyncio.to_thread(remove_tree, bundle.path)

    def detach(self, container: Container) -> None:
        return None

    async def exec_sync(
        self, container: Container, process: ProcessPlan, timeout_s: float | None, limit: int
    ) -> ExecResult:
        return await sessions.exec_sync(self._place(container), process, timeout_s, limit)

    async def exec(
        self, container: Container, process: ProcessPlan, *, stdin: bool, stdout: bool, stderr: bool
    ) -> ExecSession:
        place = self._place(container)
        return await ExecSession.start(place, process, stdin=stdin, stdout=stdout, stderr=stderr)

    def _place(self, container: Container) -> Place:
        path = self._path_of(container)
        return Place(
            bundle=self._bundle(container),
            cgroups=cgroup.directories(self._layout, path),
            kill=lambda leaders: control.kill(self._layout, path, control.started_by(*leaders)),
        )

    async def attach(self, container: Container, *, stdin: bool, stdout: bool, stderr: bool) -> AttachSession:
        return await AttachSession.start(self._bundle(container), stdin=stdin, stdout=stdout, stderr=stderr)

    async def reopen_log(self, container: Container) -> None:
        held = container.record.process
        if held is not None and container.record.log_path:
            path = Path(container.record.log_path)
            await asyncio.to_thread(conmon.reopen_log, self._bundle(container), held.supervisor, path)

    async def limit(self, container: Container, resources: Resources) -> None:
        path, current = self._path_of(container), container.record.resources
        files = compile_resources(resources)
        await self._limit(path, files, resources, compile_resources(current), current)
        await asyncio.to_thread(control.set_oom_score, self._layout, path, resources.oom_score_adj)

    async def _limit(
        self,
        path: str,
        files: Sequence[CgroupFile],
        resources: Resources,
        before: Sequence[CgroupFile],
        current: Resources,
    ) -> None:
        try:
            await asyncio.to_thread(control.write_limits, self._layout, path, files, resources)
        except GuestError:
            # one file of several: those written before it go back
            with contextlib.suppress(SandboxError):
                await asyncio.to_thread(control.write_limits, self._layout, path, before, current)
            raise

    # ------------------------------------------------------------------------------- places

    def _path(self, pod: Pod) -> str:
        return pod_path(self._host.cgroups, pod)

    def _path_of(self, container: Container) -> str:
        return f"{self._path(container.pod)}/{container.id}"

    def _bundle(self, container: Container) -> Bundle:
        run_dir = container.pod.run_dir
        return Bundle(id=container.id, path=run_dir / "containers" / container.id, state=run_dir / "crun")


def make_engine(inventory: Inventory, exits: Exits, deps: ProcessDeps) -> tuple[Engine, ProcessEngine]:
    """Make the engine of pods without a VM, and the object that implements all of its parts."""
    engine = ProcessEngine(inventory, exits, deps)
    return Engine(pods=engine, containers=engine, sessions=engine, control=engine), engine
