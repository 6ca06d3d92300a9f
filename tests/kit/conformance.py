"""What critest said, as values, and the page docs/conformance.md that is made of it.

critest is a Ginkgo suite; the report is Ginkgo's own (`-ginkgo.json-report`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

SPEC_NODE = "It"


class State(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, order=True)
class Spec:
    area: str
    name: str
    state: State
    seconds: float
    why: str  # what critest says of a spec that did not pass

    @property
    def title(self) -> str:
        return f"{self.area} / {self.name}"


def read_report(path: Path) -> list[Spec]:
    """Specs that were run or that skipped themselves, in the order of area and name.

    Left out are those that a focus or the flag for benchmarks kept from running: Ginkgo calls them skipped
    too, but gives no reason. A failure outside any spec (a suite's set-up) is a failed spec of its own.
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
    verdict = {"passed": State.PASSED, "skipped": State.SKIPPED, "pending": State.SKIPPED}.get(
        state, State.FAILED
    )
    texts = report["ContainerHierarchyTexts"]
    assert isinstance(texts, list)
    area = " / ".join(str(text).replace("[k8s.io] ", "") for text in texts)
    seconds = int(str(report["RunTime"])) / 1e9
    return Spec(area, str(report["LeafNodeText"]), verdict, seconds, why)


def in_state(specs: Iterable[Spec], state: State) -> list[Spec]:
    return [spec for spec in specs if spec.state is state]


def score(specs: Sequence[Spec]) -> str:
    return ", ".join(f"{len(in_state(specs, state))} {state}" for state in State)


HEADER = """# Conformance

What critest, the CRI's own test suite, says of Husk. `tests/run node` writes this page
(tests/node/test_critest.py), so a change of it in a commit is a change of what Husk does. Images come from a
registry on loopback and are made of Debian packages. One spec pulls an image by a digest that only the
original image has: critest runs with the digest of ours in its place.
"""


def page(
    version: str, specs: Sequence[Spec], websocket: Sequence[Spec], reason: Callable[[Spec], str]
) -> str:
    """No times in it, so that it changes only with the verdicts. `reason` is ours for what did not pass."""
    lines = [HEADER, f"- critest {version}, SPDY streams: **{score(specs)}** of {len(specs)}"]
    lines.append(f"- the streaming specs again over WebSocket: **{score(websocket)}** of {len(websocket)}")
    failed = [*in_state(specs, State.FAILED), *in_state(websocket, State.FAILED)]
    for title, found in (("Failed", failed), ("Skipped", in_state(specs, State.SKIPPED))):
        told = dict.fromkeys(f"- {spec.title}: {reason(spec) or spec.why}" for spec in found)
        lines += ["", f"## {title}", "", *(told or ["None."])]
    lines += ["", "## Passed", "", "| area | specs |", "|---|---|"]
    passed: dict[str, int] = {}
    for spec in in_state(specs, State.PASSED):
        passed[spec.area] = passed.get(spec.area, 0) + 1
    lines += [f"| {area} | {count} |" for area, count in passed.items()]
    return "\n".join(lines) + "\n"
