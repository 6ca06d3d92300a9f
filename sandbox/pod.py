"""One pod in memory: its record, and its engine's connections to what it runs in.

The record is what survives; connections are made again by the next daemon.
Nothing here decides when a pod starts or stops: see `pods`, and the steps of its engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from sandbox.errors import WrongState
from sandbox.host.limiter import Limiter
from sandbox.records import Phase, PodRecord, PodState, VmRuntime
from sandbox.spec import Handler, Isolation, PodId
from sandbox.store import Recorded, Store


class PodLink(Protocol):
    """The daemon's connections to what a pod runs in, as far as every pod has them. Set by its engine."""

    def console(self) -> str:
        """Return the last lines of the guest's console."""

    async def close(self) -> None:
        """Close the connections; what the pod runs in runs on. Idempotent."""


class Pod(Recorded[PodRecord]):
    """A pod sandbox: its record, run directory and connections.

    `handler` and `tap` are set while it starts only. `link` is the engine's, None until it connects.
    """

    def __init__(self, record: PodRecord, store: Store[PodRecord], run_dir: Path) -> None:
        super().__init__(record, store)
        self.run_dir = run_dir
        self.handler: Handler | None = None
        self.tap: int | None = None  # descriptor, of its first interface
        self.began = time.monotonic()  # moment 0 of its phases, by the monotonic clock
        self.link: PodLink | None = None
        self.lock = asyncio.Lock()  # held by start, stop and remove
        self.exports_lock = asyncio.Lock()  # held while volumes are exported or released
        self.disks_lock = asyncio.Lock()  # held while disks are plugged or unplugged
        self.on_state: Callable[[Pod], None] = lambda pod: None  # its state has changed
        self.watch: asyncio.Task[None] | None = None

    @property
    def id(self) -> PodId:
        """64 hexadecimal digits."""
        return self.record.id

    @property
    def vcpus(self) -> int:
        """CPUs of its VM; 0 for a pod without one."""
        runtime = self.record.runtime
        return runtime.size.vcpus if isinstance(runtime, VmRuntime) and runtime.size else 0

    @property
    def rootfs_share(self) -> Path:
        """Where root filesystems are mounted, as virtiofsd exports them: read-only itself."""
        return self.run_dir / "share" / "rootfs"

    @property
    def volumes_share(self) -> Path:
        """Where volumes are mounted, as virtiofsd exports them: read-only itself."""
        return self.run_dir / "share" / "volumes"

    @property
    def uncached_share(self) -> Path:
        """The same directory as `volumes_share`, for another virtiofsd."""
        return self.run_dir / "share" / "uncached"

    def back_of(self, share: Path) -> Path:
        """Return the writable directory behind a share, in which mount points are made."""
        return self.run_dir / "back" / share.name

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
        self.record_phase(name, begin_s, end_s)

    def record_phase(self, name: str, begin_s: float, end_s: float) -> None:
        """Record a phase between two moments of the monotonic clock, in seconds.

        Saved by the next `update`: boot phases are not worth a write each.
        """
        self.record_phases(Phase(name=name, begin_s=begin_s - self.began, end_s=end_s - self.began))

    def record_phases(self, *phases: Phase) -> None:
        """Record phases that are relative to `began`; saved by the next `update`."""
        self.record = msgspec.structs.replace(self.record, phases=(*self.record.phases, *phases))

    def update_runtime(self, **changes: object) -> None:
        """Write changes of what the pod runs in to its record. Raises OSError."""
        self.update(runtime=msgspec.structs.replace(self.record.runtime, **changes))

    def record_runtime(self, **changes: object) -> None:
        """Change what the pod runs in; saved by the next `update`."""
        runtime = msgspec.structs.replace(self.record.runtime, **changes)
        self.record = msgspec.structs.replace(self.record, runtime=runtime)

    def record_first(self, name: str, begin_s: float, end_s: float) -> None:
        """Record a phase unless the pod has one of this name: the first container, the first exec."""
        if self.record.isolation is Isolation.VM and not any(
            phase.name == name for phase in self.record.phases
        ):
            self.record_phase(name, begin_s, end_s)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the body as a phase of the start, unless it fails."""
        begin = time.monotonic()
        yield
        self.record_phase(name, begin, time.monotonic())

    @contextlib.asynccontextmanager
    async def queued(self, stage: Limiter) -> AsyncIterator[None]:
        """Run the body in a slot of the limiter, and record the wait for it. No client waits for a pod of the
        pool, so these let all others go first."""
        begin = time.monotonic()
        async with stage.slot(idle=self.record.state is PodState.WAITING):
            self.record_phase(f"queue-{stage.name}", begin, time.monotonic())
            yield

    def require_handler(self) -> Handler:
        """Return the handler of a pod that is being started."""
        assert self.handler is not None, "only a pod that is being started has a handler"
        return self.handler

    def require_tap(self) -> int:
        """Return the descriptor of the tap, which the step `netns` opened."""
        assert self.tap is not None, "opened by the step netns"
        return self.tap

    def close_tap(self) -> None:
        """Close the tap, once the VMM has inherited it. Idempotent."""
        if self.tap is not None:
            os.close(self.tap)
            self.tap = None

    def require_ready(self) -> None:
        """Raise WrongState if the pod is not READY."""
        if self.record.state is not PodState.READY:
            raise WrongState("sandbox", self.id, self.record.state, "ready")

    def console(self) -> str:
        """Return the last lines of the guest's console; empty without a VM."""
        return self.link.console() if self.link is not None else ""

    async def disconnect(self) -> None:
        """Close the connections to what the pod runs in, which runs on. Idempotent."""
        if self.link is not None:
            await self.link.close()
