"""The closing summary of `tests/run`: what failed, what did not run and why, and one line to count.

Reads pytest's JUnit files and checks.tsv (state, tab, name) of a results directory.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree


def read_results(results: Path) -> Iterator[tuple[str, str]]:
    """Yield (state, name and reason) of each test; states are passed, failed, skipped and "not run"."""
    for report in sorted(results.glob("*.xml")):
        for case in ElementTree.parse(report).iter("testcase"):
            yield case_result(case)
    checks = results / "checks.tsv"
    if checks.exists():
        for line in checks.read_text().splitlines():
            state, _, name = line.partition("\t")
            yield state, name


def case_result(case: ElementTree.Element) -> tuple[str, str]:
    """Return state and name of a test case, with the first line of the reason unless it passed."""
    name = f"{case.get('classname')}::{case.get('name')}"
    for tag, state in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(tag)
        if found is not None:
            reason = (found.get("message") or "").strip().split("\n")[0]
            return state, f"{name}: {reason}"
    return "passed", name


def main(results: Path) -> int:
    """Print the summary and return the exit status: 1 when a test failed."""
    count: Counter[str] = Counter()
    # when its tear-down fails, pytest reports a test as two cases of one name
    for state, name in read_results(results):
        count[state] += 1
        if state != "passed":
            print(f"{state}: {name}")
    skipped = count["skipped"] + count["not run"]
    print(f"{count['passed']} passed, {count['failed']} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
