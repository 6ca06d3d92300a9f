"""Usage, metrics, events and changed limits, driven by the real crictl."""

from __future__ import annotations

import json
import select
import subprocess
from collections.abc import Iterator
from typing import IO, Any

import pytest

from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST
from tests.node.conftest import Crictl, Running

pytestmark = pytest.mark.node

BUSYBOX = f"{HOST}/husk/busybox:1"
BUSY = ["sh", "-c", "while :; do :; done"]
MIB = 1 << 20


@pytest.fixture(scope="module")
def pod(crictl: Crictl) -> Running:
    """Return a pod with one container that keeps a CPU busy."""
    crictl.run("pull", BUSYBOX)
    return crictl.start("usage", "busy", BUSYBOX, BUSY)


def row(text: str, name: str) -> list[str]:
    """Return the columns of the table's line with this name or id."""
    (line,) = [line for line in text.splitlines() if name in line.split()]
    return line.split()


def test_stats_of_a_busy_container_show_its_cpu(crictl: Crictl, pod: Running) -> None:
    text = crictl.say("stats", "--seconds", "2", "--id", pod.container)
    _, _, cpu, memory, disk, inodes, *_ = row(text, pod.container[:13])
    assert 70 < float(cpu) < 120, text
    assert memory.endswith("B")
    assert disk.endswith("B")
    assert int(inodes) > 0
    (stats,) = crictl.json("stats", "--id", pod.container)["stats"]
    assert stats["attributes"]["metadata"]["name"] == "busy"
    assert int(stats["memory"]["workingSetBytes"]["value"]) > 0
    assert int(stats["writableLayer"]["inodesUsed"]["value"]) > 0


def test_statsp_of_a_pod_show_network_processes_and_containers(crictl: Crictl, pod: Running) -> None:
    text = crictl.say("statsp", "--seconds", "2", "--id", pod.pod)
    _, _, cpu, memory = row(text, pod.pod[:13])
    assert 70 < float(cpu) < 120, text
    assert memory.endswith("B")
    (stats,) = crictl.json("statsp", "--id", pod.pod)["stats"]
    linux = stats["linux"]
    assert linux["network"]["defaultInterface"]["name"] == "eth0"
    assert int(linux["process"]["processCount"]["value"]) == 1
    assert [one["attributes"]["id"] for one in linux["containers"]] == [pod.container]


def test_metrics_match_their_descriptors(crictl: Crictl, pod: Running) -> None:
    descriptors = crictl.json("metricdescs")["descriptors"]
    keys = {one["name"]: one["labelKeys"] for one in descriptors}
    (metrics,) = [one for one in crictl.json("metricsp")["podMetrics"] if one["podSandboxId"] == pod.pod]
    (container,) = metrics["containerMetrics"]
    values = {one["name"]: one for one in container["metrics"]}
    assert all(len(one["labelValues"]) == len(keys[name]) for name, one in values.items())
    cpu = values["container_cpu_usage_seconds_total"]
    assert dict(zip(keys[cpu["name"]], cpu["labelValues"], strict=True)) == {
        "pod": "usage",
        "namespace": "default",
        "container": "busy",
        "id": pod.container,
        "image": BUSYBOX,
    }
    network = {one["name"] for one in metrics["metrics"] if "network" in one["name"]}
    assert len(network) == 8


@pytest.fixture
def events(crictl: Crictl, pod: Running) -> Iterator[subprocess.Popen[str]]:
    """Return a crictl that receives events: it has printed one already."""
    command = [crictl.binary, f"--runtime-endpoint=unix://{crictl.socket}", "events", "--output", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as listener:
        file = crictl.container_file("heard", BUSYBOX, BUSY)
        assert listener.stdout is not None
        while not select.select([listener.stdout], [], [], 0.2)[0]:
            assert listener.poll() is None
            crictl.run("rm", crictl.say("create", pod.pod, file, pod.pod_file))
        yield listener
        listener.terminate()


def documents(stream: IO[str]) -> Iterator[Any]:
    """Yield JSON documents from a stream that has one after the other."""
    text, decoder = "", json.JSONDecoder()
    for line in stream:
        text = (text + line).lstrip()
        try:
            document, end = decoder.raw_decode(text)
        except json.JSONDecodeError:
            continue
        yield document
        text = text[end:]


def test_events_of_a_container_arrive_in_order(
    crictl: Crictl, pod: Running, events: subprocess.Popen[str]
) -> None:
    file = crictl.container_file("short", BUSYBOX, ["sh", "-c", "exit 7"])
    container = crictl.say("create", pod.pod, file, pod.pod_file)
    crictl.run("start", container)
    eventually_sync(
        lambda: crictl.json("inspect", container)["status"]["state"],
        until=lambda state: state == "CONTAINER_EXITED",
        timeout_s=30,
    )
    crictl.run("rm", container)
    assert events.stdout is not None
    received = []
    for event in documents(events.stdout):
        if event["containerId"] == container:
            received.append(event)
            if event["containerEventType"] == "CONTAINER_DELETED_EVENT":
                break
    kinds = ("CREATED", "STARTED", "STOPPED", "DELETED")
    assert [each["containerEventType"] for each in received] == [f"CONTAINER_{kind}_EVENT" for kind in kinds]
    assert {each["podSandboxStatus"]["id"] for each in received} == {pod.pod}
    stopped = {each["id"]: each for each in received[2]["containersStatuses"]}
    assert stopped[container]["exitCode"] == 7


def test_update_limits_are_shown_and_hold(crictl: Crictl, pod: Running) -> None:
    file = crictl.container_file("limited", BUSYBOX, BUSY)
    container = crictl.say("create", pod.pod, file, pod.pod_file)
    crictl.run("start", container)
    limits = ["--cpu-quota", "20000", "--cpu-period", "100000", "--memory", str(48 * MIB)]
    crictl.run("update", *limits, container)
    shown = crictl.json("inspect", container)["status"]["resources"]["linux"]
    assert (shown["cpuQuota"], shown["memoryLimitInBytes"]) == ("20000", str(48 * MIB))
    text = crictl.say("stats", "--seconds", "2", "--id", container)
    assert float(row(text, container[:13])[2]) < 35, text
    refused = crictl.run("update", "--cpu-period", "5", container, check=False)
    assert refused.returncode != 0
    assert "linux.cpu_period" in refused.stderr


def test_inspectp_reports_the_cost_of_the_vm(crictl: Crictl, pod: Running) -> None:
    usage = crictl.json("inspectp", pod.pod)["info"]["hostUsage"]
    assert usage["guestMemoryBytes"] > 30 * MIB
    assert usage["overheadMemoryBytes"] > MIB
    assert usage["vmmCpuSeconds"] > 0.1
