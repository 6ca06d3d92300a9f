"""`tests/bench/run [--rounds N] [--json FILE] [--only NAME]`: measure, print a table, write JSON.

Each runtime works alone in a namespace of its own, one after the other, so that neither disturbs the
other's figures; registry, images and CNI configuration are the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.containerd import Containerd
from tests.bench.measure import (
    IMAGE,
    SLEEP,
    Runtime,
    Timings,
    lifecycle_round,
    list_rounds,
    percentile,
    pull_round,
)
from tests.bench.memory import pod_memory, rss_mib
from tests.kit import cni, images
from tests.kit.daemon import Daemon
from tests.kit.namespace import Namespace
from tests.kit.registry import HOST, Registry
from tests.kit.scratch import scratch_dir, scratch_root

PAYLOAD_MIB = 64


@contextmanager
def site() -> Iterator[tuple[Namespace, Path, Path]]:
    """A namespace with a filled registry; yields it, the CNI directory and the mirrors directory."""
    with Namespace(scratch_root()) as namespace:
        directory = scratch_dir("bench")
        registry = Registry(namespace)
        try:
            for name, image in (
                ("husk/busybox", images.busybox()),
                ("husk/payload", images.payload(PAYLOAD_MIB)),
                ("pause", images.pause()),
            ):
                registry.push(name, "1", image)
            yield (
                namespace,
                cni.write_bridge(directory / "cni", directory / "leases"),
                registry.write_mirrors(directory / "mirrors"),
            )
        finally:
            registry.close()


def start_containerd(namespace: Namespace, cni_directory: Path, mirrors: Path) -> Runtime:
    return Containerd(namespace, cni_directory, mirrors)


def start_husk(namespace: Namespace, cni_directory: Path, mirrors: Path) -> Runtime:
    daemon = Daemon(namespace, cni_directory, mirrors)
    daemon.start()
    return daemon


RUNTIMES: dict[str, Callable[[Namespace, Path, Path], Runtime]] = {
    "containerd": start_containerd,
    "husk": start_husk,
}


def measure(name: str, rounds: int, many: int) -> dict[str, Any]:
    """Every figure of one runtime."""
    timings = Timings()
    with site() as (namespace, cni_directory, mirrors):
        runtime = RUNTIMES[name](namespace, cni_directory, mirrors)
        try:
            runtime.cri.pull(f"{HOST}/pause:1")
            for _ in range(max(2, rounds // 4)):
                pull_round(runtime, timings)
            runtime.cri.pull(IMAGE)
            lifecycle_round(runtime, 0, Timings())  # what only the first pod pays is not counted
            for number in range(1, rounds + 1):
                lifecycle_round(runtime, number, timings)
            return {
                "version": runtime.version(),
                "calls": timings.summary(),
                "pull_unpack_mib_per_s": pull_rate(timings),
                **standing_pod(runtime, rounds, many, timings),
            } | {"calls": timings.summary()}
        finally:
            runtime.close()


def pull_rate(timings: Timings) -> float:
    """Unpacked MiB per second over the large image."""
    return round(PAYLOAD_MIB * 1000 / percentile(timings.seconds["PullImage large"], 0.5), 1)


def standing_pod(runtime: Runtime, rounds: int, many: int, timings: Timings) -> dict[str, Any]:
    """Figures that need a pod standing still: memory, boot phases, lists."""
    cri = runtime.cri
    pod = cri.run_pod("bench-standing")
    cri.run(pod, IMAGE, SLEEP, name="list-0")
    result: dict[str, Any] = {
        "pod_memory": pod_memory(pod.id),
        "boot_phases": boot_phases(cri.pod_status(pod, verbose=True).info),
    }
    list_rounds(runtime, pod, 1, max(5, rounds), timings)
    list_rounds(runtime, pod, many, max(5, rounds), timings)
    result["daemon_rss_mib"] = rss_mib(runtime.pid)
    cri.stop_pod(pod)
    cri.remove_pod(pod)
    return result


def boot_phases(info: Any) -> list[dict[str, Any]]:
    """`phases` of a pod's verbose status, as Husk gives them; empty for others."""
    try:
        phases = json.loads(info["info"]).get("phases", [])
    except (KeyError, ValueError):
        return []
    return list(phases)


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Husk's median over containerd's, by call: below 1 means that Husk is faster."""
    if not {"husk", "containerd"} <= results.keys():
        return {}
    ours, theirs = results["husk"]["calls"], results["containerd"]["calls"]
    return {call: round(ours[call]["p50_ms"] / theirs[call]["p50_ms"], 2) for call in ours if call in theirs}


def table(results: dict[str, Any]) -> str:
    names = list(results)
    calls = list(dict.fromkeys(call for name in names for call in results[name]["calls"]))
    factors = ratios(results)
    lines = [f"{'p50 / p95 in ms':26}" + "".join(f"{name:>20}" for name in names) + f"{'ratio':>8}"]
    for call in calls:
        cells = []
        for name in names:
            each = results[name]["calls"].get(call)
            cells.append(f"{each['p50_ms']:.1f} / {each['p95_ms']:.1f}" if each else "-")
        factor = f"{factors[call]:.2f}" if call in factors else ""
        lines.append(f"{call:26}" + "".join(f"{cell:>20}" for cell in cells) + f"{factor:>8}")
    for key, label in (
        ("pull_unpack_mib_per_s", "pull + unpack, MiB/s"),
        ("daemon_rss_mib", "daemon RSS, MiB"),
    ):
        lines.append(f"{label:26}" + "".join(f"{results[name][key]:>20}" for name in names))
    for name in names:
        lines += [f"{name} pod memory, {key}: {value}" for key, value in results[name]["pod_memory"].items()]
        for phase in results[name]["boot_phases"]:
            spent = 1000 * (phase["endSeconds"] - phase["beginSeconds"])
            lines.append(f"{name} boot phase {phase['name']}: {spent:.0f} ms")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/bench/run", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="pods measured with each runtime")
    parser.add_argument("--many", type=int, default=100, help="containers in the long lists")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--only", choices=list(RUNTIMES), help="one runtime, not both")
    wish = parser.parse_args()
    results = {name: measure(name, wish.rounds, wish.many) for name in RUNTIMES if wish.only in (None, name)}
    print(table(results))
    if wish.json:
        host = {"kernel": platform.release(), "kvm": Path("/dev/kvm").exists()}
        document = {"host": host, "rounds": wish.rounds, "runtimes": results, "ratios": ratios(results)}
        wish.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
