"""Timeouts and retry limits of a pull."""

from __future__ import annotations

import msgspec


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How long a pull waits for a registry, and how often it retries. Seconds unless named otherwise.

    A stream that brings less than `stall_bytes` in `stall_s` has stalled and is retried.
    """

    connect_s: float = 15.0  # TCP and TLS; hosts.toml's dial_timeout replaces it
    stall_s: float = 30.0
    stall_bytes: int = 1024
    answer_s: float = 60.0  # a whole manifest, token or configuration
    attempts: int = 5  # per request; a mirror gets at most 2
    backoff_s: float = 0.5  # before the second attempt, doubled for each further one
    backoff_limit_s: float = 30.0  # also the longest Retry-After that is honoured
