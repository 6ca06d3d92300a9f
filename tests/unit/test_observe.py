"""Logs and metrics: what is written, and that a scrape is served beside the loop."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from cri.log_format import set_pod_context, setup_logging
from cri.metrics import Metrics, SandboxUsage, Sources
from cri.metrics_server import MetricsNotServed, MetricsServer
from sandbox.host.limiter import Limiter


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def written(format: str, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    setup_logging(level, format, stream)
    return stream


def test_text_for_people() -> None:
    stream = written("text")
    logging.getLogger("cri").info(
        "RunPodSandbox", extra={"fields": {"code": "OK", "seconds": 1.25, "why": "a b"}}
    )
    line = stream.getvalue()
    assert line.endswith('INFO    cri: RunPodSandbox code=OK seconds=1.250 why="a b"\n')
    assert line[10] == "T"


def test_json_for_programs() -> None:
    stream = written("json")
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("x").exception("it %s", "broke", extra={"fields": {"phase": "vm"}})
    entry = json.loads(stream.getvalue())
    assert (entry["level"], entry["logger"], entry["message"], entry["phase"]) == (
        "error",
        "x",
        "it broke",
        "vm",
    )
    assert "ValueError: bad" in entry["traceback"]


def test_a_log_line_is_one_line_whatever_is_in_it() -> None:
    stream = written("text")
    logging.getLogger("x").info("failed", extra={"fields": {"error": "a\nb"}})
    assert stream.getvalue().count("\n") == 1


async def test_the_pod_follows_the_task_and_its_children() -> None:
    stream = written("json")
    log = logging.getLogger("x")

    async def call(pod: str) -> None:
        set_pod_context(pod)
        await asyncio.sleep(0)
        await asyncio.create_task(below())

    async def below() -> None:
        log.info("here")

    await asyncio.gather(asyncio.create_task(call("one")), asyncio.create_task(call("two")))
    log.info("outside")
    entries = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert sorted(entry["pod"] for entry in entries if entry["message"] == "here") == ["one", "two"]
    assert "pod" not in entries[-1]


def test_levels() -> None:
    stream = written("text", "warning")
    logging.getLogger("cri").info("quiet")
    logging.getLogger("httpx2").info("library")
    assert stream.getvalue() == ""


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_calls_are_counted_by_method_and_code() -> None:
    metrics = Metrics("1")
    metrics.call_begun()
    assert sample(metrics, "husk_cri_calls_running") == 1
    metrics.call_ended("Version", "OK", 0.003)
    assert sample(metrics, "husk_cri_calls_running") == 0
    assert sample(metrics, "husk_cri_call_seconds_count", method="Version", code="OK") == 1
    assert sample(metrics, "husk_cri_call_seconds_bucket", method="Version", code="OK", le="0.005") == 1
    assert sample(metrics, "husk_cri_call_seconds_bucket", method="Version", code="OK", le="0.0025") == 0


def test_boot_phases_and_pulls() -> None:
    metrics = Metrics("1")
    metrics.phase("vm", 1.5)
    with metrics.pulling() as pull:
        pull.count(600)
        pull.count(400)
    with pytest.raises(ValueError), metrics.pulling():
        raise ValueError
    assert sample(metrics, "husk_sandbox_phase_seconds_sum", phase="vm") == 1.5
    assert sample(metrics, "husk_image_pull_seconds_count", outcome="ok") == 1
    assert sample(metrics, "husk_image_pull_seconds_count", outcome="failed") == 1
    assert sample(metrics, "husk_image_pull_bytes_total") == 1000


def test_sources_are_asked_at_each_scrape() -> None:
    metrics = Metrics("1")
    states = {"ready": 1}
    usage = SandboxUsage(
        namespace="default", pod="web", cpu_seconds={"vmm": 1.5}, memory_bytes={"guest": 8192, "vmm": 4096}
    )
    metrics.watch(
        Sources(
            sandboxes=lambda: states,
            containers=lambda: {"running": 2},
            quarantined=lambda: {"pod": 1},
            usage=lambda: [usage],
        )
    )
    assert sample(metrics, "husk_quarantined_records", kind="pod") == 1
    assert sample(metrics, "husk_sandboxes", state="ready") == 1
    states["ready"] = 3
    assert sample(metrics, "husk_sandboxes", state="ready") == 3
    assert sample(metrics, "husk_containers", state="running") == 2
    labels = {"namespace": "default", "pod": "web"}
    assert sample(metrics, "husk_sandbox_cpu_seconds_total", **labels, part="vmm") == 1.5
    assert sample(metrics, "husk_sandbox_memory_bytes", **labels, part="guest") == 8192
    assert sample(metrics, "husk_sandbox_memory_bytes", **labels, part="vmm") == 4096


async def test_stages_show_who_is_in_and_who_waits() -> None:
    metrics, stage, places = Metrics("1"), Limiter("vm", 1), Limiter("unpack", 2)
    metrics.watch(Sources(limiters=lambda: (stage, places)))
    async with stage.slot(), places.slot():
        second = asyncio.create_task(enter(stage))
        await asyncio.sleep(0)
        assert sample(metrics, "husk_stages", stage="vm", state="active") == 1
        assert sample(metrics, "husk_stages", stage="vm", state="waiting") == 1
        assert sample(metrics, "husk_stages", stage="unpack", state="active") == 1
    await second
    assert sample(metrics, "husk_stages", stage="vm", state="active") == 0


async def enter(stage: Limiter) -> None:
    async with stage.slot():
        pass


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("1.2.3")


@pytest.fixture
def server(metrics: Metrics) -> Iterator[MetricsServer]:
    server = MetricsServer(metrics, "127.0.0.1", 0)
    server.start()
    yield server
    server.close()


def test_metrics_over_http(server: MetricsServer) -> None:
    status, text = get(server.port, "/metrics")
    assert status == 200
    assert 'husk_build_info{version="1.2.3"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    assert get(server.port, "/healthz") == (200, "ok\n")
    assert get(server.port, "/else")[0] == 404


def test_a_client_that_says_nothing_holds_up_nobody(server: MetricsServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)):
        assert get(server.port, "/metrics")[0] == 200


async def test_a_slow_scrape_does_not_stop_the_loop(metrics: Metrics, server: MetricsServer) -> None:
    scraping, go_on = threading.Event(), threading.Event()

    def slow() -> list[SandboxUsage]:
        scraping.set()
        assert go_on.wait(10)
        return []

    metrics.watch(Sources(usage=slow))
    scrape = asyncio.create_task(asyncio.to_thread(get, server.port, "/metrics"))
    while not scraping.is_set():
        await asyncio.sleep(0.001)
    for _ in range(100):  # the loop turns while the scrape waits
        await asyncio.sleep(0)
    assert not scrape.done()
    go_on.set()
    assert (await scrape)[0] == 200


def test_an_address_in_use_is_told_with_advice(server: MetricsServer) -> None:
    with pytest.raises(MetricsNotServed, match=r"metrics\.port"):
        MetricsServer(Metrics("1"), "127.0.0.1", server.port)


def test_the_port_is_free_again_after_closing(metrics: Metrics) -> None:
    first = MetricsServer(metrics, "127.0.0.1", 0)
    port = first.port
    first.close()  # never started
    second = MetricsServer(metrics, "127.0.0.1", port)
    second.start()
    assert get(port, "/healthz")[0] == 200
    second.close()
