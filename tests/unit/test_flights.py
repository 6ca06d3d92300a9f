"""Work outlives its caller, retries join it, and nothing is left behind."""

from __future__ import annotations

import asyncio
import logging

import pytest

from sandbox.host.flights import Flights, ShuttingDown


class Work:
    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.begun = 0
        self.ended = 0

    async def __call__(self) -> str:
        self.begun += 1
        await self.gate.wait()
        self.ended += 1
        return "done"


async def settle() -> None:
    """Let everything that can run, run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_retry_joins() -> None:
    flights, work = Flights(), Work()
    callers = [asyncio.create_task(flights.join("k", work)) for _ in range(3)]
    await settle()
    work.gate.set()
    assert await asyncio.gather(*callers) == ["done"] * 3
    assert work.begun == 1
    await settle()
    assert len(flights) == 0


async def test_other_keys_do_not_join() -> None:
    flights, work = Flights(), Work()
    work.gate.set()
    await asyncio.gather(
        flights.join("a", work), flights.join("b", work), flights.alone(work), flights.alone(work)
    )
    assert work.begun == 4


async def test_a_caller_that_leaves_cancels_nothing_and_may_come_back() -> None:
    flights, work = Flights(), Work()
    first = asyncio.create_task(flights.join("k", work))
    await settle()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    again = asyncio.create_task(flights.join("k", work))
    await settle()
    work.gate.set()
    assert await again == "done"
    assert (work.begun, work.ended) == (1, 1)


async def test_an_error_reaches_every_caller_and_is_forgotten() -> None:
    flights = Flights()

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    answers = await asyncio.gather(flights.join("k", fail), flights.join("k", fail), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["no", "no"]
    await settle()
    assert len(flights) == 0


async def test_an_error_that_nobody_waits_for_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    flights, gate = Flights(), asyncio.Event()

    async def fail() -> None:
        await gate.wait()
        raise ValueError("nobody hears this")

    caller = asyncio.create_task(flights.join("k", fail))
    await settle()
    caller.cancel()
    with caplog.at_level(logging.WARNING):
        gate.set()
        await settle()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "nobody hears this" in caplog.text


async def test_closing_waits_then_interrupts_and_lets_the_undo_end() -> None:
    flights, undone = Flights(), []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            undone.append(True)

    caller = asyncio.create_task(flights.join("k", work))
    await settle()
    await flights.close(grace_s=0.01)
    assert undone == [True]
    with pytest.raises(ShuttingDown):
        await caller
    with pytest.raises(ShuttingDown):
        await flights.join("new", work)


async def test_closing_lets_what_ends_in_time_end() -> None:
    flights, work = Flights(), Work()
    caller = asyncio.create_task(flights.join("k", work))
    await settle()
    closing = asyncio.create_task(flights.close(grace_s=30))
    await settle()
    work.gate.set()
    await closing
    assert await caller == "done"


async def test_abandoned_work_is_cancelled_and_not_joined() -> None:
    flights, work = Flights(cancel_abandoned=True), Work()
    callers = [asyncio.create_task(flights.join("key", work)) for _ in range(2)]
    await settle()
    callers[0].cancel()
    await asyncio.wait(callers[:1])
    assert work.begun == 1 and not callers[1].done() and len(flights) == 1
    callers[1].cancel()
    await asyncio.wait(callers)
    assert len(flights) == 0
    # the same key starts new work, while the abandoned one may still be ending
    again = Work()
    again.gate.set()
    assert await flights.join("key", again) == await flights.join("key", again)
    await flights.close(0)


async def test_close_waits_for_abandoned_work_to_clean_up() -> None:
    flights, undone = Flights(cancel_abandoned=True), []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            undone.append(True)

    caller = asyncio.create_task(flights.join("key", work))
    await settle()
    caller.cancel()
    await asyncio.wait({caller})
    assert not undone
    await flights.close(0)
    assert undone
