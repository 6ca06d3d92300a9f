"""Names and numbers of signals, and the exit codes that they leave."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.errors import InvalidSpec
from sandbox.plan.signals import describe_exit, exit_code_of, resolve_stop_signal, signal_name, signal_number


def test_signal_numbers_equal_those_of_this_kernel() -> None:
    for each in signal.Signals:
        if each.value < 32:
            assert signal_number(each.name) == each.value


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("TERM", 15),
        ("sigkill", 9),
        ("15", 15),
        ("SIGRTMIN", 34),
        ("SIGRTMIN+3", 37),
        ("SIGRTMINPLUS15", 49),
        ("RTMAX-14", 50),
        ("SIGRTMAXMINUS1", 63),
        ("64", 64),
        ("SIGPOLL", 29),
        ("SIGCLD", 17),
    ],
)
def test_signal_in_every_spelling_has_its_number(text: str, number: int) -> None:
    assert signal_number(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "0", "65", "32", "33", "SIGRTMIN+31", "SIGRTMAX-31", "-9", "SIG", "TERMINATE", "٣", "9" * 5000],
)
def test_unknown_signal_is_rejected(text: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        signal_number(text)
    assert caught.value.field == "config.stop_signal"


def test_stop_signal_is_the_containers_then_the_images_then_term() -> None:
    assert resolve_stop_signal("10", "SIGQUIT") == "SIGUSR1"
    assert resolve_stop_signal("", "quit") == "SIGQUIT"
    assert resolve_stop_signal("", "") == "SIGTERM"
    with pytest.raises(InvalidSpec, match="StopSignal"):
        resolve_stop_signal("", "SIGNONSENSE")


@given(st.integers(1, 64).filter(lambda number: number not in (32, 33)))
def test_signal_name_of_every_number_has_that_number(number: int) -> None:
    assert signal_number(signal_name(number)) == number
    assert signal_name(number) in describe_exit(exit_code_of(number))


@given(st.text())
def test_arbitrary_text_is_a_signal_or_rejected(text: str) -> None:
    try:
        number = signal_number(text)
    except InvalidSpec:
        return
    assert 1 <= number <= 64


def test_exit_code_is_described_with_its_signal() -> None:
    assert exit_code_of(9) == 137
    assert describe_exit(137) == "exit code 137 (SIGKILL)"
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(255) == "exit code 255"
