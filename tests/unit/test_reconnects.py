"""The pauses between attempts to connect to an agent."""

from __future__ import annotations

from sandbox.vm_pods.reconnects import FAILURES_MAX, LOG_EVERY_S, MAX_PAUSE_S, STEADY_S, Reconnects


class Clock:
    """A clock that the test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_connection_that_lasted_is_made_again_at_once() -> None:
    clock = Clock()
    reconnects = Reconnects(clock)
    for _ in range(100):
        reconnects.connected()
        clock.now += STEADY_S
        reconnects.failed()
        assert reconnects.pause_s == 0
        assert not reconnects.hopeless


def test_connections_that_end_soon_get_pauses_that_double_to_a_minute() -> None:
    reconnects = Reconnects(Clock())
    pauses = []
    for _ in range(12):
        reconnects.connected()
        reconnects.failed()
        pauses.append(reconnects.pause_s)
    assert pauses == [0, 0.5, 1, 2, 4, 8, 16, 32, MAX_PAUSE_S, MAX_PAUSE_S, MAX_PAUSE_S, MAX_PAUSE_S]


def test_attempts_without_a_connection_are_hopeless_after_some_and_never_before() -> None:
    reconnects = Reconnects(Clock())
    for _ in range(FAILURES_MAX):
        reconnects.failed()
        assert not reconnects.hopeless
    reconnects.failed()
    assert reconnects.hopeless
    for _ in range(10_000):
        reconnects.failed()
    assert reconnects.pause_s == MAX_PAUSE_S


def test_one_line_a_minute_is_logged() -> None:
    clock = Clock()
    reconnects = Reconnects(clock)
    assert [reconnects.may_log() for _ in range(3)] == [True, False, False]
    clock.now += LOG_EVERY_S
    assert [reconnects.may_log() for _ in range(3)] == [True, False, False]
