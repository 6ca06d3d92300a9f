"""The least rate at which a blob must arrive, which rises: what drips must not hold a download's slot.

Time counts while a request is open, from when it is sent; the pauses between attempts do not.
"""

from __future__ import annotations

import time

from image.registry.errors import TemporaryFailure
from image.registry.timing import Timing


class TooSlow(Exception):
    """The download stays below the least rate, and no retry is worth it. The text says by how much."""


class _Window:
    """Bytes and seconds since the last check; a check is due after `period_s`."""

    def __init__(self, period_s: float, rate: int) -> None:
        self._period_s, self._rate = period_s, rate
        self.seconds = 0.0
        self._bytes = 0

    def add(self, seconds: float, count: int) -> str:
        """Count what came in; return how it falls below the rate at the end of a period, else nothing."""
        self.seconds += seconds
        self._bytes += count
        if self.seconds < self._period_s:
            return ""
        period_s, came = self.seconds, self._bytes
        self.seconds, self._bytes = 0.0, 0
        if came >= self._rate * period_s:
            return ""
        return (
            f"{came} bytes in {period_s:.0f} s, the limit is {self._rate} bytes/s after {self._period_s:g} s"
        )


class RateFloor:
    """Watches one blob's download from one host, over all its attempts."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._low = _Window(timing.low_s, timing.low_rate)
        self.begin()

    def begin(self) -> None:
        """Begin an attempt."""
        self._slow = _Window(self._timing.slow_s, self._timing.slow_rate)
        self._at = self._begun = time.monotonic()
        self._came = 0

    def count(self, size: int) -> None:
        """Count bytes that came. Raises TemporaryFailure for a slow stream, TooSlow for one that stays so."""
        now = time.monotonic()
        elapsed, self._at = now - self._at, now
        self._came += size
        if problem := self._low.add(elapsed, size):
            raise TooSlow(problem)
        if problem := self._slow.add(elapsed, size):
            raise TemporaryFailure(problem)

    def end(self) -> bool:
        """End an attempt; return whether it was fast enough to count as progress. Raises TooSlow."""
        now = time.monotonic()
        elapsed, self._at = now - self._at, now
        if problem := self._low.add(elapsed, 0):
            raise TooSlow(problem)
        return self._came >= self._timing.slow_rate * (now - self._begun)
