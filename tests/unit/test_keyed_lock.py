"""Holders of one key exclude each other, a holder of all keys excludes every other."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from sandbox.host.keyed_lock import KeyedLock


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


class Holder:
    """A task that holds a lock until `release` is set."""

    def __init__(self, lock: contextlib.AbstractAsyncContextManager[None]) -> None:
        self._lock = lock
        self.acquired, self.release = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._run())

    @property
    def holds(self) -> bool:
        return self.acquired.is_set()

    async def _run(self) -> None:
        async with self._lock:
            self.acquired.set()
            await self.release.wait()


async def test_one_holder_per_key_and_other_keys_concurrently() -> None:
    locks = KeyedLock()
    first, second, other = Holder(locks.hold("a")), Holder(locks.hold("a")), Holder(locks.hold("b"))
    await settle()
    assert (first.holds, second.holds, other.holds) == (True, False, True)
    first.release.set()
    await second.acquired.wait()
    second.release.set()
    other.release.set()
    await asyncio.gather(first.task, second.task, other.task)


async def test_hold_all_waits_for_holders_and_blocks_new_ones() -> None:
    locks = KeyedLock()
    running = Holder(locks.hold("a"))
    await settle()
    exclusive, late = Holder(locks.hold_all()), Holder(locks.hold("b"))
    await settle()
    assert not exclusive.holds and not late.holds
    running.release.set()
    await exclusive.acquired.wait()
    assert not late.holds
    exclusive.release.set()
    await late.acquired.wait()
    late.release.set()
    await asyncio.gather(running.task, exclusive.task, late.task)


@pytest.mark.parametrize("waiting_for", ["key", "all"])
async def test_cancelled_waiter_blocks_no_other(waiting_for: str) -> None:
    locks = KeyedLock()
    running = Holder(locks.hold("a"))
    await settle()
    waiter = Holder(locks.hold("a") if waiting_for == "key" else locks.hold_all())
    await settle()
    waiter.task.cancel()
    await settle()
    other = Holder(locks.hold("b"))
    await asyncio.wait_for(other.acquired.wait(), 5)
    running.task.cancel()
    again = Holder(locks.hold("a"))
    await asyncio.wait_for(again.acquired.wait(), 5)
    other.release.set()
    again.release.set()
    await asyncio.gather(running.task, waiter.task, other.task, again.task, return_exceptions=True)
