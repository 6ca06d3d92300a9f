"""A VM runs on the CPUs of its containers, and weighs on the host what they weigh."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from sandbox.host.cgroup import find_layout
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
SLEEP = ("sleep", "3600")


def linux(cpus: str = "", score: int = 0, shares: int = 0, mems: str = "") -> api.LinuxContainerConfig:
    resources = api.LinuxContainerResources(
        cpuset_cpus=cpus, cpuset_mems=mems, oom_score_adj=score, cpu_shares=shares
    )
    return api.LinuxContainerConfig(resources=resources)


def update(cri: Cri, container: str, cpus: str, score: int = 0) -> None:
    resources = linux(cpus, score).resources
    cri.call("UpdateContainerResources", container_id=container, linux=resources)


def processes(cri: Cri, pod: Pod) -> list[int]:
    """Return the VMM and its helpers."""
    found = json.loads(cri.pod_status(pod, verbose=True).info["info"])
    assert found["helpers"], found
    return [found["pid"], *found["helpers"].values()]


def numbers(text: str) -> set[int]:
    """Return the numbers of a list such as 0-3,7."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def allowed(cri: Cri, pod: Pod) -> set[frozenset[int]]:
    """Return the sets of CPUs that the threads of the pod's processes may run on; one, if they agree."""
    return {
        frozenset(numbers(line))
        for pid in processes(cri, pod)
        for status in Path(f"/proc/{pid}/task").glob("*/status")
        for line in re.findall(r"Cpus_allowed_list:\t(\S+)", status.read_text())
    }


def scores(cri: Cri, pod: Pod) -> set[int]:
    return {int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in processes(cri, pod)}


@pytest.fixture
def host_cpus() -> list[int]:
    """The CPUs that a pod may have: those of the cgroup above, which may be fewer than this process has."""
    found = sorted(numbers(re.findall(r"Cpus_allowed_list:\t(\S+)", Path("/proc/1/status").read_text())[0]))
    if len(found) < 2:
        pytest.skip("the host has one CPU: a VM cannot be kept off another one")
    return found


@pytest.fixture
def two(cri: Cri, pod: Pod, host_cpus: list[int]) -> Iterator[tuple[str, str]]:
    """Two containers on different CPUs."""
    first = cri.run(pod, BUSYBOX, SLEEP, linux=linux(str(host_cpus[0]), 900, 100))
    second = cri.run(pod, BUSYBOX, SLEEP, linux=linux(str(host_cpus[1]), 500, 50))
    yield first, second


def test_vm_runs_on_the_cpus_of_its_containers_alone(
    cri: Cri, pod: Pod, daemon: Daemon, host_cpus: list[int]
) -> None:
    one, other, every = ({host_cpus[0]}, {host_cpus[1]}, set(host_cpus))
    assert allowed(cri, pod) == {frozenset(every)}
    first = cri.run(pod, BUSYBOX, SLEEP, linux=linux(str(host_cpus[0]), 900, mems="0"))
    assert (allowed(cri, pod), scores(cri, pod)) == ({frozenset(one)}, {900})
    second = cri.run(pod, BUSYBOX, SLEEP, linux=linux(str(host_cpus[1]), 500))
    assert (allowed(cri, pod), scores(cri, pod)) == ({frozenset(one | other)}, {500})
    daemon.kill()
    daemon.start()
    assert allowed(cri, pod) == {frozenset(one | other)}
    # as the kubelet's CPU manager does when CPUs are given to another pod
    update(cri, first, str(host_cpus[1]), 800)
    assert (allowed(cri, pod), scores(cri, pod)) == ({frozenset(other)}, {500})
    cri.stop(second, 0)
    cri.call("RemoveContainer", container_id=second)
    assert (allowed(cri, pod), scores(cri, pod)) == ({frozenset(other)}, {800})
    assert json.loads(cri.pod_status(pod, verbose=True).info["info"])["oomScoreAdj"] == 800
    cri.stop(first, 0)
    cri.call("RemoveContainer", container_id=first)
    assert allowed(cri, pod) == {frozenset(every)}


def test_cpus_that_the_host_lacks_are_refused_by_name(cri: Cri, pod: Pod) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        cri.run(pod, BUSYBOX, SLEEP, linux=linux("4095"))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "cpuset_cpus: there is no 4095 for the pod; accepted: some of" in str(caught.value.details())
    with pytest.raises(grpc.RpcError) as caught:
        cri.run(pod, BUSYBOX, SLEEP, linux=linux(mems="63"))
    assert "cpuset_mems: there is no 63" in str(caught.value.details())


def test_weight_of_the_containers_is_that_of_the_vm_where_no_client_gives_a_cgroup(
    cri: Cri, two: tuple[str, str], pod: Pod
) -> None:
    assert not cri.cgroup_parent
    pid = processes(cri, pod)[0]
    paths = {line.split(":", 2)[2] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()}
    files = [
        Path(root + path, name)
        for root in find_layout().roots
        for path in paths
        if "husk-" in path
        for name in ("cpu.shares", "cpu.weight")
    ]
    assert [each.read_text().strip() for each in files if each.exists()] in (["150"], ["6"])
