"""Synchronizing a guest's clocks, with simulated ones that run too fast or too slow or were set."""

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
    """A guest whose counter runs `error_ppb` too fast. Adjustments change its wall clock, not its raw one."""

    error_ppb: int = 0
    delay_ns: int = MS // 2  # half a round trip; the moment of the reading is anywhere in it
    host_ns: int = 0
    raw_ns: int = 7 * S
    ahead_ns: float = 0
    rate_ppb: int = 0
    adjustments: list[pb.ClockAdjustment] = field(default_factory=list)
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    def run(self, seconds: float) -> None:
        counted = round(seconds * (S + self.error_ppb))
        self.host_ns += round(seconds * S)
        self.raw_ns += counted
        self.ahead_ns += counted * (1 + self.rate_ppb / S) - seconds * S

    def sync(self, clock: GuestClock, until_next_s: float) -> None:
        noise = round(self.chance.uniform(-1, 1) * self.delay_ns)
        reading = Reading(
            host_ns=self.host_ns + noise,
            raw_ns=self.raw_ns,
            ahead_ns=round(self.ahead_ns) - noise,
            error_ns=self.delay_ns,
        )
        adjustment = clock.correct(reading, until_next_s)
        if adjustment is not None:
            self.adjustments.append(adjustment)
            self.rate_ppb = adjustment.rate_ppb
            self.ahead_ns += adjustment.step_ns


def simulate(guest: Guest, clock: GuestClock, readings: int = 8, wait_s: float = 6) -> list[float]:
    """Return the offset of the wall clock at each reading, in ms."""
    off = []
    for _ in range(readings):
        guest.run(wait_s)
        guest.sync(clock, wait_s)
        off.append(abs(guest.ahead_ns) / MS)
    return off


@pytest.mark.parametrize("error_ppb", [-50_000_000, -6_000_000, -300_000, 200_000, 10_000_000, 80_000_000])
def test_wrong_rate_is_corrected_without_steps(error_ppb: int) -> None:
    guest = Guest(error_ppb=error_ppb)
    off = simulate(guest, GuestClock(), readings=30)
    assert max(off[-3:]) < 2
    assert all(each.step_ns == 0 for each in guest.adjustments) or abs(error_ppb) > 10_000_000
    at_rest = guest.rate_ppb
    assert (S + error_ppb) * (1 + at_rest / S) == pytest.approx(S, abs=400_000)


def test_right_clock_is_not_adjusted() -> None:
    guest = Guest(delay_ns=20 * MS)
    assert max(simulate(guest, GuestClock(), readings=50)) < 20
    assert {(each.step_ns, each.rate_ppb) for each in guest.adjustments} <= {(0, 0)}


def test_large_offset_is_stepped_and_small_offset_is_slewed() -> None:
    guest, clock = Guest(), GuestClock()
    simulate(guest, clock)
    guest.ahead_ns += 3600 * S
    assert simulate(guest, clock)[0] < 1
    assert [each.step_ns for each in guest.adjustments if each.step_ns] == [pytest.approx(-3600 * S, abs=MS)]
    guest.ahead_ns -= 40 * MS
    assert simulate(guest, clock)[-1] < 1
    assert guest.rate_ppb == pytest.approx(0, abs=200_000)


def test_forgotten_adjustment_is_sent_again() -> None:
    guest, clock = Guest(error_ppb=6_000_000), GuestClock()
    simulate(guest, clock)
    guest.rate_ppb = 0
    clock.forget()
    assert simulate(guest, clock)[-1] < 1


@pytest.mark.parametrize("wall_ns", [-(1 << 63), 0, (1 << 63) - 1])
@pytest.mark.parametrize("raw_ns", [0, 1, (1 << 64) - 1])
def test_adjustment_for_any_reading_is_bounded(wall_ns: int, raw_ns: int) -> None:
    clock = GuestClock()
    for raw in (5 * S, raw_ns):
        reading = Reading(host_ns=S, raw_ns=raw, ahead_ns=wall_ns - 10**18, error_ns=1)
        made = clock.correct(reading, 3)
        assert made is None or (abs(made.rate_ppb) <= RATE_PPB and abs(made.step_ns) <= 1 << 62)
