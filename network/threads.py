"""Blocking work beside the event loop, each piece in a thread that ends with it.

A thread that is never used again may enter a namespace and need not find its way back; and a
plug-in that hangs takes no worker away from the rest of the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def start(function: Callable[[], T], name: str) -> Future[T]:
    """Run `function` in a new thread, which is in the namespaces of the calling thread."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # the thread's edge: handed to who waits
            future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future


def _nothing(*_: object) -> None:
    return None


async def in_thread(
    function: Callable[[], T],
    *,
    on_cancel: Callable[[], None] = _nothing,
    discard: Callable[[T], None] = _nothing,
) -> T:
    """Await `function` run in a thread of its own, to its end in any case.

    A thread cannot be cancelled, and what it holds must not be taken down under it. So when the
    caller is cancelled, `on_cancel` is called, which may hurry the work; the cancellation is passed
    on when the work is done, and a result that nobody takes any more has gone to `discard`.
    """
    work = asyncio.wrap_future(start(function, "husk-net"))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        on_cancel()
        if await _failure_of(work) is None:
            result = work.result()
            await _failure_of(asyncio.wrap_future(start(lambda: discard(result), "husk-net-undo")))
        raise


async def _failure_of(work: asyncio.Future[Any]) -> BaseException | None:
    """Wait until it is done, however often the caller is cancelled meanwhile."""
    while not work.done():
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await asyncio.shield(work)
    return work.exception()
