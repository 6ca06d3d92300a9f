"""Stats are true: CPU, memory, network, processes, writable layer, and the overhead of the VM."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
WEB = f"{HOST}/husk/web:1"
SLEEP = ("sleep", "3600")
MIB = 1 << 20


def stats_of(cri: Cri, container: str) -> api.ContainerStats:
    stats: api.ContainerStats = cri.call("ContainerStats", container_id=container).stats
    return stats


def pod_stats(cri: Cri, pod: Pod) -> api.LinuxPodSandboxStats:
    stats: api.LinuxPodSandboxStats = cri.call("PodSandboxStats", pod_sandbox_id=pod.id).stats.linux
    return stats


def cpus(sample: Callable[[], api.CpuUsage], seconds: float = 2) -> float:
    """Return the CPUs used on average between two samples of a CpuUsage."""
    first = sample()
    time.sleep(seconds)
    second = sample()
    used = second.usage_core_nano_seconds.value - first.usage_core_nano_seconds.value
    return float(used / (second.timestamp - first.timestamp))


def test_busy_loop_uses_about_one_cpu(cri: Cri, pod: Pod) -> None:
    container = cri.run(pod, BUSYBOX, ["sh", "-c", "while :; do :; done"])
    assert 0.7 < cpus(lambda: stats_of(cri, container).cpu) < 1.2
    assert 0.7e9 < stats_of(cri, container).cpu.usage_nano_cores.value < 1.2e9
    assert 0.7 < cpus(lambda: pod_stats(cri, pod).cpu) < 1.2


def test_sleeping_container_uses_almost_nothing(cri: Cri, pod: Pod) -> None:
    container = cri.run(pod, BUSYBOX, SLEEP)
    # its start may be in the first second, and a slow machine stretches it
    eventually_sync(
        lambda: cpus(lambda: stats_of(cri, container).cpu, 1), until=lambda used: used < 0.1, timeout_s=30
    )
    memory = stats_of(cri, container).memory
    assert 0 < memory.working_set_bytes.value < 10 * MIB
    # it has no limit, so the VM's size applies
    assert 100 * MIB < memory.available_bytes.value < 256 * MIB


def test_allocation_of_50_megabytes_is_counted(cri: Cri, pod: Pod) -> None:
    before = pod_stats(cri, pod).memory.working_set_bytes.value
    # dd holds its block, and waits for a reader that never reads
    container = cri.run(pod, BUSYBOX, ["sh", "-c", "dd if=/dev/zero bs=50M count=1 | sleep 3600"])
    memory = eventually_sync(
        lambda: stats_of(cri, container).memory,
        until=lambda seen: seen.working_set_bytes.value > 50 * MIB,
        timeout_s=30,
    )
    assert memory.working_set_bytes.value < 60 * MIB
    assert 50 * MIB < memory.rss_bytes.value < 60 * MIB
    assert memory.usage_bytes.value >= memory.working_set_bytes.value
    assert memory.page_faults.value > 0
    grown = pod_stats(cri, pod).memory.working_set_bytes.value - before
    assert 50 * MIB < grown < 65 * MIB


def test_network_counters_grow(cri: Cri, site: Site) -> None:
    cri.pull(WEB)
    pod = cri.run_pod("usage-network")
    container = cri.run(pod, WEB)
    ip = cri.pod_ip(pod)

    def page() -> str:
        try:
            return str(site.namespace.fetch(ip, 80))
        except OSError:
            return ""

    eventually_sync(page, timeout_s=30)
    before = pod_stats(cri, pod).network.default_interface
    assert before.name == "eth0"
    for _ in range(20):
        page()
    after = pod_stats(cri, pod).network.default_interface
    # a request and an answer are some hundred bytes each with their headers
    assert after.rx_bytes.value - before.rx_bytes.value > 20 * 200
    assert after.tx_bytes.value - before.tx_bytes.value > 20 * 200
    (metrics,) = [
        one
        for each in cri.call("ListPodSandboxMetrics").pod_metrics
        for one in each.container_metrics
        if one.container_id == container
    ]
    values = {metric.name: metric.value.value for metric in metrics.metrics}
    assert values["container_sockets"] >= 1, "it listens"
    assert values["container_file_descriptors"] >= 4


def test_written_file_counts_in_the_writable_layer(cri: Cri, pod: Pod) -> None:
    container = cri.run(pod, BUSYBOX, SLEEP)
    first = stats_of(cri, container).writable_layer
    assert os.path.isdir(first.fs_id.mountpoint)  # noqa: PTH112
    assert first.used_bytes.value < MIB
    cri.exec(container, "dd", "if=/dev/zero", "of=/big", "bs=1M", "count=8")
    layer = eventually_sync(
        lambda: stats_of(cri, container).writable_layer,
        until=lambda seen: seen.used_bytes.value >= 8 * MIB,
        timeout_s=30,
    )
    assert layer.used_bytes.value < 9 * MIB
    assert layer.inodes_used.value >= first.inodes_used.value + 1
    assert layer.timestamp > first.timestamp


def test_tree_of_1500_levels_is_measured_and_removed(cri: Cri, pod: Pod) -> None:
    """Deeper than what shutil.rmtree can remove."""
    script = "cd /; i=0; while [ $i -lt 1500 ]; do mkdir d; cd d || exit 9; i=$((i+1)); done; sleep 3600"
    container = cri.run(pod, BUSYBOX, ["sh", "-c", script])
    eventually_sync(
        lambda: stats_of(cri, container).writable_layer.inodes_used.value,
        until=lambda seen: seen >= 1500,
        timeout_s=60,
    )
    cri.stop(container, timeout=0)
    cri.remove(container)


def test_processes_are_counted(cri: Cri, pod: Pod) -> None:
    before = pod_stats(cri, pod).process.process_count.value
    cri.run(pod, BUSYBOX, ["sh", "-c", "sleep 3600 & sleep 3600 & wait"])
    eventually_sync(
        lambda: pod_stats(cri, pod).process.process_count.value,
        until=lambda seen: seen == before + 3,
        timeout_s=30,
    )


def test_lists_and_streams_agree(cri: Cri, pod: Pod) -> None:
    container = cri.run(pod, BUSYBOX, SLEEP)
    created = cri.create(pod, BUSYBOX, SLEEP)
    listed = {one.attributes.id for one in cri.call("ListContainerStats").stats}
    assert container in listed
    assert created not in listed
    streamed = [one for message in cri.stream("StreamContainerStats") for one in message.container_stats]
    assert {one.attributes.id for one in streamed} == listed
    (stats,) = [one for one in cri.call("ListPodSandboxStats").stats if one.attributes.id == pod.id]
    assert container in {one.attributes.id for one in stats.linux.containers}
    names = [one.id for message in cri.stream("StreamContainers") for one in message.containers]
    assert sorted(names) == sorted(one.id for one in cri.call("ListContainers").containers)
    pods = [one.id for message in cri.stream("StreamPodSandboxes") for one in message.pod_sandboxes]
    assert pod.id in pods


def test_unconditional_metrics_are_all_present(cri: Cri, pod: Pod) -> None:
    cri.run(pod, BUSYBOX, SLEEP)
    keys = {one.name: len(one.label_keys) for one in cri.call("ListMetricDescriptors").descriptors}
    (metrics,) = [
        one for one in cri.call("ListPodSandboxMetrics").pod_metrics if one.pod_sandbox_id == pod.id
    ]
    every = [*metrics.metrics, *(metric for one in metrics.container_metrics for metric in one.metrics)]
    assert all(keys[metric.name] == len(metric.label_values) for metric in every)
    sometimes = ("blkio", "fs_reads", "fs_writes", "pressure", "hugetlb", "spec_cpu_quota", "reservation")
    always = {name for name in keys if not any(word in name for word in sometimes)}
    assert always - {metric.name for metric in every} == set()


def test_overhead_of_the_vm_is_reported_separately(cri: Cri, pod: Pod) -> None:
    cri.run(pod, BUSYBOX, SLEEP)
    usage = json.loads(cri.pod_status(pod, verbose=True).info["info"])["hostUsage"]
    assert 30 * MIB < usage["guestMemoryBytes"] < 320 * MIB
    assert MIB < usage["vmmMemoryBytes"] < 200 * MIB
    assert MIB < usage["helpersMemoryBytes"] < 100 * MIB
    assert usage["overheadMemoryBytes"] == usage["vmmMemoryBytes"] + usage["helpersMemoryBytes"]
    assert usage["vmmCpuSeconds"] > 0.1


def test_pressure_is_reported_where_the_guest_keeps_it(cri: Cri, pod: Pod) -> None:
    one = cri.run(pod, BUSYBOX, ["sh", "-c", "while :; do :; done"])
    cri.run(pod, BUSYBOX, ["sh", "-c", "while :; do :; done"])
    kept = cri.exec(one, "cat", "/proc/pressure/cpu").code == 0
    first = stats_of(cri, one)
    assert first.cpu.HasField("psi") == first.memory.HasField("psi") == first.io.HasField("psi") == kept
    if kept:  # two busy loops on one CPU wait for each other
        eventually_sync(
            lambda: stats_of(cri, one).cpu.psi.Some.Total,
            until=lambda total: total > first.cpu.psi.Some.Total + 10**8,
            timeout_s=30,
        )


# ---------------------------------------------------------------------------------- a frozen guest


@pytest.fixture
def frozen(cri: Cri, daemon: Daemon) -> Iterator[Pod]:
    """A pod whose VM is stopped by SIGSTOP."""
    pod = cri.run_pod("usage-frozen")
    cri.run(pod, BUSYBOX, SLEEP)
    pids = daemon.vmm_pids(pod.id)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    yield pod
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def test_frozen_vm_does_not_delay_the_list(cri: Cri, pod: Pod, frozen: Pod) -> None:
    for limit_s in (6.0, 2.0):  # the second call does not wait for it
        began = time.monotonic()
        listed = {one.attributes.id for one in cri.call("ListPodSandboxStats").stats}
        assert pod.id in listed
        assert frozen.id not in listed
        assert time.monotonic() - began < limit_s


# ------------------------------------------------------------------------------------- events


class Listener:
    """Reads a stream of events in a thread."""

    def __init__(self, cri: Cri) -> None:
        self.seen: list[api.ContainerEventResponse] = []
        self.code: grpc.StatusCode | None = None
        self._stream = cri.stream("GetContainerEvents")
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()
        cri.call("Version")  # on the same connection, so the stream's call has reached the daemon

    def _listen(self) -> None:
        try:
            for event in self._stream:
                self.seen.append(event)
        except grpc.RpcError:
            pass  # see `code`
        self.code = self._stream.code()

    def join(self, *, cancel: bool = False) -> None:
        if cancel:
            self._stream.cancel()
        self._thread.join(20)
        assert not self._thread.is_alive()


def test_life_of_a_pod_has_its_events_in_order(cri: Cri) -> None:
    listener = Listener(cri)
    pod = cri.run_pod("usage-events")
    container = cri.run(pod, BUSYBOX, ["sh", "-c", "exit 3"])
    cri.wait_exited(container)
    cri.remove(container)
    cri.stop_pod(pod)
    cri.remove_pod(pod)
    expected = [
        (pod.id, api.CONTAINER_CREATED_EVENT),
        (pod.id, api.CONTAINER_STARTED_EVENT),
        (container, api.CONTAINER_CREATED_EVENT),
        (container, api.CONTAINER_STARTED_EVENT),
        (container, api.CONTAINER_STOPPED_EVENT),
        (container, api.CONTAINER_DELETED_EVENT),
        (pod.id, api.CONTAINER_STOPPED_EVENT),
        (pod.id, api.CONTAINER_DELETED_EVENT),
    ]
    eventually_sync(lambda: len(listener.seen), until=lambda count: count >= len(expected), timeout_s=30)
    listener.join(cancel=True)
    assert [(each.container_id, each.container_event_type) for each in listener.seen] == expected
    stopped = listener.seen[4]
    assert stopped.containers_statuses[0].exit_code == 3
    assert stopped.pod_sandbox_status.network.ip
    times = [each.created_at for each in listener.seen]
    assert times == sorted(set(times))


def test_streams_end_with_the_daemon_and_counters_continue(cri: Cri, daemon: Daemon, pod: Pod) -> None:
    container = cri.run(pod, BUSYBOX, SLEEP)
    used = pod_stats(cri, pod).cpu.usage_core_nano_seconds.value
    listener = Listener(cri)
    began = time.monotonic()
    assert daemon.terminate() == 0
    assert time.monotonic() - began < 4, "an open stream does not delay the exit of the daemon"
    listener.join()
    assert listener.code == grpc.StatusCode.OK
    daemon.start()
    assert pod_stats(cri, pod).cpu.usage_core_nano_seconds.value >= used
    assert stats_of(cri, container).memory.working_set_bytes.value > 0


# ------------------------------------------------------------------------------------- limits


def linux(**fields: Any) -> api.LinuxContainerResources:
    return api.LinuxContainerResources(**fields)


def test_limits_of_a_running_container_are_changed(cri: Cri, pod: Pod) -> None:
    own = api.LinuxContainerSecurityContext(namespace_options=api.NamespaceOption(pid=api.CONTAINER))
    config = api.LinuxContainerConfig(security_context=own)  # so that process 1 is the container's
    container = cri.run(pod, BUSYBOX, ["sh", "-c", "while :; do :; done"], linux=config)
    limits = linux(cpu_quota=30_000, cpu_period=100_000, memory_limit_in_bytes=32 * MIB, oom_score_adj=333)
    cri.call("UpdateContainerResources", container_id=container, linux=limits)
    shown = cri.status(container).resources.linux
    assert (shown.cpu_quota, shown.memory_limit_in_bytes, shown.oom_score_adj) == (30_000, 32 * MIB, 333)
    assert cpus(lambda: stats_of(cri, container).cpu) < 0.5
    memory = stats_of(cri, container).memory
    assert memory.available_bytes.value == 32 * MIB - memory.working_set_bytes.value
    assert cri.exec(container, "cat", "/proc/1/oom_score_adj").stdout == "333\n"
    assert cri.exec(container, "cat", "/proc/self/oom_score_adj").stdout == "333\n"


def test_limits_of_a_pod_apply_to_all_containers_together(cri: Cri) -> None:
    pod = cri.run_pod("usage-limits")
    one = cri.run(pod, BUSYBOX, SLEEP)
    two = cri.run(pod, BUSYBOX, SLEEP)
    cri.call(
        "UpdatePodSandboxResources",
        pod_sandbox_id=pod.id,
        resources=linux(memory_limit_in_bytes=48 * MIB, cpu_quota=50_000),
    )
    for container in (one, two):
        assert stats_of(cri, container).memory.available_bytes.value <= 48 * MIB
    assert pod_stats(cri, pod).memory.available_bytes.value <= 48 * MIB
    killed = cri.run(pod, BUSYBOX, ["dd", "if=/dev/zero", "of=/dev/null", "bs=60M", "count=1"])
    assert cri.wait_exited(killed).exit_code == 137
    assert cri.status(one).state == cri.status(two).state == api.CONTAINER_RUNNING
