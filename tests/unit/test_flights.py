"""Work outlives its caller, retries join it, and nothing is kept of work that has ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

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


async def test_retry_joins_the_work_under_way() -> None:
    flights, work = Flights(), Work()
    callers = [asyncio.create_task(flights.join("k", work)) for _ in range(3)]
    await settle()
    work.gate.set()
    assert await asyncio.gather(*callers) == ["done"] * 3
    assert work.begun == 1
    await settle()
    assert len(flights) == 0


async def test_other_keys_begin_other_work() -> None:
    flights, work = Flights(), Work()
    work.gate.set()
    await asyncio.gather(
        flights.join("a", work), flights.join("b", work), flights.alone(work), flights.alone(work)
    )
    assert work.begun == 4


async def test_cancelled_caller_cancels_nothing_and_can_join_again() -> None:
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


async def test_error_reaches_every_caller_and_is_forgotten() -> None:
    flights = Flights()

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    answers = await asyncio.gather(flights.join("k", fail), flights.join("k", fail), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["no", "no"]
    await settle()
    assert len(flights) == 0


async def test_error_without_callers_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    flights, gate = Flights(), asyncio.Event()

    async def fail() -> None:
        await gate.wait()
        raise ValueError("too late to be raised")

    caller = asyncio.create_task(flights.join("k", fail))
    await settle()
    caller.cancel()
    with caplog.at_level(logging.WARNING):
        gate.set()
        await settle()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "too late to be raised" in caplog.text


async def test_close_waits_then_cancels_and_awaits_the_undo() -> None:
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


async def test_close_returns_when_work_ends_in_time() -> None:
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
    await settle()
    assert (len(flights), work.ended) == (0, 0)
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


async def test_call_does_not_join_work_that_is_being_cancelled() -> None:
    flights, undo = Flights(cancel_abandoned=True), asyncio.Event()
    begun: list[int] = []

    async def work() -> int:
        begun.append(len(begun))
        if len(begun) > 1:
            return begun[-1]
        try:
            await asyncio.Event().wait()
        finally:
            await undo.wait()
        raise AssertionError

    first = asyncio.create_task(flights.join("k", work))
    await settle()
    first.cancel()
    await settle()
    assert await flights.join("k", work) == 1
    assert len(flights) == 1, "the first is still undone"
    closing = asyncio.create_task(flights.close(0))
    await settle()
    assert not closing.done()
    undo.set()
    await closing
    assert len(flights) == 0


async def test_failing_undo_of_abandoned_work_is_not_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    flights = Flights(cancel_abandoned=True)

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("the undo failed")

    caller = asyncio.create_task(flights.join("k", work))
    await settle()
    caller.cancel()
    with caplog.at_level(logging.DEBUG):
        await settle()
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


async def test_wait_is_limited_from_the_beginning_of_the_work() -> None:
    flights, work = Flights(), Work()
    loop = asyncio.get_running_loop()
    with pytest.raises(TimeoutError):
        await flights.join("k", work, within_s=0.02)
    began = loop.time()
    with pytest.raises(TimeoutError):
        await flights.join("k", work, within_s=0.02)
    assert loop.time() - began < 0.02, "the work is older than the limit already"
    work.gate.set()
    assert await flights.join("k", work, within_s=30) == "done"
    assert (work.begun, work.ended) == (1, 1)


async def test_reports_reach_the_listeners_of_present_callers() -> None:
    flights, steps = Flights(), [asyncio.Event() for _ in range(2)]

    async def work(report: Callable[[int], None]) -> str:
        for number, step in enumerate(steps):
            await step.wait()
            report(number)
        return "done"

    heard: dict[str, list[int]] = {"first": [], "second": []}
    first = asyncio.create_task(flights.follow("k", work, heard["first"].append))
    second = asyncio.create_task(flights.follow("k", work, heard["second"].append))
    silent = asyncio.create_task(flights.follow("k", work, None))
    await settle()
    steps[0].set()
    await settle()
    first.cancel()
    await settle()
    steps[1].set()
    assert (await second, await silent) == ("done", "done")
    assert heard == {"first": [0], "second": [0, 1]}
