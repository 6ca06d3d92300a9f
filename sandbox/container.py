"""One container in memory: its record, its compiled plan, and what its engine keeps open for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import msgspec

from image.rootfs import HostTree, Rootfs
from sandbox.errors import PlanUnreadable, WrongState
from sandbox.host import files
from sandbox.logs.relay import LogRelay
from sandbox.plan import MountSource
from sandbox.plan.values import ContainerPlan
from sandbox.pod import Pod
from sandbox.records import ContainerRecord, ContainerState, ContainerUser
from sandbox.spec import ContainerId
from sandbox.store import Recorded, Store


class Container(Recorded[ContainerRecord]):
    """A container and its pod. `exited` is set once the state is EXITED.

    `relay` copies its log, while it has one; `pid` is that of its first process as its engine
    counts, 0 before the start. Both belong to the engine, and a new daemon's engine sets them again.
    """

    def __init__(self, record: ContainerRecord, store: Store[ContainerRecord], pod: Pod) -> None:
        super().__init__(record, store)
        self.pod = pod
        self.plan_path = store.directory / f"{record.id}.plan"
        self.relay: LogRelay | None = None
        self.lock = asyncio.Lock()  # held by start, update and remove
        self.propagation_lock = asyncio.Lock()  # held while its mounts are repeated on the host
        self.live: Mapping[int, MountSource] = {}  # live files and sockets by index, while it is created
        self.propagating = False  # its mount table is being polled
        self.pid = 0
        self.exited = asyncio.Event()
        self.on_state: Callable[[Container], None] = lambda container: None  # its state has changed
        self.on_phase: Callable[[str, float], None] = lambda name, seconds: None  # for the metrics
        self._plan: ContainerPlan | None = None
        if record.state is ContainerState.EXITED:
            self.exited.set()

    @property
    def id(self) -> ContainerId:
        """64 hexadecimal digits."""
        return self.record.id

    @property
    def rootfs_mount(self) -> Path:
        """Where a root filesystem that is a tree of the host is mounted."""
        return self.pod.rootfs_share / self.id

    @property
    def rootfs(self) -> Rootfs:
        """Its root filesystem, as its store made it."""
        return self.record.rootfs or HostTree(path=str(self.rootfs_mount))

    def record_rootfs(self, rootfs: Rootfs) -> None:
        """Keep it with the next `update`: a creation that is cut short before that is undone by its id."""
        self.record = msgspec.structs.replace(self.record, rootfs=rootfs)

    def record_user(self, user: ContainerUser) -> None:
        """Keep whom it runs as with the next `update`, which is that of its state."""
        self.record = msgspec.structs.replace(self.record, user=user)

    @property
    def volumes(self) -> Path:
        """The directory of its volumes' mount points in the pod's share."""
        return self.pod.volumes_share / self.id

    @property
    def running(self) -> bool:
        """Whether the record says RUNNING."""
        return self.record.state is ContainerState.RUNNING

    def ended(self, steps: Collection[str]) -> None:
        """Remove the names of steps, as `Recorded.ended` does, but without a write when none is left.

        The record of a container that holds nothing is deleted next. After a crash before that, releasing it
        again does no harm.
        """
        if set(self.record.steps) <= set(steps):
            self.record = msgspec.structs.replace(self.record, steps=())
        else:
            super().ended(steps)

    def update(self, **changes: object) -> None:
        """Write changes to the record, and report a change of state. Raises OSError."""
        before = self.record.state
        super().update(**changes)
        if self.record.state is not before:
            self.on_state(self)

    def update_anyway(self, **changes: object) -> None:
        """Write changes to the record, or keep them in memory; report a change of state."""
        before = self.record.state
        super().update_anyway(**changes)
        if self.record.state is not before:
            self.on_state(self)

    def finish(self, name: str, begin_s: float, end_s: float) -> None:
        """Record the phase of one of its steps."""
        self.record_phase(f"container-{name}", begin_s, end_s)

    def record_phase(self, name: str, begin_s: float, end_s: float) -> None:
        """Count a phase in the metrics and, as the first of its name, among the pod's boot phases.

        The arguments are moments of the monotonic clock, in seconds.
        """
        self.on_phase(name, end_s - begin_s)
        self.pod.record_first(name, begin_s, end_s)

    def console(self) -> str:
        """Return the last lines of its pod's guest console; empty: there is none."""
        return self.pod.console()

    def require(self, state: ContainerState) -> None:
        """Raise WrongState if the container is in another state."""
        if self.record.state is not state:
            raise WrongState("container", self.id, self.record.state, state)

    @property
    def plan(self) -> ContainerPlan:
        """The container as it is to be made, compiled at CreateContainer. Raises PlanUnreadable."""
        if self._plan is None:
            try:
                content = self.plan_path.read_bytes()
                files.check(self.plan_path, content)
                self._plan = msgspec.json.decode(content, type=ContainerPlan)
            except (OSError, files.Damaged, msgspec.DecodeError, UnicodeDecodeError) as error:
                raise PlanUnreadable(str(self.plan_path), str(error)) from error
        return self._plan

    def save_plan(self, plan: ContainerPlan) -> None:
        """Write the plan to its file. Raises OSError; then the previous plan stays."""
        files.write_json(self.plan_path, plan, checksum=True)
        self._plan = plan

    def drop_plan(self) -> None:
        """Delete the plan's file. Idempotent."""
        for path in (self.plan_path, files.temporary_of(self.plan_path)):
            path.unlink(missing_ok=True)

    def record_exit(self, exit_code: int, at_ns: int, reason: str, message: str = "") -> None:
        """Make the container EXITED, at `at_ns` of the host's wall clock, also where a full disk
        takes no record of it."""
        self.update_anyway(
            state=ContainerState.EXITED,
            exit_code=exit_code,
            finished_at_ns=at_ns,
            reason=reason,
            message=message,
        )
        self.exited.set()
