"""Medians, ratios, targets and the table that the bench computes from its samples."""

from __future__ import annotations

import pytest

from tests.bench import figures
from tests.bench.figures import Figures, percentile

HUSK = ("husk pool", "husk boot")


@pytest.fixture
def measured() -> Figures:
    found = Figures()
    for value in (100.0, 120.0, 900.0):
        found.add("RunPodSandbox", "containerd", value)
    found.add("RunPodSandbox", "husk pool", 60.0)
    found.add("RunPodSandbox", "husk boot", 2400.0)
    found.add("ExecSync", "containerd", 20.0)
    found.add("ExecSync", "husk pool", 10.0)
    found.add("daemon's memory with many records", "husk pool", 70.0, "MiB")
    return found


def test_percentile_is_one_of_the_samples() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(1, 21)], 0.95) == 19.0
    assert percentile([5.0], 0.95) == 5.0


def test_ratios_are_of_medians_and_unnamed_ones_of_the_first_handler(measured: Figures) -> None:
    assert measured.ratios(HUSK) == {"RunPodSandbox": 0.5, "RunPodSandbox (boot)": 20.0, "ExecSync": 0.5}
    assert Figures().ratios(HUSK) == {}


def test_check_targets_result_is_met_missed_or_reported(measured: Figures) -> None:
    results = {each["figure"]: each["met"] for each in measured.check_targets(HUSK)}
    assert results == {
        "RunPodSandbox": True,
        "RunPodSandbox (boot)": None,
        "ExecSync": False,
        "daemon's memory with many records": True,
    }
    assert measured.check_targets(()) == []


def test_check_targets_single_handler_has_its_own_target_too(measured: Figures) -> None:
    results = {each["figure"]: each["value"] for each in measured.check_targets(("husk boot",))}
    assert (results["RunPodSandbox"], results["RunPodSandbox (boot)"]) == (20.0, 20.0)


def test_table_with_missed_target_marks_it(measured: Figures) -> None:
    table = figures.table(measured, HUSK)
    assert "120.0 (100.0 to 900.0)" in table
    assert "MISSED" in next(
        line for line in table.splitlines() if line.startswith("ExecSync  ") and "0.4" in line
    )
