"""A VM follows the limits of its containers, with what its kernel derives from memory; and what happens at a
limit."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from sandbox.host.size import memory_mib, usable_cpus
from tests.kit.cri import Cri, Pod
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
SLEEP = ("sleep", "3600")
MIB = 1 << 20


def limits(**fields: Any) -> api.LinuxContainerResources:
    return api.LinuxContainerResources(**fields)


def linux(**fields: Any) -> api.LinuxContainerConfig:
    return api.LinuxContainerConfig(resources=limits(**fields))


def read(cri: Cri, container: str, command: str) -> str:
    answer = cri.exec(container, "sh", "-c", command)
    assert answer.code == 0, answer
    return answer.stdout.strip()


def vm_size(cri: Cri, pod: Pod) -> tuple[int, int]:
    found = json.loads(cri.pod_status(pod, verbose=True).info["info"])["size"]
    return found["memoryMiB"], found["vcpus"]


# ------------------------------------------------------------------------------- out of memory

EAT = "dd if=/dev/zero of=/dev/null bs=120M count=1"


def test_out_of_memory_of_a_child_kills_the_child_alone(cri: Cri, pod: Pod) -> None:
    script = f"{EAT}; echo code $?; exec sleep 3600"
    container = cri.run(pod, BUSYBOX, ["sh", "-c", script], linux=linux(memory_limit_in_bytes=32 * MIB))
    eventually_sync(
        lambda: [line.text for line in cri.log(container)],
        until=lambda lines: "code 137" in lines,
        timeout_s=60,
    )
    assert cri.status(container).state == api.CONTAINER_RUNNING
    cri.stop(container, 0)
    status = cri.status(container)
    assert (status.exit_code, status.reason) == (137, "OOMKilled"), "as containerd: the cgroup had a kill"


def test_out_of_memory_of_an_exec_kills_the_exec_alone(cri: Cri, pod: Pod) -> None:
    container = cri.run(pod, BUSYBOX, SLEEP, linux=linux(memory_limit_in_bytes=32 * MIB))
    for _ in range(2):
        assert cri.exec(container, *EAT.split()).code == 137
    assert cri.status(container).state == api.CONTAINER_RUNNING
    assert read(cri, container, "cat /sys/fs/cgroup/memory.oom.group") == "0"


def test_out_of_memory_kills_the_container_where_its_group_is_asked_for(cri: Cri, pod: Pod) -> None:
    resources = linux(memory_limit_in_bytes=32 * MIB, unified={"memory.oom.group": "1"})
    container = cri.run(pod, BUSYBOX, ["sh", "-c", f"{EAT}; sleep 3600"], linux=resources)
    status = cri.wait_exited(container)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")


# ------------------------------------------------------------------------------- updates


def test_memory_alone_is_updated_after_swap(cri: Cri, pod: Pod) -> None:
    both = {"memory_limit_in_bytes": 64 * MIB, "memory_swap_limit_in_bytes": 64 * MIB}
    container = cri.run(pod, BUSYBOX, SLEEP, linux=linux(memory_limit_in_bytes=48 * MIB))
    cri.call("UpdateContainerResources", container_id=container, linux=limits(**both))
    for mib in (96, 32):
        alone = limits(memory_limit_in_bytes=mib * MIB)
        cri.call("UpdateContainerResources", container_id=container, linux=alone)
        files = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory.swap.max"
        assert read(cri, container, files).split() == [str(mib * MIB), "0"]
        assert cri.status(container).resources.linux.memory_limit_in_bytes == mib * MIB


def test_update_beyond_the_node_is_refused_and_changes_nothing(cri: Cri, pod: Pod) -> None:
    container = cri.run(pod, BUSYBOX, SLEEP, linux=linux(memory_limit_in_bytes=64 * MIB))
    before = vm_size(cri, pod)
    node = f"the node has {memory_mib()} MiB and {usable_cpus()} CPUs"
    for wanted in (
        limits(memory_limit_in_bytes=(memory_mib() + 1024) * MIB),
        limits(cpu_quota=(usable_cpus() + 2) * 100_000, memory_limit_in_bytes=128 * MIB),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            cri.call("UpdateContainerResources", container_id=container, linux=wanted)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert node in str(caught.value.details())
    with pytest.raises(grpc.RpcError) as caught:
        cri.create(pod, BUSYBOX, SLEEP, linux=linux(cpu_quota=(usable_cpus() + 2) * 100_000))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert read(cri, container, "cat /sys/fs/cgroup/memory.max") == str(64 * MIB)
    assert cri.status(container).resources.linux == limits(memory_limit_in_bytes=64 * MIB)
    assert vm_size(cri, pod) == before


@pytest.mark.parametrize(
    "swap",
    [
        {"memory_limit_in_bytes": 64 * MIB, "memory_swap_limit_in_bytes": 128 * MIB},
        {"unified": {"memory.swap.max": "1000000"}},
    ],
)
def test_swap_that_no_vm_has_is_refused(cri: Cri, pod: Pod, swap: dict[str, Any]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        cri.create(pod, BUSYBOX, SLEEP, linux=linux(**swap))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "a VM has no swap" in str(caught.value.details())


# ------------------------------------------------------------------------------- size


def test_three_containers_hold_their_limits_at_once_beside_one_without(cri: Cri) -> None:
    """The sandbox names no resources; each container fills 95 % of its limit and keeps it."""
    pod = cri.run_pod("three-limits")
    boot, _ = vm_size(cri, pod)
    held = {}
    for mib in (150, 200, 250):
        hold = f"dd if=/dev/zero bs={mib * 95 // 100}M count=1 | sleep 3600"
        resources = linux(memory_limit_in_bytes=mib * MIB, cpu_quota=50_000, cpu_period=100_000)
        held[cri.run(pod, BUSYBOX, ["sh", "-c", hold], linux=resources)] = mib
    assert vm_size(cri, pod) == (600 + 128, 2)

    def used() -> list[float]:
        return [
            int(read(cri, each, "cat /sys/fs/cgroup/memory.current")) / (mib * MIB)
            for each, mib in held.items()
        ]

    eventually_sync(used, until=lambda shares: min(shares) > 0.94, timeout_s=90)
    assert {cri.status(each).state for each in held} == {api.CONTAINER_RUNNING}
    other = cri.run(pod, BUSYBOX, SLEEP)
    assert vm_size(cri, pod)[0] == 600 + 128 + boot
    assert (
        read(cri, other, f"dd if=/dev/zero of=/dev/null bs={boot * 3 // 4}M count=1 && echo held") == "held"
    )
    assert min(used()) > 0.94
    cri.stop_pod(pod)
    cri.remove_pod(pod)


PROCESSES = "awk '/^Max processes/ {print $3, $4}' /proc/1/limits"


def test_limits_that_the_kernel_derives_follow_the_memory(cri: Cri) -> None:
    pod = cri.run_pod("derived-limits")
    own = api.LinuxContainerSecurityContext(
        privileged=True, namespace_options=api.NamespaceOption(pid=api.CONTAINER)
    )
    small = cri.run(pod, BUSYBOX, SLEEP, linux=api.LinuxContainerConfig(security_context=own))
    chosen = "/proc/sys/fs/fanotify/max_user_marks"
    read(cri, small, f"echo 9000 >{chosen}")
    booted = int(read(cri, small, "cat /proc/sys/kernel/threads-max"))
    resources = linux(memory_limit_in_bytes=1900 * MIB)
    large = cri.run(pod, BUSYBOX, SLEEP, linux=resources)
    # what comes online last may do so after the start
    total = 1024 * eventually_sync(
        lambda: int(read(cri, large, "awk '/^MemTotal/ {print $2}' /proc/meminfo")),
        until=lambda kib: kib > 2000 * 1024,
        timeout_s=30,
    )

    def setting(name: str) -> int:
        return int(read(cri, large, f"cat /proc/sys/{name}"))

    assert setting("kernel/threads-max") == total // (128 << 10) > 5 * booted
    assert setting("fs/file-max") == total // (10 << 10)
    assert setting("fs/inotify/max_user_watches") == total // 128_000
    assert setting("user/max_pid_namespaces") == setting("kernel/threads-max") // 2
    assert setting("vm/min_free_kbytes") > 0
    pages = total // 4096
    assert int(read(cri, large, "cut -f2 /proc/sys/net/ipv4/tcp_mem")) == pages // 16
    assert read(cri, large, "ulimit -u") == str(total // (256 << 10))
    for running in (small, large):
        assert read(cri, running, PROCESSES).split() == [str(total // (256 << 10))] * 2
    assert read(cri, small, f"cat {chosen}") == "9000", "what a container has set stays"
    cri.stop_pod(pod)
    cri.remove_pod(pod)
