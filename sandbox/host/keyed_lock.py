"""A lock for each key, and one that excludes all keys: a readers-writer lock whose readers have names.

The networks use it for the ordering that the CNI SPEC demands (section "Lifecycle & Ordering"): no two
operations on one container at a time, and none at all while GC runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable


class KeyedLock:
    """Locks by key. For one event loop, and not reentrant.

    Releasing never waits, so a cancelled holder releases too. Waiters of one key are not ordered.
    """

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()
        self._held: set[str] = set()
        self._exclusive = False

    @contextlib.asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        """Hold the lock of one key. Waits while it is held, and while `hold_all` is held or waited for."""
        await self._until(lambda: not self._exclusive and key not in self._held)
        self._held.add(key)
        try:
            yield
        finally:
            self._held.discard(key)
            self._wake_waiters()

    @contextlib.asynccontextmanager
    async def hold_all(self) -> AsyncIterator[None]:
        """Hold the locks of all keys. Waits until every holder has released; no key is granted meanwhile."""
        await self._until(lambda: not self._exclusive)
        self._exclusive = True
        try:
            await self._until(lambda: not self._held)
            yield
        finally:
            self._exclusive = False
            self._wake_waiters()

    async def _until(self, free: Callable[[], bool]) -> None:
        while not free():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    def _wake_waiters(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
