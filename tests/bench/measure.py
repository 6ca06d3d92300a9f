"""Durations of the lifecycle calls, gathered over rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from tests.kit.cri import Cri, Pod
from tests.kit.registry import HOST

IMAGE = f"{HOST}/husk/busybox:1"
PAYLOAD = f"{HOST}/husk/payload:1"
SLEEP = ("sleep", "86400")


class Runtime(Protocol):
    name: str
    cri: Cri

    @property
    def pid(self) -> int: ...

    def version(self) -> str: ...

    def close(self) -> None: ...


@dataclass
class Timings:
    """Seconds by call."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def of(self, call: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds.setdefault(call, []).append(time.perf_counter() - begin)

    def summary(self) -> dict[str, dict[str, float]]:
        return {
            call: {"n": len(each), "p50_ms": percentile(each, 0.5), "p95_ms": percentile(each, 0.95)}
            for call, each in self.seconds.items()
        }


def percentile(seconds: list[float], share: float) -> float:
    """Nearest rank, in milliseconds."""
    ordered = sorted(seconds)
    return round(1000 * ordered[max(0, math.ceil(share * len(ordered)) - 1)], 2)


def lifecycle_round(runtime: Runtime, number: int, timings: Timings, execs: int = 5) -> None:
    """One pod from nothing to nothing."""
    cri = runtime.cri
    with timings.of("RunPodSandbox"):
        pod = cri.run_pod(f"bench-{number}")
    with timings.of("CreateContainer"):
        container = cri.create(pod, IMAGE, SLEEP, name="main")
    with timings.of("StartContainer"):
        cri.start(container)
    for _ in range(execs):
        with timings.of("ExecSync"):
            assert cri.exec(container, "true").code == 0
        with timings.of("ContainerStatus"):
            cri.status(container)
    with timings.of("StopContainer"):
        cri.stop(container, timeout=0)
    with timings.of("RemoveContainer"):
        cri.remove(container)
    with timings.of("StopPodSandbox"):
        cri.stop_pod(pod)
    with timings.of("RemovePodSandbox"):
        cri.remove_pod(pod)


def pull_round(runtime: Runtime, timings: Timings) -> None:
    """Both images anew; the small one is what a pod needs, the large one gives MB/s."""
    cri = runtime.cri
    for image, call in ((IMAGE, "PullImage small"), (PAYLOAD, "PullImage large")):
        with timings.of(call):
            cri.pull(image)
        with timings.of("RemoveImage"):
            cri.call("RemoveImage", image={"image": image})


def list_rounds(runtime: Runtime, pod: Pod, containers: int, rounds: int, timings: Timings) -> None:
    """ListContainers and ListContainerStats over `containers` containers of one pod.

    Only one is started: the others stay created, so what is measured is the daemon and not the host.
    """
    cri = runtime.cri
    have = len(cri.call("ListContainers").containers)
    for number in range(have, containers):
        cri.create(pod, IMAGE, SLEEP, name=f"list-{number}")
    for _ in range(rounds):
        with timings.of(f"ListContainers {containers}"):
            found = cri.call("ListContainers").containers
        assert len(found) == containers
        with timings.of(f"ListPodSandbox (with {containers})"):
            cri.call("ListPodSandbox")
