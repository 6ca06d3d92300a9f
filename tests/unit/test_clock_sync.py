"""Keeping a guest's clocks right: simulated ones, that run too fast or too slow or were set."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from sandbox.guest import guest_pb2 as pb
from sandbox.vm_pods.clock_sync import RATE_PPB, GuestClock, Reading

S = 1_000_000_000
MS = S // 1000


@dataclass
class Guest:
    """Its counter runs `error_ppb` too fast; what it was told changes its wall clock, not its raw one."""

    error_ppb: int = 0
    delay_ns: int = MS // 2  # of an answer, anywhere between the question and its end
    host_ns: int = 0
    raw_ns: int = 7 * S
    ahead_ns: float = 0
    rate_ppb: int = 0
    told: list[pb.ClockAdjustment] = field(default_factory=list)
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    def live(self, seconds: float) -> None:
        counted = round(seconds * (S + self.error_ppb))
        self.host_ns += round(seconds * S)
        self.raw_ns += counted
        self.ahead_ns += counted * (1 + self.rate_ppb / S) - seconds * S

    def look(self, clock: GuestClock, until_next_s: float) -> None:
        noise = round(self.chance.uniform(-1, 1) * self.delay_ns)
        reading = Reading(
            host_ns=self.host_ns + noise,
            raw_ns=self.raw_ns,
            ahead_ns=round(self.ahead_ns) - noise,
            error_ns=self.delay_ns,
        )
        adjustment = clock.correct(reading, until_next_s)
        if adjustment is not None:
            self.told.append(adjustment)
            self.rate_ppb = adjustment.rate_ppb
            self.ahead_ns += adjustment.step_ns


def run(guest: Guest, clock: GuestClock, looks: int = 8, wait_s: float = 6) -> list[float]:
    """What it was off by at each look, in ms."""
    off = []
    for _ in range(looks):
        guest.live(wait_s)
        guest.look(clock, wait_s)
        off.append(abs(guest.ahead_ns) / MS)
    return off


@pytest.mark.parametrize("error_ppb", [-50_000_000, -6_000_000, -300_000, 200_000, 10_000_000, 80_000_000])
def test_a_counter_that_runs_wrongly_is_made_up_for(error_ppb: int) -> None:
    guest = Guest(error_ppb=error_ppb)
    off = run(guest, GuestClock(), looks=30)
    assert max(off[-3:]) < 2
    assert all(each.step_ns == 0 for each in guest.told) or abs(error_ppb) > 10_000_000
    at_rest = guest.rate_ppb
    assert (S + error_ppb) * (1 + at_rest / S) == pytest.approx(S, abs=400_000)


def test_a_clock_that_is_right_is_left_alone() -> None:
    guest = Guest(delay_ns=20 * MS)
    assert max(run(guest, GuestClock(), looks=50)) < 20
    assert {(each.step_ns, each.rate_ppb) for each in guest.told} <= {(0, 0)}


def test_one_that_was_set_is_set_back_and_a_little_is_made_up_for() -> None:
    guest, clock = Guest(), GuestClock()
    run(guest, clock)
    guest.ahead_ns += 3600 * S
    assert run(guest, clock)[0] < 1
    assert [each.step_ns for each in guest.told if each.step_ns] == [pytest.approx(-3600 * S, abs=MS)]
    guest.ahead_ns -= 40 * MS
    assert run(guest, clock)[-1] < 1
    assert guest.rate_ppb == pytest.approx(0, abs=200_000)


def test_what_was_lost_on_the_way_is_told_again() -> None:
    guest, clock = Guest(error_ppb=6_000_000), GuestClock()
    run(guest, clock)
    guest.rate_ppb = 0
    clock.forget()
    assert run(guest, clock)[-1] < 1


@pytest.mark.parametrize("wall_ns", [-(1 << 63), 0, (1 << 63) - 1])
@pytest.mark.parametrize("raw_ns", [0, 1, (1 << 64) - 1])
def test_whatever_a_guest_says_is_bounded(wall_ns: int, raw_ns: int) -> None:
    clock = GuestClock()
    for raw in (5 * S, raw_ns):
        reading = Reading(host_ns=S, raw_ns=raw, ahead_ns=wall_ns - 10**18, error_ns=1)
        told = clock.correct(reading, 3)
        assert told is None or (abs(told.rate_ppb) <= RATE_PPB and abs(told.step_ns) <= 1 << 62)
