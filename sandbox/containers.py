"""The verbs of containers: create, start, stop, remove, exec, logs, resources.

CreateContainer does all the host's work (root filesystem, volumes, the compiled plan), so that
StartContainer is one message to the guest. The state changes in one place each: `start` makes
RUNNING, `_apply_exit` makes EXITED.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from image.stores import RootfsStore
from sandbox.apparmor import profile_name
from sandbox.cdi_files import with_devices
from sandbox.container import Container
from sandbox.container_steps import Plan, Rootfs
from sandbox.errors import (
    GuestError,
    GuestUnreachable,
    InvalidSpec,
    NotFound,
    SandboxError,
    WrongState,
)
from sandbox.events import Events
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.execs import ExecResult
from sandbox.guest.sessions import AttachSession, ExecSession
from sandbox.lifecycle import Step, bring_up, take_down
from sandbox.logs import WINDOW, LogRelay
from sandbox.plan import compile_exec
from sandbox.pod import Pod
from sandbox.propagation import Mirror
from sandbox.records import ContainerRecord, ContainerState, ImageVolume
from sandbox.registry import Registry
from sandbox.resources import compile_resources, merge_resources
from sandbox.room import Room
from sandbox.signals import resolve_stop_signal, signal_number
from sandbox.spec import ContainerId, ContainerSpec, ImageDefaults, Resources
from sandbox.store import Store
from sandbox.tasks import Tasks
from sandbox.volumes import Volumes

if TYPE_CHECKING:
    from image.library import Library

log = logging.getLogger(__name__)

LOG_END_TIMEOUT_S = 5.0  # longer than a busy disk takes; a full one must not hide the exit
KILL_TIMEOUT_S = 30.0
# Two of these and the frame around them must fit the 16 MiB that a CRI client receives.
EXEC_OUTPUT_LIMIT = 7 << 20
# What is wrong with a path itself.
_PATH_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_SHOWN_MAX = 200
EXIT_CODE_START_ERROR = 128
EXIT_CODE_KILLED = 137
EXIT_CODE_UNKNOWN = 255


@dataclass(frozen=True, slots=True)
class ContainerHost:
    """What containers need of the host."""

    store: Store[ContainerRecord]
    plans: Path
    images: Library
    rootfs: RootfsStore
    tasks: Tasks
    events: Events
    room: Room
    default_profile: Path  # AppArmor's, compiled; it need not be there
    cdi_dirs: Sequence[Path] = ()
    on_phase: Callable[[str, float], None] = lambda name, seconds: None


class Containers:
    def __init__(self, registry: Registry, host: ContainerHost) -> None:
        self._registry = registry
        self._host = host
        self._mirror = Mirror(host.tasks)
        self._steps: Sequence[Step[Container]] = (
            Rootfs(host.rootfs),
            Volumes(host.rootfs),
            Plan(host.default_profile),
        )

    # ------------------------------------------------------------------------------- look-up

    def find(self, id: str) -> ContainerRecord:
        return self._registry.container(id).record

    def list(self) -> Sequence[ContainerRecord]:
        containers = self._registry.containers.values()
        return [each.record for each in containers if each.record.state is not ContainerState.CREATING]

    async def describe(self, record: ContainerRecord) -> Mapping[str, object]:
        """Facts for a person, beside what the status tells."""
        container = self._registry.container(record.id)
        return {
            "sandboxID": container.pod.id,
            "rootfs": str(container.rootfs),
            "plan": str(container.plan_path),
            "user": record.user,
            "apparmor": profile_name(record.spec.security.apparmor),
            "log": record.log,
            "imageID": record.image_id,
            "chainIDs": record.chain_ids,
        }

    # ------------------------------------------------------------------------------- create

    async def create(self, pod_id: str, spec: ContainerSpec) -> ContainerId:
        """Prepare everything on the host. Raises NotFound, WrongState, Reserved, InvalidSpec,
        ImageNotFound, PhaseFailed; after any of them nothing is left."""
        if spec.cdi_devices:
            spec = await asyncio.to_thread(with_devices, spec, self._host.cdi_dirs)
        pod = self._registry.pod(pod_id)
        pod.require_ready()
        image = self._host.images.index.find(spec.image)
        self._registry.check_container_name(pod, spec)
        defaults = ImageDefaults(
            entrypoint=tuple(image.config.entrypoint),
            cmd=tuple(image.config.cmd),
            env=tuple(image.config.env),
            working_dir=image.config.working_dir,
            user=image.config.user,
            stop_signal=image.config.stop_signal,
            volumes=tuple(image.config.volumes),
        )
        record = ContainerRecord(
            id=ContainerId(secrets.token_hex(32)),
            pod_id=pod.id,
            spec=spec,
            created_at_ns=time.time_ns(),
            image_id=image.id,
            image_ref=image.id,
            chain_ids=tuple(image.chain_ids),
            image_volumes=tuple(self._image_volumes(spec)),
            defaults=defaults,
            resources=spec.resources,
            stop_signal=resolve_stop_signal(spec.stop_signal, image.config.stop_signal),
            log_path=_log_path(pod.record.spec.log_directory, spec.log_path),
        )
        container = self._adopted(record, pod)
        self._host.store.put(record)
        self._registry.containers[container.id] = container
        try:
            await bring_up(
                self._steps,
                container,
                begin=container.begin,
                finish=lambda name, begin, end: self._note_phase(pod, f"container-{name}", begin),
                ended=container.ended,
                console=pod.console,
            )
        except Exception:
            if not container.record.steps:
                self._forget(container)
            raise
        container.update(state=ContainerState.CREATED)
        return container.id

    def _note_phase(self, pod: Pod, name: str, begin_s: float) -> None:
        """A phase that ends now, for the metrics; a pod's waterfall ends with its first container."""
        self._host.on_phase(name, time.monotonic() - begin_s)
        pod.note_first(name, begin_s)

    def adopt(self, record: ContainerRecord, pod: Pod) -> Container:
        """Take up a container of an earlier daemon; its state is settled by `sync`."""
        container = self._adopted(record, pod)
        self._registry.containers[container.id] = container
        return container

    def _image_volumes(self, spec: ContainerSpec) -> Iterator[ImageVolume]:
        """Raises ImageNotFound: a kubelet has pulled them by now."""
        for number, mount in enumerate(spec.mounts):
            if mount.image:
                image = self._host.images.index.find(mount.image)
                yield ImageVolume(mount=number, image_id=image.id, chain_ids=tuple(image.chain_ids))

    def _adopted(self, record: ContainerRecord, pod: Pod) -> Container:
        container = Container(record, self._host.store, pod, self._host.plans)
        container.on_state = self._host.events.container_changed
        return container

    # ------------------------------------------------------------------------------- start

    async def start(self, id: str) -> None:
        """Run the first process. Raises NotFound, WrongState, GuestError (the program cannot be
        run: the container is EXITED with code 128 and reason StartError)."""
        container = self._registry.container(id)
        async with container.lock:
            container.require(ContainerState.CREATED)
            container.pod.require_ready()
            began = time.monotonic()
            client = await container.pod.guest()
            request = pb.Request(start=container.plan)
            relay = await self._open_log(container)
            request.start.log_stream = await relay.attach(client)
            request.start.log_window = WINDOW
            try:
                reply = await container.pod.call(request)
            except GuestError as error:
                self._start_failed(container, error)
                raise
            await relay.begin()
            container.pid = reply.started.pid
            container.update(state=ContainerState.RUNNING, started_at_ns=time.time_ns())
            self._note_phase(container.pod, "container-start", began)
            self._mirror.watch(container)
            if container.early_exit is not None:
                self._apply_exit(container, container.early_exit)

    def _start_failed(self, container: Container, error: GuestError) -> None:
        now = time.time_ns()
        container.update(started_at_ns=now)
        container.take_exit(EXIT_CODE_START_ERROR, now, "StartError", str(error))
        self._close_log(container)

    # ------------------------------------------------------------------------------- exits

    def take_event(self, pod: Pod, event: pb.Event) -> None:
        """An event of the pod's guest: believed only about the pod's own containers."""
        if event.WhichOneof("body") != "exited":
            return
        exited = event.exited
        container = self._registry.containers.get(ContainerId(exited.container_id))
        if container is None or container.pod is not pod or exited.exec_id:
            return
        if container.record.state is ContainerState.CREATED:
            container.early_exit = exited
        elif container.running:
            self._apply_exit(container, exited)

    def _apply_exit(self, container: Container, exited: pb.Exited) -> None:
        """EXITED is shown once the last line is in the file: clients read the log right then."""
        self._host.tasks.spawn(self._finish(container, exited), f"exit of container {container.id[:12]}")

    async def _finish(self, container: Container, exited: pb.Exited) -> None:
        relay = container.relay
        if relay is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOG_END_TIMEOUT_S):
                    await relay.complete()
        if container.running:
            container.take_exit(exited.exit_code, exited.at_ns or time.time_ns(), exit_reason(exited))

    def vm_gone(self, pod: Pod, reason: str) -> None:
        """Every running container of a dead VM was killed with it."""
        for container in self._registry.containers_of(pod):
            if container.record.state in (ContainerState.RUNNING, ContainerState.UNKNOWN):
                container.take_exit(EXIT_CODE_KILLED, time.time_ns(), "Error", reason)
            self._close_log(container)

    # ------------------------------------------------------------------------------- adoption

    async def settle(self, container: Container) -> None:
        """Undo a creation that the daemon's end cut short."""
        if container.record.state is ContainerState.CREATING:
            await take_down(self._steps, container, ended=container.ended)
            self._forget(container)

    async def sync(self, pod: Pod, welcome: pb.Welcome) -> None:
        """Settle the containers of an adopted pod by what its guest says of them, and go on with
        their logs from the byte after the last one written."""
        told = {state.id: state for state in welcome.containers}
        for container in self._registry.containers_of(pod):
            state = told.get(container.id)
            if state is not None:
                await self._sync_one(container, state)
            elif container.running:
                now = time.time_ns()
                container.take_exit(
                    EXIT_CODE_UNKNOWN, now, "Unknown", "the guest has forgotten this container"
                )

    async def _sync_one(self, container: Container, state: pb.ContainerState) -> None:
        if container.record.state is ContainerState.CREATED:
            # killed between asking the guest and writing down its answer
            container.update(state=ContainerState.RUNNING, started_at_ns=time.time_ns())
        container.pid = state.pid
        self._mirror.watch(container)
        await self._resume_log(container)
        if state.state == pb.ContainerState.EXITED and container.running:
            self._apply_exit(container, state.exited)

    async def _open_log(self, container: Container) -> LogRelay:
        """Raises InvalidSpec for a path that the host's file system cannot have."""
        path = container.record.log_path
        if container.relay is None:
            try:
                container.relay = await LogRelay.open(
                    path, container.record.log, lambda position: container.update(log=position)
                )
            except OSError as error:
                if error.errno not in _PATH_ERRORS:
                    raise
                problem = f"{path[:_SHOWN_MAX]!r}: {error.strerror}"
                raise InvalidSpec("config.log_path", problem, "a file's name") from error
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

    def _close_log(self, container: Container) -> None:
        if container.relay is not None:
            container.relay.close()
            container.relay = None

    async def sweep(self) -> None:
        """Remove writable layers and plans that belong to no container."""
        written = self._host.rootfs.keys()
        for key in written:
            if ContainerId(key.partition(".")[0]) not in self._registry.containers:
                log.warning("container %s has no record; its writable layer is removed", key)
                await self._host.rootfs.down(key, self._host.plans / "nowhere")
        for plan in self._host.plans.glob("*.plan"):
            if ContainerId(plan.stem) not in self._registry.containers:
                plan.unlink()

    # ------------------------------------------------------------------------------- stop

    async def stop(self, id: str, timeout_s: float) -> None:
        """Ask with the stop signal, kill after `timeout_s`. Unknown ids and ended ones are fine."""
        try:
            container = self._registry.container(id)
        except NotFound:
            return
        if container.record.state is ContainerState.UNKNOWN:
            container.take_exit(EXIT_CODE_UNKNOWN, time.time_ns(), "Unknown")
        if not container.running:
            return
        if timeout_s > 0:
            await self._signal(container, signal_number(container.record.stop_signal), all=False)
            if await self._ended_within(container, timeout_s):
                return
        await self._kill(container)

    async def _kill(self, container: Container) -> None:
        await self._signal(container, signal_number("SIGKILL"), all=True)
        if not await self._ended_within(container, KILL_TIMEOUT_S):
            raise GuestUnreachable(
                f"container {container.id} did not end within {KILL_TIMEOUT_S:g} s of SIGKILL"
            )

    async def _signal(self, container: Container, number: int, *, all: bool) -> None:
        try:
            signal = pb.Signal(container_id=container.id, signal=number, all=all)
            await container.pod.call(pb.Request(signal=signal))
        except GuestError:
            if container.running:  # else it ended by itself meanwhile
                raise
        except GuestUnreachable:
            if container.pod.record.ready:  # else the VM is gone, and the container with it
                raise

    async def _ended_within(self, container: Container, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await container.exited.wait()
        except TimeoutError:
            return False
        return True

    # ------------------------------------------------------------------------------- remove

    async def remove(self, id: str) -> None:
        """Kill if running, release everything, forget. Unknown ids are fine."""
        try:
            container = self._registry.container(id)
        except NotFound:
            return
        async with container.lock:
            if container.id not in self._registry.containers:
                return
            if container.running and container.pod.record.ready:
                await self._kill(container)
            await self.release(container)

    async def release(self, container: Container) -> None:
        """Everything that a container holds, in the guest and on the host. Raises UndoFailed."""
        pod = container.pod
        if pod.record.ready and container.record.started_at_ns:
            await pod.call(pb.Request(remove=pb.Remove(container_id=container.id)))
        self._close_log(container)
        await self._mirror.release(container)
        await take_down(self._steps, container, ended=container.ended)
        self._forget(container)

    def _forget(self, container: Container) -> None:
        container.forget()
        self._registry.containers.pop(container.id, None)
        self._host.events.container_deleted(container)

    # ------------------------------------------------------------------------------- the rest

    async def exec_sync(self, id: str, cmd: Sequence[str], timeout_s: float | None) -> ExecResult:
        """Run `cmd` to its end. Raises NotFound, WrongState, GuestError (cannot be run),
        DeadlineExceeded (every process of it is dead by then)."""
        container = self._registry.container(id)
        container.require(ContainerState.RUNNING)
        if not cmd:
            raise InvalidSpec("cmd", "is empty", "a program and its arguments")
        client = await container.pod.guest()
        process = compile_exec(container.plan, cmd, tty=False)
        began = time.monotonic()
        result = await client.exec_sync(container.id, process, timeout_s, EXEC_OUTPUT_LIMIT)
        container.pod.note_first("first-exec", began)
        # whoever called it to mount something looks at the host next
        await self._mirror.look(container)
        return result

    async def exec(
        self, id: str, cmd: Sequence[str], *, tty: bool, stdin: bool, stdout: bool, stderr: bool
    ) -> ExecSession:
        """Run `cmd` beside what runs there, with live streams. Close the session in the end.
        Raises NotFound, WrongState, InvalidSpec, GuestError (cannot be run), GuestUnreachable."""
        container = self._registry.container(id)
        container.require(ContainerState.RUNNING)
        if not cmd:
            raise InvalidSpec("cmd", "is empty", "a program and its arguments")
        client = await container.pod.guest()
        process = compile_exec(container.plan, cmd, tty=tty)
        return await ExecSession.start(
            client, container.id, process, stdin=stdin, stdout=stdout or tty, stderr=stderr and not tty
        )

    async def attach(self, id: str, *, stdin: bool, stdout: bool, stderr: bool) -> AttachSession:
        """Hear and speak to a running container from now on. Close the session in the end.
        Raises NotFound, WrongState, GuestError, GuestUnreachable."""
        container = self._registry.container(id)
        container.require(ContainerState.RUNNING)
        client = await container.pod.guest()
        spec = container.record.spec
        return await AttachSession.start(
            client,
            container.id,
            stdin=stdin and spec.stdin,
            stdout=stdout,
            stderr=stderr and not spec.tty,
            stdin_once=spec.stdin_once,
        )

    async def reopen_log(self, id: str) -> None:
        container = self._registry.container(id)
        container.require(ContainerState.RUNNING)
        if container.relay is not None:
            await container.relay.reopen()

    async def update(self, id: str, resources: Resources) -> None:
        """Change limits in place; fields that are 0 or empty stay as they are. What the record then
        says is in force. Raises NotFound, WrongState, InvalidSpec, GuestError, VmmError."""
        container = self._registry.container(id)
        async with container.lock:
            merged = merge_resources(container.record.resources, resources)
            if container.running:
                await self._update_running(container, merged)
            elif container.record.state is not ContainerState.CREATED:
                raise WrongState("container", container.id, container.record.state, "created or running")
            plan = container.plan  # of an exec too, and of the start that is still to come
            plan.process.oom_score_adj = merged.oom_score_adj
            del plan.cgroup[:]
            plan.cgroup.extend(compile_resources(merged, vcpus=container.pod.vcpus))
            container.save_plan(plan)
            container.update(resources=merged)

    async def _update_running(self, container: Container, merged: Resources) -> None:
        pod, current = container.pod, container.record.resources
        compile_resources(merged, vcpus=pod.vcpus)  # what is wrong is found before anything changes
        await self._host.room.make(pod, pod.record.resources, pod.record.overhead, {container.id: merged})
        try:
            await pod.call(_limits(container, merged))
        except GuestError:
            # one file of several: those written before it go back
            with contextlib.suppress(SandboxError):
                await pod.call(_limits(container, current))
            raise

    def open_files_limit(self, id: ContainerId) -> int:
        """Soft limit of the first process; 0: the agent's own. Raises NotFound."""
        limits = self._registry.container(id).plan.process.rlimits
        return next((limit.soft for limit in limits if limit.resource == resource.RLIMIT_NOFILE), 0)


def _limits(container: Container, resources: Resources) -> pb.Request:
    files = compile_resources(resources, vcpus=container.pod.vcpus)
    score = pb.OomScore(adj=resources.oom_score_adj)
    return pb.Request(write_cgroup=pb.WriteCgroup(container_id=container.id, files=files, oom_score=score))


def exit_reason(exited: pb.Exited) -> str:
    """A child's OOM kill counts too, whatever the first process made of it."""
    if exited.oom_kills:
        return "OOMKilled"
    return "Completed" if exited.exit_code == 0 else "Error"


def _log_path(directory: str, name: str) -> str:
    """The container's log file on the host; empty: it keeps none."""
    if not directory or not name:
        return ""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise InvalidSpec("config.log_path", f"{name!r} leaves the log directory", "a path relative to it")
    return str(PurePosixPath(directory) / relative)
