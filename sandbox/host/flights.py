"""Work that callers share: the first call under a key begins it, later ones join it.

A kubelet that runs into its timeout repeats the call. So the work runs in a task that belongs to no caller:
one that is cancelled cancels nothing, and one that comes back with the same key joins the work under way and
gets its result. Nothing is kept of work that has ended.

    cri       calls of the CRI: they end in any case, even with no caller left
    image     pulls: they are cancelled when the last caller is
    stats     reads of a pod's usage: callers wait for a limited time, the read goes on
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
P = TypeVar("P")


class ShuttingDown(Exception):
    """The daemon is stopping: no work is begun, and work that does not end in time is interrupted."""

    def __init__(self) -> None:
        super().__init__("husk is shutting down; repeat the call when it is running again")


@dataclass(slots=True, eq=False)
class _Flight:
    task: asyncio.Task[Any]
    began_s: float  # loop time
    callers: int = 0
    listeners: list[Callable[[Any], None]] = field(default_factory=list)
    interrupted: bool = False

    def interrupt(self) -> None:
        self.interrupted = True
        self.task.cancel()


class Flights:
    """Work by key, each shared by the callers that join it. Belongs to one event loop.

    With `cancel_abandoned`, work is cancelled when its last caller is cancelled or stops waiting. A call with
    the same key that comes while such work is still ending begins new work.
    """

    def __init__(self, *, cancel_abandoned: bool = False) -> None:
        self._cancel_abandoned = cancel_abandoned
        self._joinable: dict[Hashable, _Flight] = {}
        self._running: set[_Flight] = set()
        self._closed = False

    def __len__(self) -> int:
        """How many are running, with those that are being cancelled."""
        return len(self._running)

    async def join(
        self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]], *, within_s: float | None = None
    ) -> T:
        """Return the result of the work under way under `key`, begun by this call if there is none.

        `within_s`, in seconds since the work began, limits the wait; work that is older is polled
        once. Raises TimeoutError after it, ShuttingDown, and what the work raises.
        """
        return await self.follow(key, lambda _: work(), None, within_s=within_s)

    async def follow(
        self,
        key: Hashable,
        work: Callable[[Callable[[P], None]], Coroutine[Any, Any, T]],
        listener: Callable[[P], None] | None,
        *,
        within_s: float | None = None,
    ) -> T:
        """Like `join`, for work that reports its progress: `work` is called with a function that passes a
        report to the listeners of all who wait at that moment, in the event loop's thread."""
        if self._closed:
            raise ShuttingDown
        flight = self._joinable.get(key) or self._begin(key, work)
        flight.callers += 1
        if listener is not None:
            flight.listeners.append(listener)
        try:
            # not gather or shield(await): only the caller's own cancellation may arrive here
            await asyncio.wait({flight.task}, timeout=_left_s(flight, within_s))
        finally:
            flight.callers -= 1
            if listener is not None:
                flight.listeners.remove(listener)
            if self._cancel_abandoned and not flight.callers and not flight.task.done():
                self._forget(key, flight)  # a call that comes now must not join what is ending
                flight.interrupt()
        if not flight.task.done():
            raise TimeoutError
        if flight.task.cancelled():
            raise ShuttingDown
        result: T = flight.task.result()
        return result

    async def alone(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Like `join`, for work that no other call may share."""
        return await self.join(object(), work)

    async def close(self, grace_s: float) -> None:
        """Begin nothing more, wait `grace_s` seconds for running work, then cancel it and await its end."""
        self._closed = True
        if not self._running:
            return
        await asyncio.wait({flight.task for flight in self._running}, timeout=grace_s)
        late = [flight for flight in self._running if not flight.task.done()]
        for flight in late:
            if not flight.interrupted:  # a second cancellation would interrupt its cleanup
                flight.interrupt()
        if late:
            await asyncio.wait({flight.task for flight in late})

    def _begin(self, key: Hashable, work: Callable[[Callable[[P], None]], Coroutine[Any, Any, T]]) -> _Flight:
        listeners: list[Callable[[P], None]] = []

        def report(progress: P) -> None:
            for listener in tuple(listeners):
                listener(progress)

        task = asyncio.create_task(work(report))
        flight = _Flight(task, asyncio.get_running_loop().time(), listeners=listeners)
        self._joinable[key] = flight
        self._running.add(flight)
        task.add_done_callback(lambda _: self._ended(key, flight))
        return flight

    def _forget(self, key: Hashable, flight: _Flight) -> None:
        if self._joinable.get(key) is flight:
            del self._joinable[key]

    def _ended(self, key: Hashable, flight: _Flight) -> None:
        self._forget(key, flight)
        self._running.discard(flight)
        error = None if flight.task.cancelled() else flight.task.exception()
        if error is not None and not flight.callers:
            # no caller is left to raise it to
            level = logging.DEBUG if flight.interrupted else logging.WARNING
            log.log(level, "a call failed after its caller had stopped waiting: %s", error)


def _left_s(flight: _Flight, within_s: float | None) -> float | None:
    if within_s is None:
        return None
    return max(0.0, flight.began_s + within_s - asyncio.get_running_loop().time())
