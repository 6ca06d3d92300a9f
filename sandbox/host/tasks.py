"""Background tasks that fail alone: one broken pod never cancels its neighbours."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar, overload

log = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")


class Tasks:
    """Owns every background task of the daemon; `close` cancels and awaits them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("%s broke: %s", task.get_name(), error)
            log.debug("%s broke", task.get_name(), exc_info=error)


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel them and wait for their end, whatever it is.

    Awaiting a cancelled task with its CancelledError suppressed would also suppress the caller's own, and
    whoever is to end would go on for ever.
    """
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # seen


@overload
async def together(first: Coroutine[Any, Any, A], second: Coroutine[Any, Any, B], /) -> tuple[A, B]: ...
@overload
async def together(*work: Coroutine[Any, Any, A]) -> tuple[A, ...]: ...
async def together(*work: Coroutine[Any, Any, Any]) -> tuple[Any, ...]:
    """The results of all, in order. When one fails the others are cancelled, and the failure is raised
    once they have ended: nothing of them goes on behind the caller's back."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return tuple(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
