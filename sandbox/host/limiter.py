"""Stages of a start that only so many pods may be in at once: more would only make all of them late.

First come, first served; work that nobody waits for (filling the pool) goes last.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Stage:
    """`limit` places. For one event loop."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        self.active = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._idlers: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """Not counting idle work."""
        return sum(not each.done() for each in self._queue)

    @contextlib.asynccontextmanager
    async def place(self, *, idle: bool = False) -> AsyncIterator[None]:
        """Wait for a place and hold it. Idle work gets one only when nobody else is there at all."""
        if self.active >= self.limit or (idle and (self.active or self._queue)):
            await self._wait(self._idlers if idle else self._queue)
        else:
            self.active += 1
        try:
            yield
        finally:
            self.active -= 1
            self._call_next()

    async def _wait(self, queue: deque[asyncio.Future[None]]) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # called, and gone before it heard
                self.active -= 1
                self._call_next()
            else:
                queue.remove(turn)
            raise

    def _call_next(self) -> None:
        while self._queue and self.active < self.limit:
            self._call(self._queue)
        if self.active == 0 and self._idlers:
            self._call(self._idlers)

    def _call(self, queue: deque[asyncio.Future[None]]) -> None:
        # the place is taken for whoever is called, so that nobody who comes now gets in between
        self.active += 1
        queue.popleft().set_result(None)
