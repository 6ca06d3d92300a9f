"""Verbs of one pod wait for each other, GC for all; a cancelled caller loses nothing."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from sandbox.host.keyed_lock import KeyedLock


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


class Verb:
    """A holder of a turn that goes on until it is told to end."""

    def __init__(self, turn: contextlib.AbstractAsyncContextManager[None]) -> None:
        self._turn = turn
        self.begun, self.end = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self._turn:
            self.begun.set()
            await self.end.wait()


async def test_one_pod_at_a_time_and_others_beside() -> None:
    turns = KeyedLock()
    first, second, other = Verb(turns.of("a")), Verb(turns.of("a")), Verb(turns.of("b"))
    await settle()
    assert (first.begun.is_set(), second.begun.is_set(), other.begun.is_set()) == (True, False, True)
    first.end.set()
    await second.begun.wait()
    second.end.set()
    other.end.set()
    await asyncio.gather(first.task, second.task, other.task)


async def test_gc_waits_for_all_and_lets_none_begin() -> None:
    turns = KeyedLock()
    running = Verb(turns.of("a"))
    await settle()
    collecting, late = Verb(turns.alone()), Verb(turns.of("b"))
    await settle()
    assert not collecting.begun.is_set() and not late.begun.is_set()
    running.end.set()
    await collecting.begun.wait()
    assert not late.begun.is_set()
    collecting.end.set()
    await late.begun.wait()
    late.end.set()
    await asyncio.gather(running.task, collecting.task, late.task)


@pytest.mark.parametrize("waiting", ["of", "alone"])
async def test_a_cancelled_waiter_blocks_nobody(waiting: str) -> None:
    turns = KeyedLock()
    running = Verb(turns.of("a"))
    await settle()
    waiter = Verb(turns.of("a") if waiting == "of" else turns.alone())
    await settle()
    waiter.task.cancel()
    await settle()
    beside = Verb(turns.of("b"))
    await asyncio.wait_for(beside.begun.wait(), 5)
    running.task.cancel()
    again = Verb(turns.of("a"))
    await asyncio.wait_for(again.begun.wait(), 5)
    beside.end.set()
    again.end.set()
    await asyncio.gather(running.task, waiter.task, beside.task, again.task, return_exceptions=True)
