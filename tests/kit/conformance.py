"""critest's results as values, and the page docs/conformance.md that is made of them.

critest is a Ginkgo suite; the report is Ginkgo's (`-ginkgo.json-report`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

SPEC_NODE = "It"


class State(StrEnum):
    """The result of a spec."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, order=True)
class Spec:
    """One spec of critest and its result."""

    area: str
    name: str
    state: State
    seconds: float
    why: str  # critest's message for a spec that did not pass

    @property
    def title(self) -> str:
        return f"{self.area} / {self.name}"


def read_report(path: Path) -> list[Spec]:
    """Return the specs that ran or skipped themselves, sorted by area and name.

    Specs that a focus or the benchmark flag excluded are left out: Ginkgo calls them skipped too, but gives
    no reason. A failure outside all specs (in a suite's set-up) becomes a failed spec.
    """
    found = []
    for suite in json.loads(path.read_text()):
        for report in suite["SpecReports"] or ():
            spec = _spec(report)
            if spec is not None:
                found.append(spec)
    return sorted(found)


def _spec(report: Mapping[str, object]) -> Spec | None:
    failure = report.get("Failure")
    why = " ".join(str(failure.get("Message", "")).split()) if isinstance(failure, dict) else ""
    state = str(report["State"])
    if report["LeafNodeType"] != SPEC_NODE:
        if state in ("passed", "skipped"):
            return None
        return Spec("suite", str(report["LeafNodeType"]), State.FAILED, 0.0, f"{state}: {why}")
    if state in ("skipped", "pending") and not why:
        return None
    result = {"passed": State.PASSED, "skipped": State.SKIPPED, "pending": State.SKIPPED}.get(
        state, State.FAILED
    )
    texts = report["ContainerHierarchyTexts"]
    assert isinstance(texts, list)
    area = " / ".join(str(text).replace("[k8s.io] ", "") for text in texts)
    seconds = int(str(report["RunTime"])) / 1e9
    return Spec(area, str(report["LeafNodeText"]), result, seconds, why)


def in_state(specs: Iterable[Spec], state: State) -> list[Spec]:
    """Return the specs with this result."""
    return [spec for spec in specs if spec.state is state]


def score(specs: Sequence[Spec]) -> str:
    """Return the counts of results as text."""
    return ", ".join(f"{len(in_state(specs, state))} {state}" for state in State)


HEADER = """# Conformance

Results of critest, the CRI's test suite, for Husk. `tests/run node` writes this page
(`tests/node/test_critest.py`), so a change of the page in a commit is a change of Husk's behaviour. Images
come from a registry on loopback and are made of Debian packages. One spec pulls an image by a digest that
only the original image has: critest runs with the digest of our image in its place.
"""


def page(
    version: str, specs: Sequence[Spec], websocket: Sequence[Spec], reason: Callable[[Spec], str]
) -> str:
    """Format the page. It has no times, so that it changes only with the results.

    `reason` returns our reason for a spec that did not pass.
    """
    lines = [HEADER, f"- critest {version}, SPDY streams: **{score(specs)}** of {len(specs)}"]
    lines.append(f"- the streaming specs again over WebSocket: **{score(websocket)}** of {len(websocket)}")
    failed = [*in_state(specs, State.FAILED), *in_state(websocket, State.FAILED)]
    for title, found in (("Failed", failed), ("Skipped", in_state(specs, State.SKIPPED))):
        entries = dict.fromkeys(f"- {spec.title}: {reason(spec) or spec.why}" for spec in found)
        lines += ["", f"## {title}", "", *(entries or ["None."])]
    lines += ["", "## Passed", "", "| area | specs |", "|---|---|"]
    passed: dict[str, int] = {}
    for spec in in_state(specs, State.PASSED):
        passed[spec.area] = passed.get(spec.area, 0) + 1
    lines += [f"| {area} | {count} |" for area, count in passed.items()]
    return "\n".join(lines) + "\n"
