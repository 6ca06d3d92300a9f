"""Whose turn it is: verbs of one pod one after the other, those of others beside them, GC alone.

CNI SPEC, "Lifecycle & Ordering": no two operations on one container at a time, and none at all
while GC runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable


class KeyedLock:
    """For one event loop. Giving a turn back never waits, so a cancelled holder gives it back too."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()
        self._busy: set[str] = set()
        self._collecting = False

    @contextlib.asynccontextmanager
    async def of(self, pod_id: str) -> AsyncIterator[None]:
        await self._until(lambda: not self._collecting and pod_id not in self._busy)
        self._busy.add(pod_id)
        try:
            yield
        finally:
            self._busy.discard(pod_id)
            self._tell()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Waits for those that have begun, and lets none begin meanwhile."""
        await self._until(lambda: not self._collecting)
        self._collecting = True
        try:
            await self._until(lambda: not self._busy)
            yield
        finally:
            self._collecting = False
            self._tell()

    async def _until(self, free: Callable[[], bool]) -> None:
        while not free():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    def _tell(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
