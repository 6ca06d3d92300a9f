"""The walk over steps: up in order, down in reverse; the same for rollback, Stop and recovery.

A step is one held resource with its acquisition and its release side by side. The name of a step is
saved before its `up` runs, so a daemon that is killed anywhere knows at its next start what may be
held. `down` copes with an `up` that was cut short or never began, and may be repeated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

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


async def bring_up(
    steps: Sequence[Step[Subject]],
    subject: Subject,
    *,
    begin: Callable[[str], None],
    finish: Callable[[str, float, float], None],
    ended: Callable[[str], None],
    console: Callable[[], str] = lambda: "",
) -> None:
    """Run every `up`; on failure release all that was begun and raise PhaseFailed.

    `begin` saves a step's name before the effect, `finish` gets the name and its two moments on
    the monotonic clock, `ended` removes a released step's name. A cancelled walk releases nothing:
    it means that the daemon is going away, and the next start does it from the saved names.
    """
    begun: list[Step[Subject]] = []
    for step in steps:
        started = time.monotonic()
        begun.append(step)
        try:
            begin(step.name)
            await step.up(subject)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            elapsed = time.monotonic() - started
            tail = console()
            failure: Exception = error
            if not isinstance(error, PLAIN):
                failure = PhaseFailed(step.name, elapsed, str(error) or type(error).__name__, tail)
                failure.__cause__ = error
            try:
                await take_down(begun, subject, ended=ended)
            except UndoFailed as undo:
                failure.add_note(f"and was not wholly undone: {undo}")
            raise failure from error
        finish(step.name, started, time.monotonic())


async def take_down(
    steps: Sequence[Step[Subject]], subject: Subject, *, ended: Callable[[str], None]
) -> None:
    """Run every `down` in reverse order, whatever the others do. Raises UndoFailed at the end."""
    failures: list[tuple[str, BaseException]] = []
    for step in reversed(steps):
        try:
            await step.down(subject)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            failures.append((step.name, error))
        else:
            ended(step.name)
    if failures:
        raise UndoFailed(failures)
