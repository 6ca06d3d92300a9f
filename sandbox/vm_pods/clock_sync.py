"""The guest's clocks: whether they can be right, and keeping them so.

A kernel measures its time stamp counter against a timer while it boots, three times, and believes the
lowest answer. Under emulation on a busy host the virtual CPU may stand still in the middle, and then all
clocks of the guest run several times too fast, as long as it lives; in a template, in each of its copies.
Such a guest is not used (`check_clock`). Smaller errors look like nothing at first, and grow: one percent
is a quarter of an hour each day. So every pod's guest is asked now and then what its clocks show, and told
how much faster or slower to run (`keep_clock`). A guest whose clocks are right is told nothing new.

The guest's raw clock shows what its counter does, whatever it was told; measured against the host's over
minutes it gives the rate. What the wall clock is off by then is made up for by running a little faster or
slower still until the next look. Only what is too much for that, as when the host's clock was set, is
a step.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from sandbox.errors import DeadlineExceeded, GuestError, GuestUnreachable, VmmError
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.host import process
from sandbox.host.process import ProcessIdentity

SLACK_S = 0.1  # of which 10 ms are the host's, who tells starts in clock ticks

FIRST_S, EVERY_S = 1.0, 60.0  # between looks: in the beginning, and once all is well
TRIES = 3  # of which the quickest counts
READINGS = 8
TIMEOUT_S = 20.0
STEP_S = 0.5  # more than that is not made up for by running faster
SLEW_PPB = 10_000_000  # as fast as that is done: 1 %
RATE_PPB = 90_000_000  # what a guest can be told is a tenth (adjtimex(2), ADJ_TICK)
STEP_LIMIT_NS = 1 << 62  # of what a guest may say that it is off by
BILLION = 1_000_000_000


def check_clock(client: GuestClient, vmm: ProcessIdentity) -> None:
    """A guest that has counted more time than its VMM has lived counts wrongly. Raises VmmError."""
    counted_s = client.welcome.now_ns / 1e9
    lived_s = client.welcomed_s - process.started_s(vmm)
    if counted_s > lived_s + SLACK_S:
        raise VmmError(
            f"the guest's clock is wrong: it counts {counted_s:.1f} s of {lived_s:.1f} s since its start"
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """What clocks showed at one moment."""

    host_ns: int  # CLOCK_MONOTONIC
    raw_ns: int  # the guest's CLOCK_MONOTONIC_RAW
    ahead_ns: int  # of the host's CLOCK_REALTIME is the guest's
    unsure_ns: int  # so much earlier or later may the moment have been


class Discipline:
    """One guest's clock."""

    def __init__(self) -> None:
        self._readings: deque[Reading] = deque(maxlen=READINGS)
        self._told_ppb: int | None = None

    def correct(self, reading: Reading, until_next_s: float) -> pb.ClockAdjustment | None:
        """How its clocks have to run until the next reading; None: as they do."""
        self._readings.append(reading)
        off_ns = -reading.ahead_ns if abs(reading.ahead_ns) > reading.unsure_ns else 0
        if len(self._readings) == 1 and not off_ns:
            return None  # it may have been told before, by another daemon
        step_ns = off_ns if abs(off_ns) > STEP_S * BILLION else 0
        slew_ppb = bounded(round((off_ns - step_ns) / until_next_s), SLEW_PPB)
        rate_ppb = bounded(self._rate_ppb() + slew_ppb, RATE_PPB)
        if not step_ns and rate_ppb == self._told_ppb:
            return None
        self._told_ppb = rate_ppb
        return pb.ClockAdjustment(step_ns=bounded(step_ns, STEP_LIMIT_NS), rate_ppb=rate_ppb)

    def forget(self) -> None:
        """An adjustment that may have been lost is to be told again."""
        self._told_ppb = None

    def _rate_ppb(self) -> int:
        """By how much the host's clock is faster than the guest's counter; 0 where that is not sure."""
        first, last = self._readings[0], self._readings[-1]
        counted_ns, gained_ns = last.raw_ns - first.raw_ns, last.host_ns - first.host_ns
        gained_ns -= counted_ns
        if counted_ns <= 0 or abs(gained_ns) <= first.unsure_ns + last.unsure_ns:
            return 0
        return bounded(gained_ns * BILLION // counted_ns, RATE_PPB)


def bounded(value: int, limit: int) -> int:
    return max(-limit, min(value, limit))


async def read_clock(client: GuestClient, adjustment: pb.ClockAdjustment | None = None) -> Reading:
    """Raises GuestError, GuestUnreachable, DeadlineExceeded."""
    wall_ns, begin_ns = time.time_ns(), time.monotonic_ns()
    reply = await client.call(pb.Request(read_clocks=pb.ReadClocks(adjustment=adjustment)), TIMEOUT_S)
    half_ns = (time.monotonic_ns() - begin_ns) // 2
    return Reading(
        host_ns=begin_ns + half_ns,
        raw_ns=reply.clocks.raw_ns,
        ahead_ns=reply.clocks.wall_ns - wall_ns - half_ns,
        unsure_ns=half_ns,
    )


async def keep_clock(find_client: Callable[[], GuestClient | None]) -> None:
    """Until cancelled. A guest that does not answer is asked again later: whoever needs it tells of that."""
    discipline = Discipline()
    wait_s = FIRST_S
    while True:
        await asyncio.sleep(wait_s)
        client = find_client()
        if client is None:
            continue
        try:
            readings = [await read_clock(client) for _ in range(TRIES)]
            best = min(readings, key=lambda each: each.unsure_ns)
            lost = abs(best.ahead_ns) > max(best.unsure_ns, SLACK_S * BILLION)
            wait_s = FIRST_S if lost else min(2 * wait_s, EVERY_S)
            adjustment = discipline.correct(best, wait_s)
            if adjustment is not None:
                await read_clock(client, adjustment)
        except (GuestError, GuestUnreachable, DeadlineExceeded):
            discipline.forget()
            wait_s = min(2 * wait_s, EVERY_S)
