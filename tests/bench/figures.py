"""Samples by figure and subject, the targets, and the table that the bench prints.

A figure is a name ("RunPodSandbox"). A subject is the runtime that was measured: "containerd", or "husk" with
the handler whose VMs it used ("husk pool"). With several handlers, "Husk" is the first one, and the ratios of
the others have its name in parentheses: "RunPodSandbox (boot)".
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypedDict

BASELINE = "containerd"
MS = "ms"


@dataclass(frozen=True)
class Target:
    """Upper bound of a figure: of its ratio to containerd's median, or of its value in its unit."""

    figure: str
    most: float | None  # None: only reported
    ratio: bool = True


TARGETS = (
    Target("RunPodSandbox", 0.6),
    Target("RunPodSandbox (template)", 3.0),
    Target("RunPodSandbox (boot)", None),
    Target("CreateContainer+StartContainer", 0.7),
    Target("ExecSync", 0.4),
    Target("ContainerStatus", 1.2),
    Target("StopContainer", 0.9),
    Target("RemoveContainer", 1.5),
    Target("StopPodSandbox", 0.9),
    Target("RemovePodSandbox", 0.9),
    Target("pods at once", 2.0),
    Target("pull and unpack", 1.0),
    Target("pull of a large layer", 0.4),
    Target("RemoveImage", 1.5),
    Target("ListContainers, many", 1.5),
    Target("ListPodSandbox, many", 1.5),
    Target("log lines", 3.0),
    Target("memory of an idle pod besides guest RAM", 60, ratio=False),
    Target("daemon's memory with many records", 120, ratio=False),
    Target("daemon's start with many records", 1000, ratio=False),
)


class Spread(TypedDict):
    """Number of samples, and median, 95th percentile, least and greatest of them."""

    n: int
    p50: float
    p95: float
    min: float
    max: float


class Summary(TypedDict):
    """A figure's unit and its spread by subject."""

    unit: str
    subjects: dict[str, Spread]


class TargetResult(TypedDict):
    """A target with what was measured; `most` and `met` are None for a figure without a bound."""

    figure: str
    value: float
    most: float | None
    met: bool | None


@dataclass
class Figures:
    """Every sample of a run by figure and subject, and the unit of each figure."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)

    def add(self, figure: str, subject: str, value: float, unit: str = MS) -> None:
        """Record one sample."""
        self.units[figure] = unit
        self.samples.setdefault(figure, {}).setdefault(subject, []).append(value)

    @contextmanager
    def timing(self, figure: str, subject: str) -> Iterator[None]:
        """Record the milliseconds that the block takes; nothing when it raises."""
        begin = time.perf_counter()
        yield
        self.add(figure, subject, 1000 * (time.perf_counter() - begin))

    def median(self, figure: str, subject: str) -> float | None:
        """Return the median of a figure's samples, None when there are none."""
        samples = self.samples.get(figure, {}).get(subject)
        return percentile(samples, 0.5) if samples else None

    def summary(self) -> dict[str, Summary]:
        """Return the spread of every figure, for the JSON document."""
        return {
            figure: {
                "unit": self.units[figure],
                "subjects": {subject: spread(samples) for subject, samples in by_subject.items()},
            }
            for figure, by_subject in self.samples.items()
        }

    def ratios(self, subjects: Sequence[str]) -> dict[str, float]:
        """Return the ratios of medians to containerd's; below 1 Husk is faster.

        `subjects` are Husk's, with the one that figures without a handler's name are about first.
        """
        found: dict[str, float] = {}
        for figure in self.samples:
            theirs = self.median(figure, BASELINE)
            for number, subject in enumerate(subjects):
                ours = self.median(figure, subject)
                if theirs and ours is not None:
                    name = figure if number == 0 else f"{figure} ({subject.partition(' ')[2]})"
                    found[name] = round(ours / theirs, 2)
        return found

    def check_targets(self, subjects: Sequence[str]) -> list[TargetResult]:
        """Return each target whose figure was measured, with the value and whether it is met."""
        if not subjects:
            return []
        ratios = self.ratios(subjects)
        main, handler = subjects[0], subjects[0].partition(" ")[2]
        # the first handler has its targets under its own name too
        ratios |= {f"{name} ({handler})": value for name, value in ratios.items() if "(" not in name}
        found: list[TargetResult] = []
        for target in TARGETS:
            value = ratios.get(target.figure) if target.ratio else self.median(target.figure, main)
            if value is not None:
                met = None if target.most is None else value <= target.most
                found.append(TargetResult(figure=target.figure, value=value, most=target.most, met=met))
        return found


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the percentile of `share` (0 to 1) by nearest rank, rounded to three digits."""
    ordered = sorted(samples)
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 3)


def spread(samples: Sequence[float]) -> Spread:
    """Summarize samples, of which there must be one at least."""
    return Spread(
        n=len(samples),
        p50=percentile(samples, 0.5),
        p95=percentile(samples, 0.95),
        min=round(min(samples), 3),
        max=round(max(samples), 3),
    )


def table(figures: Figures, husk: Sequence[str]) -> str:
    """Format the median and spread of every figure, then the targets."""
    subjects = [BASELINE, *husk]
    width = max(30, *(len(subject) + 2 for subject in subjects))
    lines = [f"{'p50 (min to max)':42}" + "".join(f"{subject:>{width}}" for subject in subjects)]
    for figure, by_subject in figures.samples.items():
        cells = "".join(f"{cell(by_subject.get(subject)):>{width}}" for subject in subjects)
        lines.append(f"{figure + ', ' + figures.units[figure]:42}{cells}")
    lines += ["", f"{'target':42}{'most':>10}{'measured':>10}"]
    for result in figures.check_targets(husk):
        most = "-" if result["most"] is None else f"{result['most']:g}"
        mark = {True: "met", False: "MISSED", None: "reported"}[result["met"]]
        lines.append(f"{result['figure']:42}{most:>10}{result['value']:>10g}  {mark}")
    return "\n".join(lines)


def cell(samples: Sequence[float] | None) -> str:
    """Format one cell of the table: the median with the least and greatest sample."""
    if not samples:
        return "-"
    return f"{percentile(samples, 0.5):.1f} ({min(samples):.1f} to {max(samples):.1f})"
