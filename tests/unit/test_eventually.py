"""The test kit's own polling: what counts as true, what ends a wait and what the failure says."""

from __future__ import annotations

import asyncio

import pytest

from tests.kit.eventually import eventually, eventually_sync


class Counter:
    """Counts its calls and returns what it was given for each, the last value for ever."""

    def __init__(self, *values: object) -> None:
        self.calls = 0
        self._values = values

    def __call__(self) -> object:
        value = self._values[min(self.calls, len(self._values) - 1)]
        self.calls += 1
        if isinstance(value, BaseException):
            raise value
        return value

    async def awaited(self) -> object:
        await asyncio.sleep(0)
        return self()


async def test_eventually_true_result_is_returned_after_false_ones() -> None:
    probe = Counter(None, 0, "", "there")
    assert await eventually(probe) == "there"
    assert probe.calls == 4


async def test_eventually_coroutine_function_is_awaited() -> None:
    probe = Counter(None, [], [7])
    assert await eventually(probe.awaited) == [7]


def test_eventually_sync_true_result_is_returned() -> None:
    assert eventually_sync(Counter(False, 3)) == 3


async def test_eventually_timeout_reports_the_condition_and_the_last_result() -> None:
    with pytest.raises(AssertionError, match=r"^three exits: not within 0.02 s; last seen: \[\]$"):
        await eventually(list, timeout_s=0.02, describe="three exits")


def test_eventually_sync_timeout_reports_the_condition_and_the_last_result() -> None:
    with pytest.raises(AssertionError, match=r"^the state was 5: not within 0.01 s; last seen: False$"):
        eventually_sync(lambda: False, timeout_s=0.01, describe=lambda: f"the state was {2 + 3}")


async def test_eventually_predicate_decides_and_its_last_value_is_reported() -> None:
    counter = iter(range(100))
    assert await eventually(lambda: next(counter), until=lambda count: count == 3) == 3
    assert eventually_sync(lambda: 0, until=lambda count: count == 0) == 0
    with pytest.raises(AssertionError, match=r"last seen: 7$"):
        eventually_sync(lambda: 7, until=lambda count: count > 7, timeout_s=0.01)


async def test_eventually_failed_assertion_of_the_probe_is_retried() -> None:
    assert await eventually(Counter(AssertionError("not yet"), 1)) == 1
    with pytest.raises(AssertionError, match="last seen: AssertionError: not yet"):
        await eventually(Counter(AssertionError("not yet")), timeout_s=0.01)


def test_eventually_sync_listed_exception_is_retried() -> None:
    assert eventually_sync(Counter(FileNotFoundError("log"), 1), retry_on=(OSError,)) == 1
    with pytest.raises(AssertionError, match="last seen: FileNotFoundError: log"):
        eventually_sync(Counter(FileNotFoundError("log")), timeout_s=0.01, retry_on=(OSError,))


async def test_eventually_other_exception_propagates_at_once() -> None:
    probe = Counter(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        await eventually(probe, retry_on=(OSError,))
    with pytest.raises(ValueError, match="broken"):
        eventually_sync(probe)
    assert probe.calls == 2


async def test_eventually_slow_probe_is_polled_once_more_after_the_timeout() -> None:
    probe = Counter(0, 1)

    async def slow() -> object:
        await asyncio.sleep(0.02)
        return probe()

    assert await eventually(slow, timeout_s=0.01) == 1


async def test_eventually_probe_that_hangs_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.kit.eventually.SHORTEST_POLL_S", 0.01)
    cancelled = asyncio.Event()

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(AssertionError, match="the probe had not returned"):
        await eventually(hang, timeout_s=0.02)
    assert cancelled.is_set()
