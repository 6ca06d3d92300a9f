"""When a lost connection to an agent is made again.

A connection is lost for a reason that passes (the daemon was busy, QEMU was stopped), or because the agent
does not keep to the protocol. The former is made again at once. An agent that ends each new one gets pauses
that double, so that it costs no more than a silent one, and at last its pod is NOT_READY.
"""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 60.0
STEADY_S = 60.0  # a connection that lasted for so long counts as made
FAILURES_MAX = 8  # in a row: the next pause would be the longest
LOG_EVERY_S = 60.0


class Reconnects:
    """The attempts to connect to one pod's agent. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._connected_at: float | None = None
        self._logged_at: float | None = None

    def connected(self) -> None:
        """Record that there is a connection."""
        self._connected_at = self._clock()

    def failed(self) -> None:
        """Record that there is none: it was lost, or could not be made."""
        since, self._connected_at = self._connected_at, None
        if since is not None and self._clock() - since >= STEADY_S:
            self._failures = 0
        self._failures += 1

    @property
    def pause_s(self) -> float:
        """Return for how long to wait before the next attempt: 0 after the first loss."""
        if self._failures <= 1:
            return 0.0
        return min(FIRST_PAUSE_S * 2.0 ** min(self._failures - 2, 16), MAX_PAUSE_S)

    @property
    def hopeless(self) -> bool:
        """Whether the pod is to be NOT_READY, while attempts go on."""
        return self._failures > FAILURES_MAX

    def may_log(self) -> bool:
        """Whether a line may be logged now: at most one in LOG_EVERY_S."""
        now = self._clock()
        if self._logged_at is not None and now - self._logged_at < LOG_EVERY_S:
            return False
        self._logged_at = now
        return True
