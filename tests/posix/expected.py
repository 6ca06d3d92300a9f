"""What is known to fail: the table of docs/limits.md, between the markers `posix` and `end`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/limits.md"
BEGIN, END = "<!-- posix -->", "<!-- end -->"
OUTCOMES = ("passes", "fails", "either")


@dataclass(frozen=True)
class Row:
    """Cases by patterns (see fnmatch), where, and what becomes of them in each runtime."""

    patterns: tuple[str, ...]
    places: tuple[str, ...]
    outcomes: dict[str, str]

    def covers(self, case: str, place: str) -> bool:
        """Return whether the row is about this case in this place."""
        return place in self.places and any(fnmatchcase(case, each) for each in self.patterns)


def read_rows(text: str) -> Iterator[Row]:
    """Parse the table. Raises ValueError for a row that is not understood."""
    table = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    for line in table[2:]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 5 or not set(cells[2:4]) <= set(OUTCOMES) or not cells[4]:
            raise ValueError(f"{PAGE.name}: expected cases, places, two of {OUTCOMES} and a reason: {line}")
        patterns = tuple(each.strip(" `") for each in cells[0].split(","))
        places = tuple(each.strip() for each in cells[1].split(","))
        yield Row(patterns, places, {"husk": cells[2], "containerd": cells[3]})


def expected(rows: list[Row], runtime: str, case: str, place: str) -> str:
    """Return "passes", "fails" or "either"; a case that no row is about passes."""
    for row in rows:
        if row.covers(case, place):
            return row.outcomes[runtime]
    return "passes"
