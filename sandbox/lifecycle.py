"""Acquire and release the resources of a subject: in order to start it, in reverse to stop it.

A step is one held resource, its acquisition (`up`) and its release (`down`) side by side. Rollback of a
failed start, StopPodSandbox and recovery after a crash all run the same `down`s. The names of all steps
are saved before the first `up` runs and removed after the last `down`, so a daemon that is killed at any
instant knows at its next start what may be held. `down` copes with an `up` that was interrupted or never
ran, and is idempotent; hence one write in each direction is enough.

Pods, containers, templates of VMs and the accelerator's probe are subjects.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

from sandbox.errors import BeyondNode, InvalidSpec, MissingProgram, PhaseFailed, SandboxError


class Subject(Protocol):
    """Something that is brought up and taken down by steps."""

    def begin(self, names: Sequence[str]) -> None:
        """Save the names of steps, before the first of them takes effect. Repeated names are ignored."""

    def finish(self, name: str, begin_s: float, end_s: float) -> None:
        """Record that a step is up, and when it ran: moments of the monotonic clock, in seconds."""

    def ended(self, names: Collection[str]) -> None:
        """Remove the names of steps that hold nothing any more. Must not raise for a full disk: a stale
        name only leads to another `down`."""

    def console(self) -> str:
        """Return the last lines of the guest's console for an error message; empty: there is none."""


S = TypeVar("S", bound=Subject)
S_contra = TypeVar("S_contra", bound=Subject, contravariant=True)


class Step(Protocol[S_contra]):
    """One resource that a subject holds. `name` is saved in records: do not change it."""

    name: str

    async def up(self, subject: S_contra) -> None:
        """Acquire the resource. May be interrupted at any point by a failure or by the daemon's end."""

    async def down(self, subject: S_contra) -> None:
        """Release the resource, fully or partly acquired or not at all. Idempotent."""


class UndoFailed(SandboxError):
    """Some steps could not be released; their names stay saved, and the next attempt retries them."""

    def __init__(self, failures: Sequence[tuple[str, BaseException]]) -> None:
        super().__init__("; ".join(f"{name}: {error}" for name, error in failures))
        self.failures = tuple(failures)


# Mistakes of the caller and missing programs keep their type: a phase would add nothing to them.
UNWRAPPED = (InvalidSpec, BeyondNode, MissingProgram, PhaseFailed)


@dataclass(frozen=True, slots=True)
class Parallel(Generic[S]):
    """Branches of steps that do not depend on each other and run at the same time."""

    branches: Sequence[Steps[S]]


@dataclass(slots=True)
class Joined(Generic[S]):
    """Several resources as one step, under one name.

    For what is added after a release: an earlier one quarantines records with a name that it does not know,
    and so the way back to it is kept for subjects that do not use what was added.
    """

    name: str
    parts: Sequence[Step[S]]

    async def up(self, subject: S) -> None:
        """Acquire all, in order."""
        for part in self.parts:
            await part.up(subject)

    async def down(self, subject: S) -> None:
        """Release all, in reverse. Idempotent. What follows one that fails is left to the next attempt."""
        for part in reversed(self.parts):
            await part.down(subject)


Steps: TypeAlias = "Sequence[Step[S] | Parallel[S]]"


async def bring_up(steps: Steps[S], subject: S) -> None:
    """Run every `up` in order. After a failure, run `down` for each step that had begun, in reverse.

    Raises PhaseFailed naming the step, or UNWRAPPED errors as they are; what could not be released is
    added as a note to the error. A failure in one branch of a Parallel stops the others at their next
    step, and waits for those that are running.
    Cancellation releases nothing: it means that the daemon is ending, and its next start releases
    everything by the saved names.
    """
    begun: list[str] = []
    failed = asyncio.Event()

    async def run(steps: Steps[S]) -> None:
        for each in steps:
            if failed.is_set():
                return
            if isinstance(each, Parallel):
                await _gather(run(branch) for branch in each.branches)
                continue
            begin_s = time.monotonic()
            begun.append(each.name)
            try:
                await each.up(subject)
            except UNWRAPPED:
                failed.set()
                raise
            except Exception as error:
                failed.set()
                elapsed_s, reason = time.monotonic() - begin_s, str(error) or type(error).__name__
                raise PhaseFailed(each.name, elapsed_s, reason, subject.console()) from error
            subject.finish(each.name, begin_s, time.monotonic())

    names = step_names(steps)
    subject.begin(names)
    try:
        await run(steps)
    except Exception as failure:
        subject.ended([name for name in names if name not in begun])
        try:
            await take_down(held_steps(steps, begun), subject)
        except UndoFailed as undo:
            failure.add_note(f"not everything could be released: {undo}")
        raise


async def take_down(steps: Steps[S], subject: S) -> None:
    """Run every `down` in reverse order, also after one of them failed. Idempotent.

    Raises UndoFailed with all failures, once every step has been tried.
    """
    failures: list[tuple[str, BaseException]] = []
    released: list[str] = []

    async def run(steps: Steps[S]) -> None:
        for each in reversed(steps):
            if isinstance(each, Parallel):
                await _gather(run(branch) for branch in each.branches)
                continue
            try:
                await each.down(subject)
            except Exception as error:
                failures.append((each.name, error))
            else:
                released.append(each.name)

    try:
        await run(steps)
    finally:
        subject.ended(released)
    if failures:
        raise UndoFailed(failures)


def step_names(steps: Steps[S]) -> list[str]:
    """List the names of all steps, those of parallel branches included."""
    return [
        name
        for each in steps
        for name in (
            [name for branch in each.branches for name in step_names(branch)]
            if isinstance(each, Parallel)
            else [each.name]
        )
    ]


def held_steps(steps: Steps[S], names: Collection[str]) -> Steps[S]:
    """Keep the steps with these names, in their order and branches."""
    return [
        Parallel([held_steps(branch, names) for branch in each.branches])
        if isinstance(each, Parallel)
        else each
        for each in steps
        if isinstance(each, Parallel) or each.name in names
    ]


async def _gather(runs: Iterable[Coroutine[None, None, None]]) -> None:
    """Wait for all, then raise the first failure."""
    for result in await asyncio.gather(*runs, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
