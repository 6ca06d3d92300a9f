"""Wait for a condition by polling it: `eventually` in coroutines, `eventually_sync` elsewhere.

For what cannot be awaited, such as a file that another process writes or a counter in a guest. Prefer an
event, a future or `Process.wait` where there is one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")
Describe = str | Callable[[], object]
ExceptionTypes = tuple[type[Exception], ...]

DEFAULT_TIMEOUT_S = 10.0
FIRST_PAUSE_S = 0.001
LONGEST_PAUSE_S = 0.05
SHORTEST_POLL_S = 1.0  # what a coroutine gets even where the timeout has nearly or just passed


@overload
async def eventually(
    probe: Callable[[], Awaitable[T]],
    *,
    until: Callable[[T], object],
    timeout_s: float = ...,
    describe: Describe = ...,
    retry_on: ExceptionTypes = ...,
) -> T: ...
@overload
async def eventually(
    probe: Callable[[], T],
    *,
    until: Callable[[T], object],
    timeout_s: float = ...,
    describe: Describe = ...,
    retry_on: ExceptionTypes = ...,
) -> T: ...
@overload
async def eventually(
    probe: Callable[[], Awaitable[T | None]],
    *,
    timeout_s: float = ...,
    describe: Describe = ...,
    retry_on: ExceptionTypes = ...,
) -> T: ...
@overload
async def eventually(
    probe: Callable[[], T | None],
    *,
    timeout_s: float = ...,
    describe: Describe = ...,
    retry_on: ExceptionTypes = ...,
) -> T: ...
async def eventually(
    probe: Callable[[], object],
    *,
    until: Callable[[Any], object] = bool,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    describe: Describe = "",
    retry_on: ExceptionTypes = (),
) -> object:
    """Poll `probe`, a function or a coroutine function, until its result is true, and return that result.

    With `until`, a predicate of the result decides instead of its truth. A probe that raises AssertionError
    or one of `retry_on` counts as false; any other exception ends the wait and propagates. The first poll is
    immediate, and one follows after the timeout, so that a slow machine does not fail a condition that holds.
    `describe` names the condition; a function is called on timeout and may return the state that matters,
    where the probe's result says too little.

    Raises AssertionError with the last result or exception after `timeout_s` seconds, also when a coroutine
    of the probe is still running then.
    """
    wait = _Wait(timeout_s, describe, retry_on)
    while True:
        expired = wait.expired
        try:
            result = probe()
            if isinstance(result, Awaitable):
                result = await _bounded(result, wait.remaining_s)
        except Exception as error:
            wait.record_exception(error)
        else:
            wait.last = repr(result)
            if until(result):
                return result
        if expired:
            raise AssertionError(wait.message())
        await asyncio.sleep(wait.next_pause_s())


@overload
def eventually_sync(
    probe: Callable[[], T],
    *,
    until: Callable[[T], object],
    timeout_s: float = ...,
    describe: Describe = ...,
    retry_on: ExceptionTypes = ...,
) -> T: ...
@overload
def eventually_sync(
    probe: Callable[[], T | None],
    *,
    timeout_s: float = ...,
    describe: Describe = ...,
    retry_on: ExceptionTypes = ...,
) -> T: ...
def eventually_sync(
    probe: Callable[[], object],
    *,
    until: Callable[[Any], object] = bool,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    describe: Describe = "",
    retry_on: ExceptionTypes = (),
) -> object:
    """Poll as `eventually` does, with a plain function and without an event loop."""
    wait = _Wait(timeout_s, describe, retry_on)
    while True:
        expired = wait.expired
        try:
            result = probe()
        except Exception as error:
            wait.record_exception(error)
        else:
            wait.last = repr(result)
            if until(result):
                return result
        if expired:
            raise AssertionError(wait.message())
        time.sleep(wait.next_pause_s())


class _StillRunning(AssertionError):
    """A coroutine of the probe did not return in time."""


async def _bounded(result: Awaitable[object], remaining_s: float) -> object:
    task = asyncio.ensure_future(result)
    try:
        done, _ = await asyncio.wait([task], timeout=max(remaining_s, SHORTEST_POLL_S))
        if not done:
            raise _StillRunning("the probe had not returned")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class _Wait:
    """State of one wait: its deadline, its pauses and what was seen last."""

    def __init__(self, timeout_s: float, describe: Describe, retry_on: ExceptionTypes) -> None:
        self.last = ""
        self._timeout_s = timeout_s
        self._describe = describe
        self._retry_on: ExceptionTypes = (AssertionError, *retry_on)
        self._end = time.monotonic() + timeout_s
        self._pause_s = FIRST_PAUSE_S

    @property
    def remaining_s(self) -> float:
        return self._end - time.monotonic()

    @property
    def expired(self) -> bool:
        return self.remaining_s <= 0

    def record_exception(self, error: Exception) -> None:
        """Keep an exception that counts as a false result; raise any other."""
        if not isinstance(error, self._retry_on):
            raise error
        self.last = f"{type(error).__name__}: {error}"

    def next_pause_s(self) -> float:
        pause_s, self._pause_s = self._pause_s, min(self._pause_s * 2, LONGEST_PAUSE_S)
        return pause_s

    def message(self) -> str:
        text = self._describe() if callable(self._describe) else self._describe
        condition = f"{text}: " if text else ""
        return f"{condition}not within {self._timeout_s:g} s; last seen: {self.last}"
