"""Samples by figure and subject, what is asked of them, and the table that people read.

A figure is a name ("RunPodSandbox"); a subject is whom it was measured of: "containerd", or "husk" with the
handler whose VMs it used ("husk pool"). Where there are several handlers the first one is meant by "Husk",
and the ratios of the others carry their name: "RunPodSandbox (boot)".
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

YARDSTICK = "containerd"
MS = "ms"


@dataclass(frozen=True)
class Target:
    """The most that a figure may be: as a ratio to containerd's median, or as a value of its own."""

    figure: str
    most: float | None  # None: only reported
    ratio: bool = True


TARGETS = (
    Target("RunPodSandbox", 0.6),
    Target("RunPodSandbox (template)", 3.0),
    Target("RunPodSandbox (boot)", None),
    Target("CreateContainer+StartContainer", 0.7),
    Target("ExecSync", 0.4),
    Target("StopContainer", 0.9),
    Target("StopPodSandbox", 0.9),
    Target("RemovePodSandbox", 0.9),
    Target("pods at once", 2.0),
    Target("pull and unpack", 1.0),
    Target("ListContainers, many", 1.5),
    Target("ListPodSandbox, many", 1.5),
    Target("log lines", 3.0),
    Target("memory of an idle pod besides guest RAM", 60, ratio=False),
    Target("daemon's memory with many records", 120, ratio=False),
    Target("daemon's start with many records", 1000, ratio=False),
)


@dataclass
class Figures:
    """Every sample of a run; `units` by figure."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)

    def add(self, figure: str, subject: str, value: float, unit: str = MS) -> None:
        self.units[figure] = unit
        self.samples.setdefault(figure, {}).setdefault(subject, []).append(value)

    @contextmanager
    def timing(self, figure: str, subject: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.add(figure, subject, 1000 * (time.perf_counter() - begin))

    def median(self, figure: str, subject: str) -> float | None:
        samples = self.samples.get(figure, {}).get(subject)
        return percentile(samples, 0.5) if samples else None

    def summary(self) -> dict[str, Any]:
        return {
            figure: {
                "unit": self.units[figure],
                "subjects": {subject: spread(samples) for subject, samples in by_subject.items()},
            }
            for figure, by_subject in self.samples.items()
        }

    def ratios(self, subjects: Sequence[str]) -> dict[str, float]:
        """Medians over containerd's; below 1 Husk is faster. `subjects` are Husk's, the meant one first."""
        found: dict[str, float] = {}
        for figure in self.samples:
            theirs = self.median(figure, YARDSTICK)
            for number, subject in enumerate(subjects):
                ours = self.median(figure, subject)
                if theirs and ours is not None:
                    name = figure if number == 0 else f"{figure} ({subject.partition(' ')[2]})"
                    found[name] = round(ours / theirs, 2)
        return found

    def verdicts(self, subjects: Sequence[str]) -> list[dict[str, Any]]:
        """Each target with what was measured and whether it is met, where it was measured at all."""
        if not subjects:
            return []
        ratios = self.ratios(subjects)
        main, handler = subjects[0], subjects[0].partition(" ")[2]
        # the handler that is meant has its targets under its own name too
        ratios |= {f"{name} ({handler})": value for name, value in ratios.items() if "(" not in name}
        found = []
        for target in TARGETS:
            value = ratios.get(target.figure) if target.ratio else self.median(target.figure, main)
            if value is not None:
                met = None if target.most is None else value <= target.most
                found.append({"figure": target.figure, "value": value, "most": target.most, "met": met})
        return found


def percentile(samples: Sequence[float], share: float) -> float:
    """Nearest rank."""
    ordered = sorted(samples)
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 3)


def spread(samples: Sequence[float]) -> dict[str, float]:
    return {
        "n": len(samples),
        "p50": percentile(samples, 0.5),
        "p95": percentile(samples, 0.95),
        "min": round(min(samples), 3),
        "max": round(max(samples), 3),
    }


def table(figures: Figures, husk: Sequence[str]) -> str:
    """p50 and the spread of every figure, then the targets."""
    subjects = [YARDSTICK, *husk]
    width = max(30, *(len(subject) + 2 for subject in subjects))
    lines = [f"{'p50 (min to max)':42}" + "".join(f"{subject:>{width}}" for subject in subjects)]
    for figure, by_subject in figures.samples.items():
        cells = "".join(f"{cell(by_subject.get(subject)):>{width}}" for subject in subjects)
        lines.append(f"{figure + ', ' + figures.units[figure]:42}{cells}")
    lines += ["", f"{'target':42}{'most':>10}{'measured':>10}"]
    for verdict in figures.verdicts(husk):
        most = "-" if verdict["most"] is None else f"{verdict['most']:g}"
        mark = {True: "met", False: "MISSED", None: "reported"}[verdict["met"]]
        lines.append(f"{verdict['figure']:42}{most:>10}{verdict['value']:>10g}  {mark}")
    return "\n".join(lines)


def cell(samples: Sequence[float] | None) -> str:
    if not samples:
        return "-"
    return f"{percentile(samples, 0.5):.1f} ({min(samples):.1f} to {max(samples):.1f})"
