"""Limiter of a stage: bounded, in order, idle work last, and none lost to whoever gives up."""

from __future__ import annotations

import asyncio

import pytest

from sandbox.host.limiter import Limiter


class Visitor:
    """Enters a stage and stays until told to leave."""

    def __init__(self, stage: Limiter, *, idle: bool = False) -> None:
        self.inside = False
        self.leave = asyncio.Event()
        self.task = asyncio.create_task(self._visit(stage, idle))

    async def _visit(self, stage: Limiter, idle: bool) -> None:
        async with stage.slot(idle=idle):
            self.inside = True
            await self.leave.wait()
        self.inside = False

    async def go(self) -> None:
        self.leave.set()
        await self.task
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_no_more_than_the_limit_and_in_order() -> None:
    stage = Limiter("vm", 2)
    visitors = [Visitor(stage) for _ in range(5)]
    await settle()
    assert [each.inside for each in visitors] == [True, True, False, False, False]
    assert (stage.active, stage.waiting) == (2, 3)
    await visitors[1].go()
    assert [each.inside for each in visitors] == [True, False, True, False, False]
    for number in (0, 2, 3, 4):
        await visitors[number].go()
    assert (stage.active, stage.waiting) == (0, 0)


async def test_idle_work_waits_until_nobody_is_there() -> None:
    stage = Limiter("vm", 2)
    first = Visitor(stage)
    await settle()
    idle, second = Visitor(stage, idle=True), Visitor(stage)
    await settle()
    assert not idle.inside and second.inside, "there is a place, and it is not for idle work"
    await first.go()
    assert [idle.inside, second.inside] == [False, True]
    await second.go()
    assert [idle.inside, second.inside] == [True, False]
    await idle.go()


async def test_whoever_gives_up_in_the_queue_is_not_called() -> None:
    stage = Limiter("vm", 1)
    first, second, third = Visitor(stage), Visitor(stage), Visitor(stage)
    await settle()
    second.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second.task
    await first.go()
    assert third.inside
    await third.go()
    assert stage.active == 0


async def test_a_place_given_to_one_who_is_just_leaving_goes_on() -> None:
    stage = Limiter("vm", 1)
    first, second, third = Visitor(stage), Visitor(stage), Visitor(stage)
    await settle()
    first.leave.set()
    await asyncio.sleep(0)  # it leaves, and calls the second
    second.task.cancel()
    await settle()
    assert third.inside
    await third.go()
    assert (stage.active, stage.waiting) == (0, 0)


async def test_a_failure_inside_gives_the_place_back() -> None:
    stage = Limiter("vm", 1)
    with pytest.raises(ValueError):
        async with stage.slot():
            raise ValueError
    assert stage.active == 0
