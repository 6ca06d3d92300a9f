"""Retry a request with exponential backoff, or after the delay that the server asks for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from image.errors import RegistryUnavailable
from image.registry.errors import TemporaryFailure
from image.registry.timing import Timing
from image.registry.transport import TransportError, describe, is_permanent

T = TypeVar("T")

_JITTER = 0.25  # so that nodes that failed together do not retry together


class Retrier:
    """Runs requests to one host until they succeed or `attempts` of them have failed in a row."""

    def __init__(self, host: str, timing: Timing, attempts: int) -> None:
        self._host = host
        self._timing = timing
        self._attempts = attempts

    async def run(
        self, what: str, request: Callable[[], Awaitable[T]], progress: Callable[[], int] | None = None
    ) -> T:
        """Return the result of the first attempt that succeeds.

        `request` is retried on TemporaryFailure and TransportError; other errors pass through. An attempt
        that increased `progress` counts as the first failure again, so that a large blob on a bad line is
        limited by attempts without progress. Raises RegistryUnavailable, which names `what`.
        """
        failures = 0
        best = 0
        while True:
            try:
                return await request()
            except (TemporaryFailure, TransportError) as error:
                failures += 1
                if progress is not None and progress() > best:
                    best, failures = progress(), 1
                if failures >= self._attempts or not _may_be_temporary(error):
                    raise RegistryUnavailable(self._host, what, _problem(error), failures) from error
                await asyncio.sleep(self._delay_s(failures, what, error))

    def _delay_s(self, failures: int, what: str, error: Exception) -> float:
        asked_s = error.retry_after_s if isinstance(error, TemporaryFailure) else None
        if asked_s is None:
            delay_s = min(self._timing.backoff_s * 2.0 ** (failures - 1), self._timing.backoff_limit_s)
            return delay_s * random.uniform(1 - _JITTER, 1 + _JITTER)
        if asked_s > self._timing.backoff_limit_s:
            problem = f"{_problem(error)}, asks to come back in {asked_s:.0f} s"
            raise RegistryUnavailable(self._host, what, problem, failures) from error
        return asked_s


def _may_be_temporary(error: Exception) -> bool:
    return not (isinstance(error, TransportError) and is_permanent(error))


def _problem(error: Exception) -> str:
    return describe(error) if isinstance(error, TransportError) else str(error)
