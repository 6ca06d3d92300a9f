"""The guest's clocks, read and adjusted. In standalone mode the agent adjusts nothing."""

from __future__ import annotations

import time

import pytest

from sandbox.errors import GuestError
from sandbox.guest import guest_pb2 as pb
from tests.kit.agent import Guest


async def test_read_clocks_returns_wall_and_raw_time(guest: Guest) -> None:
    wall, raw = time.time_ns(), time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    clocks = (await guest.call(read_clocks=pb.ReadClocks())).clocks
    assert wall <= clocks.wall_ns <= time.time_ns()
    assert raw <= clocks.raw_ns <= time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)


@pytest.mark.parametrize("rate_ppb", [100_000_001, -100_000_001, (1 << 63) - 1, -(1 << 63)])
async def test_adjustment_by_more_than_a_tenth_is_refused(guest: Guest, rate_ppb: int) -> None:
    with pytest.raises(GuestError) as caught:
        await guest.call(read_clocks=pb.ReadClocks(adjustment=pb.ClockAdjustment(rate_ppb=rate_ppb)))
    assert (caught.value.step, caught.value.errno) == ("clock", 22)


async def test_adjustment_in_standalone_mode_changes_no_clock(guest: Guest) -> None:
    wall = time.time_ns()
    adjustment = pb.ClockAdjustment(step_ns=3600 * 10**9, rate_ppb=1_000_000)
    clocks = (await guest.call(read_clocks=pb.ReadClocks(adjustment=adjustment))).clocks
    assert wall <= clocks.wall_ns <= time.time_ns()
