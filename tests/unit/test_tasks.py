"""Ending tasks, and running some beside each other."""

from __future__ import annotations

import asyncio

import pytest

from sandbox.host.tasks import end, together


async def test_ending_waits_and_minds_no_failure() -> None:
    order: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            order.append("slow")

    async def broken() -> None:
        raise ValueError

    tasks = [asyncio.create_task(slow()), asyncio.create_task(broken())]
    await asyncio.sleep(0)
    await end(*tasks)
    assert order == ["slow"] and all(task.done() for task in tasks)


async def test_who_ends_another_can_be_ended_meanwhile() -> None:
    """Its own cancellation is not taken for the other's."""
    release = asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await release.wait()
            raise

    other = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    ender = asyncio.create_task(end(other))
    await asyncio.sleep(0)
    ender.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ender
    release.set()
    await asyncio.wait({other})


async def test_together_leaves_nobody_behind() -> None:
    ended = asyncio.Event()

    async def long() -> int:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return 1

    async def broken() -> str:
        await asyncio.sleep(0)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await together(long(), broken())
    assert ended.is_set()

    async def say(word: str) -> str:
        return word

    assert await together(say("a"), say("b"), say("c")) == ("a", "b", "c")
