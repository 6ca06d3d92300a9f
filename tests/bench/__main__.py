"""`tests/bench/run [--rounds N] [--json FILE] [--part NAME]... [--quick]`: measure, print, write JSON.

Both runtimes run side by side and take turns, round by round, with the same registry, images, CNI
configuration, disk and client. A part is a group of figures that are measured together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from tests.bench import files, memory, pods, restart, slow_line, things
from tests.bench.figures import BASELINE, Figures, Summary, TargetResult, table
from tests.bench.subjects import HANDLERS, IMAGE, Site, site
from tests.kit import images
from tests.kit.registry import HOST


@dataclass(frozen=True)
class Scale:
    """How much is measured. Figures that take seconds get fewer rounds."""

    rounds: int = 20
    slow_rounds: int = 5
    crowd: int = 20
    containers: int = 500
    payload_mib: int = 200
    payload_files: int = 20_000
    line_rounds: int = 3
    line_mib: int = 1024
    log_mib: int = 200
    idle_pods: int = 5
    records: int = 100
    kept_pods: int = 3
    tree_files: int = 20_000
    synced_writes: int = 1000
    stream_mib: int = 256


QUICK = Scale(
    rounds=2, slow_rounds=1, crowd=3, containers=20, payload_mib=8, payload_files=800, line_rounds=1,
    line_mib=48, log_mib=10, idle_pods=2, records=20, kept_pods=1, tree_files=300, synced_writes=50,
    stream_mib=8,
)  # fmt: skip

PARTS: dict[str, Callable[[Site, Figures, Scale], None]] = {
    "pods": lambda site, figures, scale: pods.lifecycles(site, figures, scale.rounds),
    "crowd": lambda site, figures, scale: pods.crowds(site, figures, scale.slow_rounds, scale.crowd),
    "pull": lambda site, figures, scale: things.pulls(
        site, figures, scale.slow_rounds, scale.payload_mib, scale.payload_files
    ),
    "line": lambda site, figures, scale: slow_line.pulls(site, figures, scale.line_rounds, scale.line_mib),
    "lists": lambda site, figures, scale: things.lists(site, figures, scale.rounds, scale.containers),
    "logs": lambda site, figures, scale: things.logs(site, figures, scale.slow_rounds, scale.log_mib),
    "files": lambda site, figures, scale: files.files(
        site, figures, scale.slow_rounds, scale.tree_files, scale.synced_writes, scale.stream_mib
    ),
    "mounts": lambda site, figures, scale: files.mounts(site, figures, scale.rounds),
    "memory": lambda site, figures, scale: memory.idle_pods(site, figures, scale.idle_pods),
    "restart": lambda site, figures, scale: restart.restarts(
        site, figures, scale.slow_rounds, scale.records, scale.kept_pods
    ),
}


class Document(TypedDict):
    """What `--json` writes."""

    host: dict[str, object]
    scale: dict[str, int]
    figures: dict[str, Summary]
    ratios: dict[str, float]
    targets: list[TargetResult]


def main() -> int:
    """Run the bench and return the exit status: 130 when it was interrupted."""
    options = parse()
    scale = QUICK if options.quick else Scale()
    if options.rounds:
        scale = replace(scale, rounds=options.rounds, slow_rounds=max(1, options.rounds // 4))
    handlers = [each for each in HANDLERS if options.handler in (None, each.name)]
    figures = Figures()
    with site([options.only] if options.only else [BASELINE, "husk"], handlers) as here:
        here.registry.push("husk/busybox", "1", images.busybox())
        here.registry.push("pause", "1", images.pause())
        for subject in here.mains:
            subject.cri.pull(IMAGE)
            subject.cri.pull(f"{HOST}/pause:1")
        versions = here.versions()
        whole = measure(here, options.part or list(PARTS), figures, scale)
    husk = [f"husk {each.name}" for each in handlers] if options.only != BASELINE else []
    print(table(figures, husk))
    if options.json:
        options.json.write_text(json.dumps(document(figures, husk, versions, scale), indent=1) + "\n")
    return 0 if whole else 130


def measure(site: Site, parts: Sequence[str], figures: Figures, scale: Scale) -> bool:
    """Measure the parts and return whether all were measured. Ctrl-C keeps the samples taken before it."""
    try:
        for part in parts:
            print(f"measuring: {part}", file=sys.stderr, flush=True)
            PARTS[part](site, figures, scale)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return False
    return True


def document(figures: Figures, husk: list[str], versions: dict[str, str], scale: Scale) -> Document:
    """Return everything measured, with the host and the scale, for JSON."""
    host: dict[str, object] = {
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "kvm": Path("/dev/kvm").exists(),
        "runtimes": versions,
    }
    return Document(
        host=host,
        scale=vars(scale),
        figures=figures.summary(),
        ratios=figures.ratios(husk),
        targets=figures.check_targets(husk),
    )


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="tests/bench/run", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, help="of each call (20); a quarter of it for figures that take seconds"
    )
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this one; may be repeated")
    parser.add_argument(
        "--handler", choices=[each.name for each in HANDLERS], help="only this handler of Husk"
    )
    parser.add_argument("--only", choices=[BASELINE, "husk"], help="one runtime, not both")
    parser.add_argument(
        "--quick", action="store_true", help="a few rounds of everything: does the bench work?"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
