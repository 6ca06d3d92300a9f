"""Metrics: what is counted, what each scrape reads, and the HTTP server of /metrics."""

from __future__ import annotations

import asyncio
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cri import metrics_server
from cri.metrics import Metrics, SandboxUsage, Sources
from cri.metrics_server import MetricsNotServed, MetricsServer
from sandbox.host.limiter import Limiter
from tests.kit.eventually import eventually, eventually_sync


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


def test_phases_and_pulls_are_measured() -> None:
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


def test_sources_are_read_at_each_scrape() -> None:
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


async def test_limiters_show_active_and_waiting() -> None:
    metrics, starts, unpacks = Metrics("1"), Limiter("vm", 1), Limiter("unpack", 2)
    metrics.watch(Sources(limiters=lambda: (starts, unpacks)))
    async with starts.slot(), unpacks.slot():
        second = asyncio.create_task(enter(starts))
        await asyncio.sleep(0)
        assert sample(metrics, "husk_stages", stage="vm", state="active") == 1
        assert sample(metrics, "husk_stages", stage="vm", state="waiting") == 1
        assert sample(metrics, "husk_stages", stage="unpack", state="active") == 1
    await second
    assert sample(metrics, "husk_stages", stage="vm", state="active") == 0


async def enter(limiter: Limiter) -> None:
    async with limiter.slot():
        pass


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status, response.read().decode()
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


def test_server_answers_metrics_healthz_and_not_found(server: MetricsServer) -> None:
    status, text = get(server.port, "/metrics")
    assert status == 200
    assert 'husk_build_info{version="1.2.3"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    assert get(server.port, "/healthz") == (200, "ok\n")
    assert get(server.port, "/else")[0] == 404


def test_silent_client_does_not_block_others(server: MetricsServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)):
        assert get(server.port, "/metrics")[0] == 200


async def test_slow_scrape_does_not_block_the_event_loop(metrics: Metrics, server: MetricsServer) -> None:
    scraping, go_on = threading.Event(), threading.Event()

    def slow() -> list[SandboxUsage]:
        scraping.set()
        assert go_on.wait(10)
        return []

    metrics.watch(Sources(usage=slow))
    scrape = asyncio.create_task(asyncio.to_thread(get, server.port, "/metrics"))
    await eventually(scraping.is_set)
    for _ in range(100):  # the event loop runs while the scrape waits
        await asyncio.sleep(0)
    assert not scrape.done()
    go_on.set()
    assert (await scrape)[0] == 200


def test_address_in_use_is_an_error_with_a_remedy(server: MetricsServer) -> None:
    with pytest.raises(MetricsNotServed, match=r"metrics\.port"):
        MetricsServer(Metrics("1"), "127.0.0.1", server.port)


def test_port_is_free_after_close(metrics: Metrics) -> None:
    first = MetricsServer(metrics, "127.0.0.1", 0)
    port = first.port
    first.close()  # never started
    second = MetricsServer(metrics, "127.0.0.1", port)
    second.start()
    assert get(port, "/healthz")[0] == 200
    second.close()


class Counting:
    """A source that counts how often it is read, and may wait in it."""

    def __init__(self) -> None:
        self.reads = 0
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self) -> list[SandboxUsage]:
        self.reads += 1
        assert self.go_on.wait(10)
        return []


def test_concurrent_and_repeated_scrapes_share_one_result(metrics: Metrics, server: MetricsServer) -> None:
    usage = Counting()
    usage.go_on.clear()
    metrics.watch(Sources(usage=usage))
    with ThreadPoolExecutor(4) as clients:
        scrapes = [clients.submit(get, server.port, "/metrics") for _ in range(4)]
        eventually_sync(lambda: usage.reads == 1)
        usage.go_on.set()
        assert [scrape.result()[0] for scrape in scrapes] == [200] * 4
    assert get(server.port, "/metrics")[0] == 200
    assert usage.reads == 1


def test_scrape_after_the_cache_expired_reads_again(
    metrics: Metrics, server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "CACHE_S", 0.0)
    usage = Counting()
    metrics.watch(Sources(usage=usage))
    assert [get(server.port, "/metrics")[0] for _ in range(2)] == [200, 200]
    assert usage.reads == 2


def test_scrape_that_waits_too_long_for_another_is_unavailable(
    metrics: Metrics, server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "SCRAPE_TIMEOUT_S", 0.05)
    usage = Counting()
    usage.go_on.clear()
    metrics.watch(Sources(usage=usage))
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(get, server.port, "/metrics")
        eventually_sync(lambda: usage.reads == 1)
        assert get(server.port, "/metrics")[0] == 503
        assert get(server.port, "/healthz")[0] == 200
        usage.go_on.set()
        assert first.result()[0] == 200


def test_clients_beyond_the_limit_are_unavailable_until_others_leave(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "CONNECTIONS_MAX", 2)
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
    assert get(server.port, "/healthz")[0] == 503
    for each in silent:
        each.close()
    eventually_sync(lambda: get(server.port, "/healthz")[0] == 200)


def test_client_that_sends_its_request_slowly_is_disconnected_at_the_deadline(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "DEADLINE_S", 0.3)
    monkeypatch.setattr(metrics_server, "POLL_S", 0.05)
    server = MetricsServer(metrics, "127.0.0.1", 0)
    server.start()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(0.05)  # a byte each time: no single read of the server runs into its timeout

        def ended() -> bool:
            try:
                client.send(b"G")
                return client.recv(1) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        eventually_sync(ended)
    server.close()
