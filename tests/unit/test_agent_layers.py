"""The agent's C units include each other without a circle.

A unit is X.c with X.h. It depends on unit Y where either of its files includes "Y.h".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

AGENT = Path(__file__).parents[2] / "sandbox/agent"
_INCLUDE = re.compile(r'^#include "([a-z_]+)\.h"', re.MULTILINE)


def read_units(directory: Path) -> dict[str, set[str]]:
    """Return the units that each unit of the directory depends on."""
    units: dict[str, set[str]] = {}
    for path in sorted([*directory.glob("*.c"), *directory.glob("*.h")]):
        included = set(_INCLUDE.findall(path.read_text()))
        units.setdefault(path.stem, set()).update(included - {path.stem})
    return units


def find_circle(units: Mapping[str, set[str]]) -> list[str]:
    """Return the units of one circle, the first one repeated at the end; empty if there is none."""
    try:
        TopologicalSorter(units).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_agent_units_have_no_include_circle() -> None:
    units = read_units(AGENT)
    assert units["main"] >= {"serve", "boot"}, "the includes were found"
    assert find_circle(units) == []


def test_agent_headers_that_are_included_exist() -> None:
    units = read_units(AGENT)
    assert set().union(*units.values()) <= set(units)


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"a.c": '#include "b.h"', "b.c": '#include "c.h"', "c.h": ""}, set()),
        ({"a.c": '#include "a.h"\n#include "b.h"', "a.h": "", "b.h": '#include "a.h"'}, {"a", "b"}),
        ({"a.c": '#include "b.h"', "b.c": '#include "c.h"', "c.c": '#include "a.h"'}, {"a", "b", "c"}),
    ],
)
def test_circle_is_found(tmp_path: Path, files: dict[str, str], circle: set[str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert set(find_circle(read_units(tmp_path))) == circle
