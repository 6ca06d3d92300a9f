"""A bound that can be looked at."""

from __future__ import annotations

import asyncio

import pytest

from sandbox.host.limiter import Limiter


async def test_so_many_at_once_and_none_is_lost() -> None:
    places, leave, seen = Limiter("unpack", 2), asyncio.Event(), []

    async def visit(number: int) -> None:
        async with places.slot():
            seen.append(number)
            await leave.wait()

    tasks = [asyncio.create_task(visit(number)) for number in range(5)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert (seen, places.active, places.waiting) == ([0, 1], 2, 3)
    tasks[2].cancel()  # in line
    tasks[0].cancel()  # inside
    for _ in range(5):
        await asyncio.sleep(0)
    assert (seen, places.active, places.waiting) == ([0, 1, 3], 2, 1)
    leave.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (seen, places.active, places.waiting) == ([0, 1, 3, 4], 0, 0)


async def test_a_failure_gives_the_place_back() -> None:
    places = Limiter("unpack", 1)
    with pytest.raises(ValueError):
        async with places.slot():
            raise ValueError
    async with asyncio.timeout(1), places.slot():
        assert places.active == 1
