"""How results of the file system suites are read, and the table of what is known to fail."""

from __future__ import annotations

import pytest

from tests.posix.expected import PAGE, expected, read_rows
from tests.posix.suites import Result, State, parse_pjdfstest

OUTPUT = """chmod::change_perm::dir                                          ok
chmod::erofs_named                                                       skipped
\tRemounts are not allowed
open::etxtbsy                                                            FAILED
\tassertion failed: left == right
\t  left: 1
mkdir::enotdir                                                           ok

Summary: 1 failed, 1 skipped, 2 passed, 0 expected failures, 4 total
"""
HEAD = "<!-- posix -->\n| cases | where | Husk | containerd + runc | why |\n|---|---|---|---|---|\n"


def test_results_of_pjdfstest_have_their_messages() -> None:
    assert dict(parse_pjdfstest(OUTPUT)) == {
        "pjdfstest chmod::change_perm::dir": Result(State.PASSED),
        "pjdfstest chmod::erofs_named": Result(State.SKIPPED, "Remounts are not allowed"),
        "pjdfstest open::etxtbsy": Result(State.FAILED, "assertion failed: left == right left: 1"),
        "pjdfstest mkdir::enotdir": Result(State.PASSED),
    }


def test_row_is_about_its_cases_and_places_only() -> None:
    rows = list(read_rows(f"{HEAD}| `a *::x`, `b y` | rootfs, disk | fails | passes | so |\n<!-- end -->"))
    assert expected(rows, "husk", "a 1::x", "rootfs") == "fails"
    assert expected(rows, "containerd", "a 1::x", "rootfs") == "passes"
    assert expected(rows, "husk", "b y", "disk") == "fails"
    assert expected(rows, "husk", "b y", "memory") == "passes"
    assert expected(rows, "husk", "b z", "disk") == "passes"


@pytest.mark.parametrize("row", ["| `a` | disk | fails | so |", "| `a` | disk | broken | fails | so |"])
def test_row_that_is_not_understood_is_refused(row: str) -> None:
    with pytest.raises(ValueError, match="expected cases"):
        list(read_rows(f"{HEAD}{row}\n<!-- end -->"))


def test_table_of_the_page_is_understood() -> None:
    assert list(read_rows(PAGE.read_text()))
