"""The daemon's metrics: what is counted, and what each scrape reads from the daemon.

They are in a separate registry. A scrape runs in a thread, so `Sources` must be safe to call from
there and answer from memory or from files: never wait for the event loop. The number of series is bounded
by the methods of the CRI, the states, and the pods of the node.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from sandbox.spec import Value


class SandboxUsage(Value, frozen=True, kw_only=True):
    """CPU time and memory that one pod costs the host, by part ("vmm", "virtiofsd", "processes" ...)."""

    namespace: str
    pod: str
    cpu_seconds: Mapping[str, float]
    memory_bytes: Mapping[str, int]


class LimiterCount(Protocol):
    """A stage with a bounded number of places: how many hold one, and how many wait."""

    @property
    def name(self) -> str: ...
    @property
    def active(self) -> int: ...
    @property
    def waiting(self) -> int: ...


class Sources(Value, frozen=True, kw_only=True):
    """Functions that each scrape calls, in the scrape's thread (see the module)."""

    sandboxes: Callable[[], Mapping[str, int]] = dict  # by state
    isolation: Callable[[], Mapping[str, int]] = dict  # ready sandboxes by isolation
    emulated: Callable[[], int] = int  # ready sandboxes in VMs that are emulated
    containers: Callable[[], Mapping[str, int]] = dict  # by state
    quarantined: Callable[[], Mapping[str, int]] = dict  # records, by kind: pod, container or image
    usage: Callable[[], Sequence[SandboxUsage]] = tuple
    limiters: Callable[[], Sequence[LimiterCount]] = tuple


@dataclass(frozen=True, slots=True)
class Pull:
    """A running pull of an image."""

    count: Callable[[int], None]  # adds received bytes


class Metrics:
    """Every metric of the daemon. Call the methods from the event loop's thread only."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        self._calls = Histogram(
            "husk_cri_call_seconds",
            "Duration of CRI calls in seconds, by method and gRPC status code.",
            ["method", "code"],
            registry=self.registry,
            buckets=(
                0.001,
                0.0025,
                0.005,
                0.01,
                0.025,
                0.05,
                0.1,
                0.25,
                0.5,
                1,
                2.5,
                5,
                10,
                30,
                60,
                120,
                240,
            ),
        )
        self._call_histograms: dict[tuple[str, str], Histogram] = {}  # `labels` costs more than `observe`
        self._running = Gauge("husk_cri_calls_running", "CRI calls in flight.", registry=self.registry)
        self._phases = Histogram(
            "husk_sandbox_phase_seconds",
            "Duration in seconds of each phase of a pod sandbox's start, by phase.",
            ["phase"],
            registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 8, 13, 21, 60, 120),
        )
        self._pulls = Histogram(
            "husk_image_pull_seconds",
            "Duration of image pulls in seconds, by outcome (ok, failed).",
            ["outcome"],
            registry=self.registry,
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800),
        )
        self._pulling = Gauge(
            "husk_image_pulls_running", "Pulls of images under way.", registry=self.registry
        )
        self._pulled = Counter(
            "husk_image_pull_bytes", "Bytes received from image registries.", registry=self.registry
        )
        Gauge(
            "husk_build_info",
            "Constant 1, labelled with the version of Husk.",
            ["version"],
            registry=self.registry,
        ).labels(version).set(1)
        ProcessCollector(registry=self.registry)

    def watch(self, sources: Sources) -> None:
        """Call `sources` at each scrape. Once, after recovery, when the records are complete."""
        self.registry.register(_FromSources(sources))

    def call_begun(self) -> None:
        """Count a CRI call as in flight until `call_ended`."""
        self._running.inc()

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        """Record the duration of a call. `code` is the name of its gRPC status."""
        self._running.dec()
        histogram = self._call_histograms.get((method, code))
        if histogram is None:
            histogram = self._call_histograms[method, code] = self._calls.labels(method, code)
        histogram.observe(seconds)

    def phase(self, name: str, seconds: float) -> None:
        """Record the duration of one phase of a sandbox's start; `name` must come from a bounded set."""
        self._phases.labels(name).observe(seconds)

    @contextmanager
    def pulling(self) -> Iterator[Pull]:
        """Measure a pull: its duration, its outcome, and the bytes given to `Pull.count`."""
        began, outcome = time.monotonic(), "failed"
        self._pulling.inc()
        try:
            yield Pull(self._pulled.inc)
            outcome = "ok"
        finally:
            self._pulling.dec()
            self._pulls.labels(outcome).observe(time.monotonic() - began)


class _FromSources(Collector):
    """The families whose values are read at each scrape."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def describe(self) -> list[Metric]:
        return []  # without it, registration would call `collect`

    def collect(self) -> Iterator[Metric]:
        yield _counts("husk_sandboxes", "Pod sandboxes by state.", "state", self._sources.sandboxes)
        yield _counts(
            "husk_ready_sandboxes",
            "Ready pod sandboxes by isolation: vm, or process for pods without a VM.",
            "isolation",
            self._sources.isolation,
        )
        yield GaugeMetricFamily(
            "husk_ready_emulated_sandboxes",
            "Ready pod sandboxes in VMs that are emulated, which QEMU does not promise to confine.",
            value=self._sources.emulated(),
        )
        yield _counts("husk_containers", "Containers by state.", "state", self._sources.containers)
        yield _counts(
            "husk_quarantined_records",
            "Records of pods, containers and images that cannot be used, by kind; they are left alone.",
            "kind",
            self._sources.quarantined,
        )
        labels = ["namespace", "pod", "part"]
        cpu = CounterMetricFamily(
            "husk_sandbox_cpu_seconds",
            "CPU seconds used on the host, by part: vmm (guest included) and virtiofsd, or processes.",
            labels=labels,
        )
        memory = GaugeMetricFamily(
            "husk_sandbox_memory_bytes",
            "Host memory in bytes, by part: guest RAM, vmm and virtiofsd beyond it, or processes.",
            labels=labels,
        )
        for usage in self._sources.usage():
            for part, seconds in usage.cpu_seconds.items():
                cpu.add_metric([usage.namespace, usage.pod, part], seconds)
            for part, size in usage.memory_bytes.items():
                memory.add_metric([usage.namespace, usage.pod, part], size)
        yield cpu
        yield memory
        stages = GaugeMetricFamily(
            "husk_stages",
            "Pods (vm, network) and image layers (download, unpack) in a stage of limited concurrency, "
            "by state: active, or waiting in its queue.",
            labels=["stage", "state"],
        )
        for limiter in self._sources.limiters():
            stages.add_metric([limiter.name, "active"], limiter.active)
            stages.add_metric([limiter.name, "waiting"], limiter.waiting)
        yield stages


def _counts(name: str, help: str, label: str, source: Callable[[], Mapping[str, int]]) -> Metric:
    family = GaugeMetricFamily(name, help, labels=[label])
    for value, count in source().items():
        family.add_metric([value], count)
    return family
