"""Containers without a VM: conmon holds each, crun makes it, cgroups limit it.

conmon writes a container's log and, when its first process has ended, its exit code to a file; then it ends.
So the end of conmon is the end of the container, with a complete log, whether or not a daemon runs then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from sandbox.container import Container
from sandbox.errors import DeadlineExceeded, GuestError, PlanUnreadable, SandboxError
from sandbox.exits import Exit, Exits
from sandbox.host import cgroup, process
from sandbox.host.openat import make_beneath, open_beneath
from sandbox.host.tasks import Tasks
from sandbox.host_pods import cgroups, conmon, execs
from sandbox.host_pods.conmon import Bundle
from sandbox.host_pods.host_files import all_devices, find_devices, node_limits
from sandbox.host_pods.layout import HostLayout, runtime_of, shm_of
from sandbox.host_pods.oci import RuntimeEnv, compile_config
from sandbox.inventory import Inventory
from sandbox.lifecycle import Steps
from sandbox.logs.file import make_log, usable_path
from sandbox.plan.device_filter import device_rules
from sandbox.plan.resources import compile_resources
from sandbox.plan.values import ContainerPlan
from sandbox.records import ContainerState, HostProcess
from sandbox.spec import ExitCode, PidMode
from sandbox.steps.container import CompiledPlan
from sandbox.steps.pod import remove_tree

log = logging.getLogger(__name__)

SUPERVISOR_TIMEOUT_S = 2.0  # for conmon to reap a container that was killed, and to end


class ProcessContainers:
    """See `engine.ContainerRuntime`."""

    def __init__(
        self,
        inventory: Inventory,
        exits: Exits,
        tasks: Tasks,
        layout: HostLayout,
        container_steps: Steps[Container],
    ) -> None:
        self._inventory = inventory
        self._exits = exits
        self._tasks = tasks
        self._layout = layout
        self.container_steps = container_steps

    # ------------------------------------------------------------------------------- the seam

    async def start(self, container: Container) -> None:
        """Let conmon and crun make the container, confine it, then run its program."""
        bundle = self._layout.bundle(container)
        config = await asyncio.to_thread(self._configure, container)
        try:
            await asyncio.to_thread(self._prepare, container, bundle, config)
            await self._start(container, bundle)
        except (SandboxError, OSError) as error:
            await self.remove(container)
            if isinstance(error, OSError):
                raise GuestError("start", error.errno or 0, str(error)) from error
            raise

    def watch_exit(self, container: Container) -> None:
        """Watch the container's conmon."""
        self._tasks.spawn(self._await_end(container), f"end of container {container.id[:12]}")

    async def signal(self, container: Container, number: int, *, all: bool) -> None:
        """Send the signal; with `all`, SIGKILL is repeated until no process is left."""
        hierarchies, path = self._layout.hierarchies, self._layout.container_cgroup(container)
        if all and number == signal.SIGKILL:
            await asyncio.to_thread(cgroups.kill, hierarchies, path)
        elif all:
            for pid in await asyncio.to_thread(cgroups.pids, hierarchies, path):
                cgroups.send(pid, number)
        else:
            held = container.record.process
            if held is not None and held.init is not None and process.alive(held.init):
                cgroups.send(held.init.pid, number)

    async def remove(self, container: Container) -> None:
        """Kill and delete everything that `start` made, however far it came."""
        hierarchies, path = self._layout.hierarchies, self._layout.container_cgroup(container)
        bundle = self._layout.bundle(container)
        await asyncio.to_thread(cgroups.kill, hierarchies, path)
        held = container.record.process
        if held is not None:
            with contextlib.suppress(TimeoutError):  # it reaps what was killed, and ends
                async with asyncio.timeout(SUPERVISOR_TIMEOUT_S):
                    await process.wait_exit(held.supervisor)
            await process.kill(held.supervisor)
        if not bundle.path.exists():
            return
        for stray in await asyncio.to_thread(process.find_by_argument, f"{bundle.path}"):
            await process.kill(stray)
        await asyncio.to_thread(cgroups.kill, hierarchies, path)
        await asyncio.to_thread(cgroup.remove, hierarchies, path)
        await asyncio.to_thread(remove_tree, bundle.state / bundle.id)
        await asyncio.to_thread(remove_tree, bundle.path)

    def detach(self, container: Container) -> None:
        """Nothing: the daemon keeps nothing open for a container, as conmon writes its log."""

    # ------------------------------------------------------------------------------- starting

    def _configure(self, container: Container) -> Mapping[str, object]:
        """Raises InvalidSpec."""
        plan, bundle = container.plan, self._layout.bundle(container)
        env = RuntimeEnv(
            shm=shm_of(container.pod),
            namespaces=self._namespaces(container),
            files=tuple(str(bundle.file(number)) for number in range(len(plan.files))),
            limits=node_limits(),
            places=_places(plan),
            devices=tuple(all_devices()) if container.record.spec.security.privileged else (),
        )
        return compile_config(plan, env)

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
        """Make the bundle, the log file, the working directory and the cgroup."""
        if bundle.path.exists():
            remove_tree(bundle.path)
        for directory in (bundle.path, bundle.exit_file.parent, bundle.execs, bundle.file(0).parent):
            directory.mkdir(mode=0o700)
        (bundle.path / "config.json").write_text(json.dumps(config, ensure_ascii=False))
        for number, file in enumerate(container.plan.files):
            bundle.file(number).write_bytes(file.content)
            bundle.file(number).chmod(file.mode)
        if log_path := container.record.log_path:
            with usable_path(log_path):
                make_log(Path(log_path))
        make_beneath(Path(container.plan.rootfs), container.plan.process.cwd, directory=True)
        cgroups.make(self._layout.hierarchies, self._layout.container_cgroup(container))

    async def _start(self, container: Container, bundle: Bundle) -> None:
        spec, path = container.record.spec, self._layout.container_cgroup(container)
        options = conmon.ConmonOptions(
            log_path=container.record.log_path,
            tty=spec.tty,
            stdin=spec.stdin,
            stdin_once=spec.stdin_once,
            cgroups=cgroup.directories(self._layout.hierarchies, path),
            layout=self._layout.hierarchies,
        )
        starting = await conmon.start(bundle, options)
        container.update(process=HostProcess(supervisor=starting.supervisor))
        first = await starting.created(bundle)
        container.update(process=HostProcess(supervisor=starting.supervisor, init=first))
        await asyncio.to_thread(self._confine, container, starting.supervisor.pid)
        await asyncio.to_thread(bundle.started.touch)
        await conmon.run_crun(bundle, "start", bundle.id)
        container.pid = first.pid

    def _confine(self, container: Container, supervisor: int) -> None:
        """Put limits and the device filter in force before the container's program runs.

        Raises GuestError, OSError, InvalidSpec.
        """
        hierarchies, path = self._layout.hierarchies, self._layout.container_cgroup(container)
        cgroups.join(hierarchies, self._layout.supervisor_cgroup(container.pod), supervisor)
        resources = container.record.resources
        cgroups.write_limits(hierarchies, path, compile_resources(resources), resources)
        spec = container.record.spec
        if not spec.security.privileged:
            rules = device_rules(find_devices(spec))
            cgroups.allow_devices(hierarchies, path, rules, container.plan.device_filter)

    # ------------------------------------------------------------------------------- exits

    async def _await_end(self, container: Container) -> None:
        held, bundle = container.record.process, self._layout.bundle(container)
        assert held is not None
        await process.wait_exit(held.supervisor)
        found = bundle.exit_code()
        hierarchies, path = self._layout.hierarchies, self._layout.container_cgroup(container)
        kills = await asyncio.to_thread(cgroups.oom_kills, hierarchies, path)
        # processes that the first one left, where it was not the first of a PID namespace
        with contextlib.suppress(DeadlineExceeded):
            await asyncio.to_thread(cgroups.kill, hierarchies, path)
        if found is None:
            log.error(
                "container %s: conmon ended without an exit code; its processes were killed", container.id
            )
        code, at_ns = found or (ExitCode.KILLED, time.time_ns())
        self._exits.exited(container, Exit(exit_code=code, at_ns=at_ns, oom_kills=kills))

    # ------------------------------------------------------------------------------- recovery

    async def recover(self, container: Container) -> None:
        """Settle a container of an earlier daemon: watch it, or undo a start that was cut short."""
        bundle = self._layout.bundle(container)
        if container.record.state is ContainerState.CREATED and bundle.path.exists():
            if not await self._was_started(container, bundle):
                await self.remove(container)
                return
            container.update(state=ContainerState.RUNNING, started_at_ns=time.time_ns())
        if container.running:
            held = container.record.process
            await asyncio.to_thread(execs.end_execs, execs.site_of(self._layout, container))
            container.pid = held.init.pid if held and held.init else 0
            self.watch_exit(container)
        if container.record.state in (ContainerState.CREATED, ContainerState.RUNNING):
            await self._restore_plan(container)

    async def _restore_plan(self, container: Container) -> None:
        """Compile the plan again where an earlier release saved it in another format, or it is damaged."""
        try:
            _ = container.plan
        except PlanUnreadable as error:
            log.warning("container %s: compiling its plan again: %s", container.id, error.problem)
            for step in self.container_steps:
                if isinstance(step, CompiledPlan):
                    await step.up(container)

    async def _was_started(self, container: Container, bundle: Bundle) -> bool:
        """Whether the daemon was killed between the order to start and recording that it was done."""
        held = container.record.process
        if held is None or held.init is None or not bundle.started.exists():
            return False
        if bundle.exit_code() is not None or not process.alive(held.init):
            return True
        done = await process.run(bundle.crun("state", bundle.id), timeout_s=conmon.RUN_TIMEOUT_S)
        with contextlib.suppress(ValueError):
            return bool(json.loads(done.stdout).get("status") != "created")
        return False


def _places(plan: ContainerPlan) -> Mapping[str, str]:
    """Find the targets that are bound on themselves, made where they are missing: links in the image lead
    nowhere else. Raises GuestError."""
    root = Path(plan.rootfs)
    found = {}
    for mount in plan.mounts:
        if mount.source:
            continue
        make_beneath(root, mount.target, directory=True)
        try:
            place = open_beneath(root, mount.target, os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            raise GuestError(f"mount {mount.target}", error.errno or 0, error.strerror or "") from error
        try:
            found[mount.target] = str(Path(f"/proc/self/fd/{place}").readlink())
        finally:
            os.close(place)
    return found
