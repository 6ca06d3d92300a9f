"""The guest's clocks: rejecting guests whose clocks are wrong, and synchronizing the others.

A kernel calibrates its time stamp counter against a timer three times while it boots, and uses the lowest
result. Under emulation on a busy host the virtual CPU may be stopped meanwhile, and then all clocks of
the guest run several times too fast as long as it runs; those of a template, in each of its copies. Such
a guest is not used (`check_clock`). Smaller errors accumulate: one percent is a quarter of an hour each
day. So the clocks of every pod's guest are read periodically, and their rate is adjusted (`sync_clock`).
A guest whose clocks are right gets no adjustment.

The guest's raw clock is not affected by adjustments: compared to the host's over minutes, it gives the
error of the rate. The offset of the wall clock is corrected by running slightly faster or slower until the
next reading (slewing). Only an offset that is too large for that, as when the host's clock was set, is
corrected by a step.
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

SLACK_S = 0.1  # of which 10 ms are the resolution of a process's start time, a clock tick

FIRST_S, EVERY_S = 1.0, 60.0  # interval of readings: the first, and the longest, by doubling
TRIES = 3  # round trips of a reading, of which the fastest counts
READINGS = 8  # kept to compute the rate
TIMEOUT_S = 20.0
STEP_S = 0.5  # a larger offset is corrected by a step
SLEW_PPB = 10_000_000  # the fastest slewing: 1 %
RATE_PPB = 90_000_000  # the largest rate correction; the kernel accepts 10 % (adjtimex(2), ADJ_TICK)
STEP_LIMIT_NS = 1 << 62  # bounds what a guest may claim
BILLION = 1_000_000_000


def check_clock(client: GuestClient, vmm: ProcessIdentity) -> None:
    """Raise VmmError for a guest whose clock has counted more time than its VMM has run, plus SLACK_S."""
    counted_s = client.welcome.now_ns / 1e9
    ran_s = client.welcomed_s - process.started_s(vmm)
    if counted_s > ran_s + SLACK_S:
        raise VmmError(
            f"the guest's clock is wrong: it counted {counted_s:.1f} s in the {ran_s:.1f} s since its start"
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """The clocks of host and guest at one moment."""

    host_ns: int  # CLOCK_MONOTONIC
    raw_ns: int  # the guest's CLOCK_MONOTONIC_RAW
    ahead_ns: int  # by which the guest's CLOCK_REALTIME is ahead of the host's
    error_ns: int  # half the round trip: the moment may have been earlier or later by as much


class GuestClock:
    """The readings of one guest's clocks, and the adjustment in force."""

    def __init__(self) -> None:
        self._readings: deque[Reading] = deque(maxlen=READINGS)
        self._rate_set_ppb: int | None = None

    def correct(self, reading: Reading, until_next_s: float) -> pb.ClockAdjustment | None:
        """Add a reading; return the adjustment until the next one. None: the one in force stays."""
        self._readings.append(reading)
        off_ns = -reading.ahead_ns if abs(reading.ahead_ns) > reading.error_ns else 0
        if len(self._readings) == 1 and not off_ns:
            return None  # an earlier daemon may have adjusted the rate
        step_ns = off_ns if abs(off_ns) > STEP_S * BILLION else 0
        slew_ppb = bounded(round((off_ns - step_ns) / until_next_s), SLEW_PPB)
        rate_ppb = bounded(self._rate_ppb() + slew_ppb, RATE_PPB)
        if not step_ns and rate_ppb == self._rate_set_ppb:
            return None
        self._rate_set_ppb = rate_ppb
        return pb.ClockAdjustment(step_ns=bounded(step_ns, STEP_LIMIT_NS), rate_ppb=rate_ppb)

    def forget(self) -> None:
        """Forget which adjustment is in force, as the last one may not have arrived."""
        self._rate_set_ppb = None

    def _rate_ppb(self) -> int:
        """By how much the host's clock is faster than the guest's counter; 0: within the readings' error."""
        first, last = self._readings[0], self._readings[-1]
        counted_ns, gained_ns = last.raw_ns - first.raw_ns, last.host_ns - first.host_ns
        gained_ns -= counted_ns
        if counted_ns <= 0 or abs(gained_ns) <= first.error_ns + last.error_ns:
            return 0
        return bounded(gained_ns * BILLION // counted_ns, RATE_PPB)


def bounded(value: int, limit: int) -> int:
    """Return `value`, limited to the range from -`limit` to `limit`."""
    return max(-limit, min(value, limit))


async def read_clock(client: GuestClient, adjustment: pb.ClockAdjustment | None = None) -> Reading:
    """Read the clocks of host and guest, after applying `adjustment` if there is one.

    Raises GuestError, GuestUnreachable, DeadlineExceeded.
    """
    wall_ns, begin_ns = time.time_ns(), time.monotonic_ns()
    reply = await client.call(pb.Request(read_clocks=pb.ReadClocks(adjustment=adjustment)), TIMEOUT_S)
    half_ns = (time.monotonic_ns() - begin_ns) // 2
    return Reading(
        host_ns=begin_ns + half_ns,
        raw_ns=reply.clocks.raw_ns,
        ahead_ns=reply.clocks.wall_ns - wall_ns - half_ns,
        error_ns=half_ns,
    )


async def sync_clock(find_client: Callable[[], GuestClient | None]) -> None:
    """Keep a guest's clocks right until cancelled.

    `find_client` returns the current connection, if there is one. A guest that does not answer is retried
    later without a log line: the calls that need it report that.
    """
    clock = GuestClock()
    wait_s = FIRST_S
    while True:
        await asyncio.sleep(wait_s)
        client = find_client()
        if client is None:
            continue
        try:
            readings = [await read_clock(client) for _ in range(TRIES)]
            best = min(readings, key=lambda each: each.error_ns)
            wrong = abs(best.ahead_ns) > max(best.error_ns, SLACK_S * BILLION)
            wait_s = FIRST_S if wrong else min(2 * wait_s, EVERY_S)
            adjustment = clock.correct(best, wait_s)
            if adjustment is not None:
                await read_clock(client, adjustment)
        except (GuestError, GuestUnreachable, DeadlineExceeded):
            clock.forget()
            wait_s = min(2 * wait_s, EVERY_S)
