"""Limiter: bounded, in order, idle work last, and no slot is lost when a caller is cancelled."""

from __future__ import annotations

import asyncio

import pytest

from sandbox.host.limiter import FairLimiter, Limiter


class Holder:
    """A task that takes a slot and holds it until `release` is set."""

    def __init__(self, limiter: Limiter, *, idle: bool = False) -> None:
        self.holds = False
        self.release = asyncio.Event()
        self.task = asyncio.create_task(self._run(limiter, idle))

    async def _run(self, limiter: Limiter, idle: bool) -> None:
        async with limiter.slot(idle=idle):
            self.holds = True
            await self.release.wait()
        self.holds = False

    async def end(self) -> None:
        self.release.set()
        await self.task
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_slots_are_granted_up_to_the_limit_and_in_order() -> None:
    limiter = Limiter("vm", 2)
    holders = [Holder(limiter) for _ in range(5)]
    await settle()
    assert [each.holds for each in holders] == [True, True, False, False, False]
    assert (limiter.active, limiter.waiting) == (2, 3)
    await holders[1].end()
    assert [each.holds for each in holders] == [True, False, True, False, False]
    for number in (0, 2, 3, 4):
        await holders[number].end()
    assert (limiter.active, limiter.waiting) == (0, 0)


async def test_idle_work_waits_until_no_slot_is_held_or_wanted() -> None:
    limiter = Limiter("vm", 2)
    first = Holder(limiter)
    await settle()
    idle, second = Holder(limiter, idle=True), Holder(limiter)
    await settle()
    assert not idle.holds and second.holds, "a slot is free, but not for idle work"
    await first.end()
    assert [idle.holds, second.holds] == [False, True]
    await second.end()
    assert [idle.holds, second.holds] == [True, False]
    await idle.end()


async def test_cancelled_waiter_is_skipped() -> None:
    limiter = Limiter("vm", 1)
    first, second, third = Holder(limiter), Holder(limiter), Holder(limiter)
    await settle()
    second.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second.task
    await first.end()
    assert third.holds
    await third.end()
    assert limiter.active == 0


async def test_cancellation_between_grant_and_wake_up_passes_the_slot_on() -> None:
    limiter = Limiter("vm", 1)
    first, second, third = Holder(limiter), Holder(limiter), Holder(limiter)
    await settle()
    first.release.set()
    await asyncio.sleep(0)  # it releases, which grants the slot to the second
    second.task.cancel()
    await settle()
    assert third.holds
    await third.end()
    assert (limiter.active, limiter.waiting) == (0, 0)


async def test_cancelled_holder_and_waiter_lose_no_slot() -> None:
    limiter, release = Limiter("unpack", 2), asyncio.Event()
    seen: list[int] = []

    async def hold(number: int) -> None:
        async with limiter.slot():
            seen.append(number)
            await release.wait()

    tasks = [asyncio.create_task(hold(number)) for number in range(5)]
    await settle()
    assert (seen, limiter.active, limiter.waiting) == ([0, 1], 2, 3)
    tasks[2].cancel()  # waits
    tasks[0].cancel()  # holds
    await settle()
    assert (seen, limiter.active, limiter.waiting) == ([0, 1, 3], 2, 1)
    release.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (seen, limiter.active, limiter.waiting) == ([0, 1, 3, 4], 0, 0)


async def test_failing_holder_releases_its_slot() -> None:
    limiter = Limiter("vm", 1)
    with pytest.raises(ValueError):
        async with limiter.slot():
            raise ValueError
    assert limiter.active == 0
    async with asyncio.timeout(1), limiter.slot():
        assert limiter.active == 1


class Shares:
    """Callers of a fair limiter, which hold their slots until they are released by name."""

    def __init__(self, limiter: FairLimiter) -> None:
        self.limiter = limiter
        self.held: list[str] = []
        self.within: dict[str, bool] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def want(self, *names: str) -> None:
        """Let callers "group owner number" want a slot, one after the other."""
        for name in names:
            self.tasks[name] = asyncio.create_task(self._hold(name))
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def _hold(self, name: str) -> None:
        group, owner, _ = name.split()
        async with self.limiter.share(group, owner) as self.within[name]:
            self.held.append(name)
            try:
                await asyncio.Event().wait()
            finally:
                self.held.remove(name)

    async def release(self, *names: str) -> None:
        """End callers, whether they hold a slot or wait."""
        for name in names:
            self.tasks[name].cancel()
        await asyncio.gather(*(self.tasks[name] for name in names), return_exceptions=True)
        await asyncio.sleep(0)


async def test_fair_limiter_gives_a_group_without_slots_an_extra_one() -> None:
    shares = Shares(FairLimiter("download", 2, extra=1))
    await shares.want("a x 1", "a x 2", "a x 3", "b y 1", "c z 1")
    assert shares.held == ["a x 1", "a x 2", "b y 1"]
    assert shares.within == {"a x 1": True, "a x 2": True, "b y 1": False}
    assert (shares.limiter.active, shares.limiter.waiting) == (3, 2)
    await shares.release("b y 1")
    assert shares.held == ["a x 1", "a x 2", "c z 1"]
    await shares.release(*shares.tasks)
    assert (shares.limiter.active, shares.limiter.waiting) == (0, 0)


async def test_fair_limiter_gives_a_free_slot_to_the_owner_with_the_fewest() -> None:
    shares = Shares(FairLimiter("download", 2, extra=0))
    await shares.want("a x 1", "a x 2", "a x 3", "a y 1")
    await shares.release("a x 1")
    assert shares.held == ["a x 2", "a y 1"]
    await shares.release(*shares.tasks)
    assert shares.limiter.active == 0


async def test_fair_limiter_passes_on_a_slot_whose_grant_was_cancelled() -> None:
    shares = Shares(FairLimiter("download", 1, extra=0))
    await shares.want("a x 1", "a x 2", "a x 3")
    shares.tasks["a x 1"].cancel()
    shares.tasks["a x 2"].cancel()
    await asyncio.gather(shares.tasks["a x 1"], shares.tasks["a x 2"], return_exceptions=True)
    await asyncio.sleep(0)
    assert shares.held == ["a x 3"]
    await shares.release("a x 3")
    assert shares.limiter.active == 0
