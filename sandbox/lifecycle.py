"""The walk over steps: up in order, down in reverse; the same for rollback, Stop and recovery.

A step is one held resource with its acquisition and its release side by side. The names of a walk's
steps are saved before the first `up` runs, and forgotten behind the last `down`, so a daemon that is
killed anywhere knows at its next start what may be held. `down` copes with an `up` that was cut short
or never began, and may be repeated; so each walk takes one write each way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

from sandbox.errors import InvalidSpec, MissingProgram, PhaseFailed, SandboxError

Subject = TypeVar("Subject", contravariant=True)


class Step(Protocol[Subject]):
    name: str

    async def up(self, subject: Subject) -> None: ...

    async def down(self, subject: Subject) -> None: ...


class UndoFailed(SandboxError):
    """Some steps could not be released; they stay in the record and are tried again."""

    def __init__(self, failures: Sequence[tuple[str, BaseException]]) -> None:
        super().__init__("; ".join(f"{name}: {error}" for name, error in failures))
        self.failures = tuple(failures)


# The caller's own mistakes and missing parts keep their type: the phase adds nothing to them.
PLAIN = (InvalidSpec, MissingProgram, PhaseFailed)


@dataclass(frozen=True, slots=True)
class Parallel(Generic[Subject]):
    """Walks that do not depend on each other, gone at the same time."""

    branches: Sequence[Steps[Subject]]


Steps: TypeAlias = "Sequence[Step[Subject] | Parallel[Subject]]"


async def bring_up(
    walk: Steps[Subject],
    subject: Subject,
    *,
    begin: Callable[[Sequence[str]], None],
    finish: Callable[[str, float, float], None],
    ended: Callable[[Collection[str]], None],
    console: Callable[[], str] = lambda: "",
) -> None:
    """Run every `up`; on failure release all that was begun and raise PhaseFailed.

    `begin` saves the names of all steps before the first effect, `finish` gets a name and its two moments
    on the monotonic clock, `ended` removes names of what is not held. A failure beside other steps lets
    those that have begun come to their end first. A cancelled walk releases nothing: it means that
    the daemon is going away, and the next start does it from the saved names.
    """
    begun: list[str] = []
    failed = asyncio.Event()

    async def go(walk: Steps[Subject]) -> None:
        for each in walk:
            if failed.is_set():
                return
            if isinstance(each, Parallel):
                await _all(go(branch) for branch in each.branches)
                continue
            started = time.monotonic()
            begun.append(each.name)
            try:
                await each.up(subject)
            except PLAIN:
                failed.set()
                raise
            except Exception as error:
                failed.set()
                elapsed, reason = time.monotonic() - started, str(error) or type(error).__name__
                raise PhaseFailed(each.name, elapsed, reason, console()) from error
            finish(each.name, started, time.monotonic())

    names = names_of(walk)
    begin(names)
    try:
        await go(walk)
    except Exception as failure:
        ended([name for name in names if name not in begun])
        try:
            await take_down(only(walk, begun), subject, ended=ended)
        except UndoFailed as undo:
            failure.add_note(f"and was not wholly undone: {undo}")
        raise


async def take_down(
    walk: Steps[Subject], subject: Subject, *, ended: Callable[[Collection[str]], None]
) -> None:
    """Run every `down` in reverse order, whatever the others do. Raises UndoFailed at the end."""
    failures: list[tuple[str, BaseException]] = []
    released: list[str] = []

    async def go(walk: Steps[Subject]) -> None:
        for each in reversed(walk):
            if isinstance(each, Parallel):
                await _all(go(branch) for branch in each.branches)
                continue
            try:
                await each.down(subject)
            except Exception as error:
                failures.append((each.name, error))
            else:
                released.append(each.name)

    try:
        await go(walk)
    finally:
        ended(released)
    if failures:
        raise UndoFailed(failures)


def names_of(walk: Steps[Subject]) -> list[str]:
    return [
        name
        for each in walk
        for name in (
            [name for branch in each.branches for name in names_of(branch)]
            if isinstance(each, Parallel)
            else [each.name]
        )
    ]


def only(walk: Steps[Subject], names: Collection[str]) -> Steps[Subject]:
    """The steps with these names, in their places."""
    return [
        Parallel([only(branch, names) for branch in each.branches]) if isinstance(each, Parallel) else each
        for each in walk
        if isinstance(each, Parallel) or each.name in names
    ]


async def _all(walks: Iterable[Coroutine[None, None, None]]) -> None:
    """To the end of each; raises the first failure then."""
    for result in await asyncio.gather(*walks, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
