"""The verbs of containers: create, start, stop, remove, exec, attach, logs, resources.

CreateContainer does all of the host's work (root filesystem, volumes, the compiled plan), so that
StartContainer is quick. Where a container runs is up to the engine of its pod. Each state is set in one
place: CREATED by `create`, RUNNING by `start`, EXITED by `exits`; an engine that recovers a container may
set any of these, by what has happened to it meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from image.index import Image
from image.stores import RootfsStore
from sandbox.apparmor import profile_name
from sandbox.container import Container
from sandbox.engine import Engines
from sandbox.errors import (
    GuestError,
    GuestUnreachable,
    InvalidSpec,
    NotFound,
    PlanUnreadable,
    WrongState,
)
from sandbox.exits import Exits
from sandbox.inventory import Inventory
from sandbox.lifecycle import UndoFailed, bring_up, held_steps, take_down
from sandbox.plan import compile_exec, limited
from sandbox.plan.oci import runtime_spec
from sandbox.plan.resources import merge_resources
from sandbox.plan.signals import resolve_stop_signal, signal_number
from sandbox.pod import Pod
from sandbox.records import ContainerRecord, ContainerState, ImageVolume
from sandbox.session import OUTPUT_MAX, ExecResult, Session, within_limit
from sandbox.spec import ContainerId, ContainerSpec, ExitCode, ImageDefaults, Isolation, Resources
from sandbox.steps.cdi_files import with_devices

log = logging.getLogger(__name__)

KILL_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class ContainerDeps:
    """What `Containers` is made of, beside other parts of this package."""

    find_image: Callable[[str], Image]  # by any of its names; raises ImageNotFound
    rootfs: RootfsStore
    cdi_dirs: Sequence[Path] = ()  # of CDI specifications, later ones win
    on_phase: Callable[[str, float], None] = lambda name, seconds: None  # for the metrics


class Containers:
    """The containers of this node, as the CRI's RuntimeService sees them. Belongs to one event loop.

    Methods take a full id or an unambiguous prefix, and return records: immutable snapshots. As with pods,
    a call that is cancelled in the middle of a creation is undone by the next daemon, so callers run each
    call in its own task (see `host.flights`).
    """

    def __init__(self, inventory: Inventory, engines: Engines, exits: Exits, deps: ContainerDeps) -> None:
        self._inventory = inventory
        self._engines = engines
        self._exits = exits
        self._deps = deps
        inventory.on_phase = deps.on_phase

    # ------------------------------------------------------------------------------- finding

    def find(self, id: str) -> ContainerRecord:
        """Return the record of a container. Raises NotFound, and InvalidSpec for an ambiguous prefix."""
        return self._inventory.container(id).record

    def list(self) -> Sequence[ContainerRecord]:
        """Return the records of all containers but for those that are being created: no client has their
        ids yet."""
        containers = self._inventory.containers.values()
        return [each.record for each in containers if each.record.state is not ContainerState.CREATING]

    async def describe(self, record: ContainerRecord) -> Mapping[str, object]:
        """Return facts for a person that the CRI's status has no fields for: JSON values by name.

        `pid` is a process of this host: in a VM the VMM, where `guestPid` is the container's first process
        in the guest's PID namespace. Raises NotFound.
        """
        container = self._inventory.container(record.id)
        return {
            "sandboxID": container.pod.id,
            **self._engines.of(container.pod).control.pids(container),
            "privileged": record.spec.security.privileged,
            "rootfs": container.rootfs.path,
            "plan": str(container.plan_path),
            "user": record.user,
            "apparmor": profile_name(record.spec.security.apparmor),
            "log": record.log,
            "imageID": record.image_id,
            "chainIDs": record.chain_ids,
            "runtimeSpec": _runtime_spec(container),
        }

    # ------------------------------------------------------------------------------- create

    async def create(self, pod_id: str, spec: ContainerSpec) -> ContainerId:
        """Prepare everything that the container needs of the host, and return its id once it is CREATED.

        Raises NotFound, WrongState if the pod is not READY, Reserved if the name is in use, InvalidSpec,
        ImageNotFound, PhaseFailed naming the step that failed, OSError if a record cannot be written. Then
        everything is released; what could not be is named in a note to the error.
        """
        if spec.cdi_devices:
            in_vm = self._inventory.pod(pod_id).record.isolation is Isolation.VM
            spec = await asyncio.to_thread(with_devices, spec, self._deps.cdi_dirs, in_vm=in_vm)
        pod = self._inventory.pod(pod_id)
        pod.require_ready()
        image = self._deps.find_image(spec.image)
        if (made := self._created_unanswered(pod, spec)) is not None:
            return made.id
        self._inventory.check_container_name(pod, spec)
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
        container = self._inventory.make_container(record, pod)
        self._inventory.add_container(container)  # its record is written with the names of its steps
        try:
            await bring_up(self._engines.of(pod).containers.container_steps, container)
            container.update(state=ContainerState.CREATED)
        except Exception as failure:
            await self._abandon(container, failure)
            raise
        return container.id

    def _created_unanswered(self, pod: Pod, spec: ContainerSpec) -> Container | None:
        """Find the container that this call is a retry for: it was cut short by the daemon's end, with the
        container made and no answer given."""
        for each in self._inventory.containers_of(pod):
            same = each.record.spec == spec and each.record.state is ContainerState.CREATED
            if same and each.may_be_unanswered(each.record.created_at_ns):
                return each
        return None

    async def _abandon(self, container: Container, failure: Exception) -> None:
        """Release what the container still holds, and its name."""
        held = held_steps(self._engines.of(container.pod).containers.container_steps, container.record.steps)
        try:
            await take_down(held, container)
        except UndoFailed as undo:
            failure.add_note(f"not everything could be released: {undo}")
        else:
            self._inventory.forget_container(container)

    def _image_volumes(self, spec: ContainerSpec) -> Iterator[ImageVolume]:
        """Find the images that are mounted, which a kubelet has pulled by now. Raises ImageNotFound."""
        for number, mount in enumerate(spec.mounts):
            if mount.image:
                image = self._deps.find_image(mount.image)
                yield ImageVolume(mount=number, image_id=image.id, chain_ids=tuple(image.chain_ids))

    # ------------------------------------------------------------------------------- start

    async def start(self, id: str) -> None:
        """Run the first process; returns once its program was executed, with the container RUNNING.

        A retry of a call that the daemon's end cut short succeeds if that one had started the container.

        Raises NotFound, WrongState if the container is not CREATED or its pod not READY, and GuestError if
        the program cannot be run: then the container is EXITED with code 128 and reason StartError. Other
        errors (InvalidSpec for the log's path, GuestUnreachable, DeadlineExceeded) leave it CREATED.
        """
        container = self._inventory.container(id)
        async with container.lock:
            if _started_unanswered(container):
                return
            container.require(ContainerState.CREATED)
            container.pod.require_ready()
            began = time.monotonic()
            engine = self._engines.of(container.pod)
            try:
                await engine.containers.start(container)
            except GuestError as error:
                self._start_failed(container, error)
                raise
            container.update(state=ContainerState.RUNNING, started_at_ns=time.time_ns())
            container.recovered_ns = 0  # a second start is not a retry of one that an earlier daemon made
            container.record_phase("container-start", began, time.monotonic())
            engine.containers.watch_exit(container)

    def _start_failed(self, container: Container, error: GuestError) -> None:
        now = time.time_ns()
        container.update(started_at_ns=now)
        container.record_exit(ExitCode.START_ERROR, now, "StartError", str(error))
        self._engines.of(container.pod).containers.detach(container)

    def lost(self, pod: Pod, reason: str) -> None:
        """Make every container EXITED that ran in the pod, which runs no more. Idempotent."""
        self._exits.lost(pod, reason)
        for container in self._inventory.containers_of(pod):
            self._engines.of(pod).containers.detach(container)

    # ------------------------------------------------------------------------------- recovery

    async def settle(self, container: Container) -> None:
        """Undo a creation that the daemon's end interrupted. Raises UndoFailed."""
        container.recovered_ns = time.time_ns()
        if container.record.state is ContainerState.CREATING:
            await take_down(self._engines.of(container.pod).containers.container_steps, container)
            self._inventory.forget_container(container)

    async def sweep(self) -> None:
        """Delete writable layers and plans that belong to no container, quarantined ones included: what is
        left of a removal that the daemon's end cut short. Raises OSError."""
        for key in self._deps.rootfs.keys():  # noqa: SIM118 -- a store, not a mapping
            if ContainerId(key.partition(".")[0]) not in self._inventory.containers:
                log.warning("container %s does not exist any more; deleting its writable layer", key)
                await self._deps.rootfs.down(key, self._unmounted)
        for plan in self._inventory.container_store.directory.glob("*.plan*"):
            if ContainerId(plan.name.partition(".")[0]) not in self._inventory.containers:
                plan.unlink()

    # ------------------------------------------------------------------------------- stop

    async def stop(self, id: str, timeout_s: float) -> None:
        """Send the stop signal, wait up to `timeout_s` seconds for the exit, then kill every process; with 0,
        kill at once. Returns once the container is EXITED. Idempotent; an unknown id is fine.

        A container whose state was lost (UNKNOWN) becomes EXITED with code 255. Raises GuestUnreachable,
        DeadlineExceeded, WrongState if its pod is quarantined.
        """
        try:
            container = self._inventory.container(id)
        except NotFound:
            return
        if container.record.state is ContainerState.UNKNOWN:
            _require_reachable(container)
            if container.quarantined and container.pod.record.ready:  # it may run, for all that is known
                await self._signal(container, signal_number("SIGKILL"), all=True)
            container.record_exit(ExitCode.UNKNOWN, time.time_ns(), "Unknown")
        if not container.running:
            return
        _require_known(container.pod)
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
            await self._engines.of(container.pod).containers.signal(container, number, all=all)
        except GuestError as error:
            # without such a process it has ended: that is reported once its last line is in the log
            if container.running and error.errno != errno.ESRCH:
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
        """Kill the container if it runs, release everything that it holds, and delete its record.
        Idempotent; an unknown id is fine. Raises UndoFailed, SandboxError; then another call retries."""
        try:
            container = self._inventory.container(id)
        except NotFound:
            return
        async with container.lock:
            if container.id not in self._inventory.containers:
                return
            if container.running:
                _require_known(container.pod)
                await self._kill(container)
            _require_reachable(container)
            await self.release(container)

    async def release(self, container: Container) -> None:
        """Release everything that a container holds, where it ran and on the host, and forget it. Idempotent.
        Raises UndoFailed, SandboxError."""
        kinds = self._engines if container.pod.quarantined else (container.pod.record.isolation,)
        for kind in kinds:
            runtime = self._engines.for_isolation(kind).containers
            await runtime.remove(container)
            await take_down(runtime.container_steps, container)
        if container.quarantined:  # nor is it known which images it mounts
            for key in self._deps.rootfs.keys():  # noqa: SIM118 -- a store, not a mapping
                if key.partition(".")[0] == container.id:
                    await self._deps.rootfs.down(key, self._unmounted)
        self._inventory.forget_container(container)

    @property
    def _unmounted(self) -> Path:
        """A mount point for what is not mounted any more: it does not exist."""
        return self._inventory.container_store.directory / "unmounted"

    # ------------------------------------------------------------------------------- the rest

    def _running(self, id: str) -> Container:
        """Raises NotFound, WrongState."""
        container = self._inventory.container(id)
        container.require(ContainerState.RUNNING)
        _require_known(container.pod)
        container.pod.require_ready()
        return container

    async def exec_sync(self, id: str, cmd: Sequence[str], timeout_s: float | None) -> ExecResult:
        """Run `cmd` to its end and return its output, as `session.within_limit` cuts it.

        Raises NotFound, WrongState if the container is not RUNNING, InvalidSpec for an empty `cmd`,
        GuestError if it cannot be run, GuestUnreachable, and DeadlineExceeded after `timeout_s` (None: no
        timeout), once everything that it started is dead.
        """
        container = self._running(id)
        if not cmd:
            raise InvalidSpec("cmd", "is empty", "a program and its arguments")
        process = compile_exec(container.plan, cmd, tty=False)
        began = time.monotonic()
        result = await self._engines.of(container.pod).sessions.exec_sync(
            container, process, timeout_s, OUTPUT_MAX + 1
        )
        container.pod.record_first("first-exec", began, time.monotonic())
        kept = within_limit(result)
        if kept is not result:
            log.warning("container %s: the output of an exec was cut to 16 MiB", id)
        return kept

    async def exec(
        self, id: str, cmd: Sequence[str], *, tty: bool, stdin: bool, stdout: bool, stderr: bool
    ) -> Session:
        """Run `cmd` with live streams. The caller closes the session. With a terminal there is no stderr.

        Raises NotFound, WrongState if the container is not RUNNING, InvalidSpec for an empty `cmd`,
        GuestError if it cannot be run, GuestUnreachable.
        """
        container = self._running(id)
        if not cmd:
            raise InvalidSpec("cmd", "is empty", "a program and its arguments")
        process = compile_exec(container.plan, cmd, tty=tty)
        return await self._engines.of(container.pod).sessions.exec(
            container, process, stdin=stdin, stdout=stdout or tty, stderr=stderr and not tty
        )

    async def attach(self, id: str, *, stdin: bool, stdout: bool, stderr: bool) -> Session:
        """Connect to the streams of a running container from now on. The caller closes the session.

        stdin is given only if the container was created with it, stderr only if it has no terminal. Raises
        NotFound, WrongState if the container is not RUNNING, GuestError, GuestUnreachable.
        """
        container = self._running(id)
        spec = container.record.spec
        return await self._engines.of(container.pod).sessions.attach(
            container, stdin=stdin and spec.stdin, stdout=stdout, stderr=stderr and not spec.tty
        )

    async def reopen_log(self, id: str) -> None:
        """Go on in a new log file, after the kubelet renamed the old one. Raises NotFound, WrongState if the
        container is not RUNNING, OSError."""
        container = self._running(id)
        await self._engines.of(container.pod).sessions.reopen_log(container)

    async def update(self, id: str, resources: Resources) -> None:
        """Change limits in place; fields that are 0 or empty stay as they are. On return the limits of the
        record are in force; on failure the previous ones are.

        Raises NotFound, WrongState if the container is neither CREATED nor RUNNING, InvalidSpec, BeyondNode,
        GuestError, VmmError.
        """
        container = self._inventory.container(id)
        async with container.lock:
            merged = merge_resources(container.record.resources, resources)
            if not container.running and container.record.state is not ContainerState.CREATED:
                raise WrongState("container", container.id, container.record.state, "created or running")
            _require_known(container.pod)
            await self._engines.of(container.pod).control.limit(container, merged)
            container.save_plan(limited(container.plan, merged, vcpus=container.pod.vcpus))
            container.update(resources=merged)

    def open_files_limit(self, id: ContainerId) -> int:
        """Return the soft limit of open files of the first process; 0 if it is not known, which includes the
        engine's default. Raises NotFound."""
        try:
            limits = self._inventory.container(id).plan.process.rlimits
        except PlanUnreadable:
            return 0
        return next((limit.soft for limit in limits if limit.resource == resource.RLIMIT_NOFILE), 0)


def _started_unanswered(container: Container) -> bool:
    record = container.record
    ran = record.state in (ContainerState.RUNNING, ContainerState.EXITED) and record.reason != "StartError"
    return ran and container.may_be_unanswered(record.started_at_ns)


def _require_known(pod: Pod) -> None:
    """Raise WrongState for a quarantined pod: nothing is known of where its containers run."""
    if pod.quarantined:
        raise WrongState("sandbox", pod.id, "quarantined", "ready")


def _runtime_spec(container: Container) -> Mapping[str, object] | None:
    try:
        return runtime_spec(container.plan)
    except PlanUnreadable:
        return None


def _require_reachable(container: Container) -> None:
    """Raise WrongState for a container that may still run in a quarantined pod: it can be ended only with the
    pod, and its files must not be removed before that."""
    unknown = container.record.state is ContainerState.UNKNOWN
    if unknown and container.pod.quarantined and container.pod.run_dir.exists():
        raise WrongState("sandbox", container.pod.id, "quarantined and may still run", "stopped")


def _log_path(directory: str, name: str) -> str:
    """Return the path of the container's log file on the host; empty: it keeps none. Raises InvalidSpec."""
    if not directory or not name:
        return ""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise InvalidSpec("config.log_path", f"{name!r} leaves the log directory", "a path relative to it")
    return str(PurePosixPath(directory) / relative)
