"""A bound that can be looked at: so many at once, first come, first served."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Places:
    """Used as `async with places:`. For one event loop."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.active = 0
        self.waiting = 0
        self._semaphore = asyncio.Semaphore(limit)

    async def __aenter__(self) -> None:
        self.waiting += 1
        try:
            await self._semaphore.acquire()
        finally:
            self.waiting -= 1
        self.active += 1

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.active -= 1
        self._semaphore.release()
