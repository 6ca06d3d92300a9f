"""File system suites that others wrote, in three places of a VM's container, and of one of containerd + runc.

The same cases fail as docs/limits.md lists, neither more nor fewer. `HUSK_TEST_POSIX=short` runs a part,
without containerd.
"""

from __future__ import annotations

import fnmatch

import pytest

from tests.posix import suites
from tests.posix.conftest import SHORT
from tests.posix.expected import PAGE, expected, read_rows
from tests.posix.suites import Place, Results, State

pytestmark = [pytest.mark.posix, pytest.mark.timeout(1800)]

ROWS = list(read_rows(PAGE.read_text()))
PJDFSTEST_CASES = 398


def check(runtime: str, place: Place, results: Results) -> None:
    """Compare the results of a suite with the table."""
    suite = next(iter(results)).split()[0]
    patterns = [each for row in ROWS if place.name in row.places for each in row.patterns]
    named = [each for each in patterns if each.startswith(suite)] if not SHORT else []
    stale = [each for each in named if not fnmatch.filter(results, each)]
    wrong = [f"{each} in {PAGE.name} is the name of no case" for each in stale]
    for case, result in results.items():
        wanted = expected(ROWS, runtime, case, place.name)
        failed = result.state is State.FAILED
        if wanted != "either" and failed is not (wanted == "fails"):
            wrong.append(f"{case} in {place.name}: {result.state}, but {wanted} by {PAGE.name}: {result.why}")
    assert wrong == []


def test_pjdfstest_fails_where_it_is_listed_only(runtime: str, place: Place) -> None:
    results = suites.pjdfstest(place)
    assert len(results) == PJDFSTEST_CASES
    skipped = {name: result.why for name, result in results.items() if result.state is State.SKIPPED}
    # neither may one remount a whole file system of the host, nor does every one know a limit of links
    others = [name for name, why in skipped.items() if "emount" not in why and "LINK_MAX" not in why]
    assert others == []
    assert len(skipped) <= 14
    check(runtime, place, results)


def test_fsx_reads_what_it_wrote(runtime: str, place: Place) -> None:
    check(runtime, place, suites.fsx(place, operations=200 if SHORT else 5000))


def test_fio_verifies_what_it_wrote(runtime: str, place: Place) -> None:
    check(runtime, place, suites.fio(place, 1, ["psync", "mmap"]) if SHORT else suites.fio(place, 16))


def test_stress_ng_fails_where_it_is_listed_only(runtime: str, place: Place) -> None:
    check(runtime, place, suites.stress_ng(place, 1, ["rename", "xattr"] if SHORT else suites.STRESSORS))
