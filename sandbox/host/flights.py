"""Work that outlives the call that asked for it.

A kubelet gives up after its timeout and asks again. So the work of a call runs in a task of its
own under a key: a caller that goes away cancels nothing, and one that comes back with the same
key joins the work under way and gets its result. What ended is forgotten at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class ShuttingDown(Exception):
    """The daemon is ending: nothing new is begun, and what cannot end in time is interrupted."""

    def __init__(self) -> None:
        super().__init__("husk is shutting down; ask again when it has started anew")


@dataclass(slots=True, eq=False)
class _Flight:
    task: asyncio.Task[Any]
    waiting: int = 0


class Flights:
    """Tasks by key, each shared by the callers that join it. Belongs to one event loop.

    With `cancel_abandoned`, work is cancelled when the last caller that waits for it is cancelled: a pull
    that nobody waits for ends. A call with the same key that comes while such work is still ending starts
    new work.
    """

    def __init__(self, *, cancel_abandoned: bool = False) -> None:
        self._flights: dict[Hashable, _Flight] = {}
        self._ending: set[asyncio.Task[Any]] = set()  # abandoned, and not finished yet
        self._cancel_abandoned = cancel_abandoned
        self._closed = False

    def __len__(self) -> int:
        return len(self._flights)

    async def join(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of the work under way under `key`, begun by this call if there is none.

        Raises what the work raises, and ShuttingDown.
        """
        if self._closed:
            raise ShuttingDown
        flight = self._flights.get(key) or self._begin(key, work)
        flight.waiting += 1
        try:
            # not gather or shield(await): only the caller's own cancellation may arrive here
            await asyncio.wait({flight.task})
        finally:
            flight.waiting -= 1
            if self._cancel_abandoned and not flight.waiting and not flight.task.done():
                self._abandon(key, flight)
        if flight.task.cancelled():
            raise ShuttingDown
        result: T = flight.task.result()
        return result

    async def alone(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Like join, for work that no other call may share."""
        return await self.join(object(), work)

    async def close(self, grace_s: float) -> None:
        """Begin nothing more; wait for what is under way, then interrupt it and await its undo."""
        self._closed = True
        tasks = {flight.task for flight in self._flights.values()} | self._ending
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=grace_s)
        for task in late - self._ending:  # a second cancellation would interrupt their cleanup
            task.cancel()
        if late:
            await asyncio.wait(late)

    def _begin(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> _Flight:
        flight = _Flight(asyncio.create_task(work()))
        self._flights[key] = flight
        flight.task.add_done_callback(lambda task: self._ended(key, flight))
        return flight

    def _abandon(self, key: Hashable, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        self._ending.add(flight.task)
        flight.task.add_done_callback(self._ending.discard)
        flight.task.cancel()

    def _ended(self, key: Hashable, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        error = None if flight.task.cancelled() else flight.task.exception()
        if error is not None and not flight.waiting:
            # nobody is left to be told, so this is the edge
            log.warning("a call that its client had left failed: %s", error)
