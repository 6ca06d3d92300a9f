"""What the daemon tells about itself: logs and metrics.

Metrics live in a registry of their own and are served by a thread, so neither a scrape nor a slow
scraper holds up a call. What a scrape asks of the daemon (states, usage) must therefore be safe to
call from that thread and answer from memory or from files: never wait for the event loop.
Cardinality is bounded by the methods of the CRI, the states, and the pods of the node.
"""

from __future__ import annotations

import contextvars
import http.server
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Protocol

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from sandbox.spec import Value

log = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------- logs

_pod: contextvars.ContextVar[str] = contextvars.ContextVar("pod", default="")


def note_pod(pod: str) -> None:
    """Name the pod that the current task works for; tasks begun by it inherit the name."""
    _pod.set(pod)


def current_pod() -> str:
    return _pod.get()


class JsonFormatter(logging.Formatter):
    """One JSON object a line. `extra={"fields": {...}}` adds keys."""

    def format(self, record: logging.LogRecord) -> str:
        entry = _entry(record) | {"message": record.getMessage()} | dict(_fields(record))
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """For people: time, level, logger, pod, message, then key=value."""

    def format(self, record: logging.LogRecord) -> str:
        entry = _entry(record)
        pod = f" [{entry['pod']}]" if "pod" in entry else ""
        fields = "".join(f" {key}={_word(value)}" for key, value in _fields(record).items())
        line = f"{entry['time']} {record.levelname:<7} {record.name}{pod}: {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _entry(record: logging.LogRecord) -> dict[str, object]:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    entry: dict[str, object] = {
        "time": f"{seconds}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "logger": record.name,
    }
    return entry | {"pod": current_pod()} if current_pod() else entry


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields: Mapping[str, object] = getattr(record, "fields", {})
    return fields


def _word(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if not text or set(text) & set(' "\n=') else text


def setup_logging(level: str, format: str, stream: IO[str] | None = None) -> None:
    """Send everything to `stream` (standard error). Libraries speak from WARNING on."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("asyncio", "httpx", "httpcore", "qemu", "pyroute2", "grpc"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


# ------------------------------------------------------------------------------------- metrics


class SandboxUsage(Value, frozen=True, kw_only=True):
    """What one pod costs the host, by the part that costs it."""

    namespace: str
    pod: str
    cpu_seconds: Mapping[str, float]
    memory_bytes: Mapping[str, int]


class LimiterCount(Protocol):
    """A stage of a start that only so many pods may be in at once."""

    @property
    def name(self) -> str: ...
    @property
    def active(self) -> int: ...
    @property
    def waiting(self) -> int: ...


class Sources(Value, frozen=True, kw_only=True):
    """Asked at each scrape, from the scrape's thread (see above)."""

    sandboxes: Callable[[], Mapping[str, int]] = dict  # by state
    isolation: Callable[[], Mapping[str, int]] = dict  # of the sandboxes that are ready
    containers: Callable[[], Mapping[str, int]] = dict  # by state
    usage: Callable[[], Sequence[SandboxUsage]] = tuple
    stages: Callable[[], Sequence[LimiterCount]] = tuple


@dataclass(frozen=True, slots=True)
class Pull:
    """A pull that is under way."""

    count: Callable[[int], None]  # bytes, as they come


class Metrics:
    """Every metric of the daemon. The methods are for the event loop's thread."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        self._calls = Histogram(
            "husk_cri_call_seconds",
            "How long CRI calls took, by method and gRPC code.",
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
        self._running = Gauge(
            "husk_cri_calls_running", "CRI calls that are being served.", registry=self.registry
        )
        self._phases = Histogram(
            "husk_sandbox_phase_seconds",
            "How long the phases of starting a sandbox took.",
            ["phase"],
            registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 8, 13, 21, 60, 120),
        )
        self._pulls = Histogram(
            "husk_image_pull_seconds",
            "How long pulling an image took, by outcome.",
            ["outcome"],
            registry=self.registry,
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800),
        )
        self._pulled = Counter("husk_image_pull_bytes", "Bytes that registries sent.", registry=self.registry)
        Gauge("husk_build_info", "Always 1.", ["version"], registry=self.registry).labels(version).set(1)
        ProcessCollector(registry=self.registry)

    def watch(self, sources: Sources) -> None:
        """Ask these at each scrape. Called once, when the daemon has its objects."""
        self.registry.register(_FromSources(sources))

    def call_begun(self) -> None:
        self._running.inc()

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        self._running.dec()
        self._calls.labels(method, code).observe(seconds)

    def phase(self, name: str, seconds: float) -> None:
        self._phases.labels(name).observe(seconds)

    @contextmanager
    def pulling(self) -> Iterator[Pull]:
        """Around the pull of an image: its time and, by what it `count`s, its bytes."""
        began, outcome = time.monotonic(), "failed"
        try:
            yield Pull(self._pulled.inc)
            outcome = "ok"
        finally:
            self._pulls.labels(outcome).observe(time.monotonic() - began)


class _FromSources(Collector):
    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def describe(self) -> list[Metric]:
        return []  # registration must not ask the sources

    def collect(self) -> Iterator[Metric]:
        yield _counts("husk_sandboxes", "Pod sandboxes by state.", "state", self._sources.sandboxes)
        yield _counts(
            "husk_ready_sandboxes",
            "Pod sandboxes that are ready, by what keeps them from the node.",
            "isolation",
            self._sources.isolation,
        )
        yield _counts("husk_containers", "Containers by state.", "state", self._sources.containers)
        labels = ["namespace", "pod", "part"]
        cpu = CounterMetricFamily(
            "husk_sandbox_cpu_seconds",
            "CPU time on the host: of the VMM with its guest and of virtiofsd, or of a pod's processes.",
            labels=labels,
        )
        memory = GaugeMetricFamily(
            "husk_sandbox_memory_bytes",
            "Memory of the host: the guest's and beyond it, or that of a pod's processes.",
            labels=labels,
        )
        for usage in self._sources.usage():
            for part, seconds in usage.cpu_seconds.items():
                cpu.add_metric([usage.namespace, usage.pod, part], seconds)
            for part, size in usage.memory_bytes.items():
                memory.add_metric([usage.namespace, usage.pod, part], size)
        yield cpu
        yield memory
        places = GaugeMetricFamily(
            "husk_stages",
            "Pods in a stage of their start, and layers in one of a pull: in it, or in the queue for it.",
            labels=["stage", "state"],
        )
        for stage in self._sources.stages():
            places.add_metric([stage.name, "active"], stage.active)
            places.add_metric([stage.name, "waiting"], stage.waiting)
        yield places


def _counts(name: str, help: str, label: str, source: Callable[[], Mapping[str, int]]) -> Metric:
    family = GaugeMetricFamily(name, help, labels=[label])
    for value, count in source().items():
        family.add_metric([value], count)
    return family


class MetricsNotServed(Exception):
    """The address of /metrics cannot be had."""

    def __init__(self, address: str, port: int, problem: str) -> None:
        advice = "choose another metrics.port in the configuration, or 0 for none"
        super().__init__(f"metrics cannot be served on {address}:{port}: {problem}; {advice}")
        self.address = address
        self.port = port
        self.problem = problem


class MetricsServer:
    """/metrics and /healthz over HTTP, from threads of their own, from `start` until `close`.

    The constructor takes the port, and raises MetricsNotServed; who connects before `start` waits.
    """

    def __init__(self, metrics: Metrics, address: str, port: int) -> None:
        try:
            self._server = _HttpServer((address, port), _handler_for(metrics))
        except OSError as error:
            raise MetricsNotServed(address, port, error.strerror or str(error)) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def port(self) -> int:
        """The port in use, also when the system was asked to choose it (0)."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join(timeout=5)
        self._server.server_close()


class _HttpServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a scraper's connection broke", exc_info=True)


def _handler_for(metrics: Metrics) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10  # an idle or stuck client gives its thread back

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._answer(200, content_type, encode(metrics.registry))
            elif path == "/healthz":
                self._answer(200, "text/plain", b"ok\n")
            else:
                self._answer(404, "text/plain", b"here are /metrics and /healthz\n")

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            log.debug(format, *args)

    return Handler


def as_json(value: object) -> str:
    """For the `info` maps of verbose answers: whatever msgspec knows, else its text."""
    return msgspec.json.encode(value, enc_hook=str).decode()
