"""docs/threat-model.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tests_that_the_threat_model_names_exist() -> None:
    page = (ROOT / "docs/threat-model.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)\(", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 30
    assert named - defined == set()


def test_each_row_of_what_is_defended_names_a_test() -> None:
    page = (ROOT / "docs/threat-model.md").read_text()
    section = page.split("## What is defended")[1].split("## What is not defended")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert rows
    assert [row for row in rows if "`test_" not in row] == []
