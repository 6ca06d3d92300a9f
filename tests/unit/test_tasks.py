"""Tasks are cancelled and awaited, and run concurrently."""

from __future__ import annotations

import asyncio

import pytest

from sandbox.host.tasks import Tasks, end, together


async def test_end_waits_and_ignores_failures() -> None:
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


async def test_caller_of_end_can_be_cancelled() -> None:
    """Its own cancellation is not mistaken for that of the task that it ends."""
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


async def test_together_ends_the_others_when_one_fails() -> None:
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


async def test_together_returns_results_in_order() -> None:
    async def echo(word: str) -> str:
        return word

    assert await together(echo("a"), echo("b"), echo("c")) == ("a", "b", "c")


async def test_failed_background_task_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> None:
        raise ValueError("no route")

    tasks = Tasks()
    await asyncio.wait({tasks.spawn(broken(), "watch of pod x")})
    await tasks.close()
    assert "background task failed: watch of pod x: no route" in caplog.text
