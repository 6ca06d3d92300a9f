"""Limits how much work of one kind runs at once, so that the excess waits instead of slowing everything.

Slots are granted in the order of the calls. Idle work, whose result no caller waits for (filling the pool of
VMs), is granted one only while no other work holds or wants one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator


class Limiter:
    """A semaphore of `limit` slots with a queue that can be inspected. For one event loop.

    `name` is its label in the metrics.
    """

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        self.active = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._idle_queue: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """How many callers wait for a slot, without idle work."""
        return sum(not each.done() for each in self._queue)

    @contextlib.asynccontextmanager
    async def slot(self, *, idle: bool = False) -> AsyncIterator[None]:
        """Wait for a slot and hold it. Idle work gets one only while no slot is held or waited for.

        A slot is released in any case, also when the caller is cancelled between the grant and its wake-up.
        """
        if self.active >= self.limit or (idle and (self.active or self._queue)):
            await self._wait(self._idle_queue if idle else self._queue)
        else:
            self.active += 1
        try:
            yield
        finally:
            self.active -= 1
            self._grant_next()

    async def _wait(self, queue: deque[asyncio.Future[None]]) -> None:
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(granted)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():  # cancelled between the grant and its wake-up
                self.active -= 1
                self._grant_next()
            else:
                queue.remove(granted)
            raise

    def _grant_next(self) -> None:
        while self._queue and self.active < self.limit:
            self._grant(self._queue)
        if self.active == 0 and self._idle_queue:
            self._grant(self._idle_queue)

    def _grant(self, queue: deque[asyncio.Future[None]]) -> None:
        # the slot counts as held from here on, so that a caller who arrives now cannot overtake
        self.active += 1
        queue.popleft().set_result(None)


class FairLimiter(Limiter):
    """A limiter whose slots are shared among groups, and within a group among owners.

    A free slot goes to the group that holds the fewest, then to its owner that holds the fewest, then to the
    first in the queue. A group that holds none gets a slot beyond `limit`, up to `extra` of them, so that
    one group's slow work does not hold up the others.
    """

    def __init__(self, name: str, limit: int, extra: int) -> None:
        super().__init__(name, limit)
        self._extra = extra
        self._held: Counter[str] = Counter()  # by group
        self._owned: Counter[tuple[str, str]] = Counter()
        self._wanted: deque[tuple[str, str, asyncio.Future[bool]]] = deque()

    @property
    def waiting(self) -> int:
        """How many callers wait for a slot."""
        return sum(not granted.done() for _, _, granted in self._wanted)

    @contextlib.asynccontextmanager
    async def share(self, group: str, owner: str) -> AsyncIterator[bool]:
        """Wait for a slot and hold it, for one of a group's owners. Yields whether it is within `limit`."""
        granted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        entry = (group, owner, granted)
        self._wanted.append(entry)
        self._grant_shares()
        try:
            yield await granted
        finally:
            if entry in self._wanted:
                self._wanted.remove(entry)
            else:  # granted, also when cancelled between the grant and its wake-up
                self.active -= 1
                self._held = self._held - Counter((group,))
                self._owned = self._owned - Counter(((group, owner),))
                self._grant_shares()

    def _grant_shares(self) -> None:
        while self._wanted:
            best = min(self._wanted, key=lambda each: (self._held[each[0]], self._owned[each[:2]]))
            group, owner, granted = best
            limit = self.limit if self._held[group] else self.limit + self._extra
            if self.active >= limit:
                return
            self._wanted.remove(best)
            self.active += 1
            self._held[group] += 1
            self._owned[group, owner] += 1
            if not granted.done():
                granted.set_result(self.active <= self.limit)
