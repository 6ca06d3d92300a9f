"""Timeouts and retry limits of a pull."""

from __future__ import annotations

import msgspec


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How long a pull waits for a registry, and how often it retries. Seconds unless named otherwise.

    A blob's stream without data for `stall_s`, or below `slow_rate` in `slow_s`, is retried; below `low_rate`
    in `low_s`, the download fails. Rates are bytes per second; 0: not limited.
    """

    connect_s: float = 15.0  # TCP and TLS; hosts.toml's dial_timeout replaces it
    stall_s: float = 30.0
    slow_s: float = 10.0
    slow_rate: int = 1 << 10
    low_s: float = 60.0
    low_rate: int = 64 << 10
    blob_s: float = 7200.0  # a whole blob, from all hosts together; 0: unlimited
    answer_s: float = 60.0  # a whole manifest, token or configuration
    connections: int = 4  # for one large blob, see `parts`
    share_s: float = 30.0  # wait for another pull that downloads the same layer from the same registry
    attempts: int = 5  # per request; a mirror gets at most 2
    backoff_s: float = 0.5  # before the second attempt, doubled for each further one
    backoff_limit_s: float = 30.0  # also the longest Retry-After that is honoured
