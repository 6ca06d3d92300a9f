"""A VM's share of the host follows its containers, also after refusals and restarts."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sandbox.errors import GuestError, InvalidSpec
from sandbox.spec import PodId, Resources
from tests.faults.test_pod_faults import Daemon, container_spec, pod_spec
from tests.faults.test_usage_faults import running


@pytest.fixture
def root() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="hk-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def daemon(root: Path) -> AsyncIterator[Daemon]:
    daemon = Daemon(root)
    yield daemon
    for record in list(daemon.pods.list()):
        await daemon.pods.remove(record.id)
    await daemon.kill()


def cpus(daemon: Daemon, id: PodId) -> tuple[int, ...]:
    return daemon.fakes.cgroups.cpus[id]


async def test_share_follows_the_containers_of_a_pod(daemon: Daemon) -> None:
    id = await daemon.pods.run(pod_spec("web"))
    one = Resources(cpuset_cpus="1", oom_score_adj=900, cpu_shares=100)
    two = Resources(cpuset_cpus="2-3", oom_score_adj=500, cpu_shares=50)
    await daemon.containers.create(id, container_spec(attempt=0, resources=one))
    assert (cpus(daemon, id), daemon.fakes.cgroups.scores[id]) == ((1,), 900)
    second = await daemon.containers.create(id, container_spec(attempt=1, resources=two))
    assert (cpus(daemon, id), daemon.fakes.cgroups.scores[id]) == ((1, 2, 3), 500)
    assert daemon.fakes.cgroups.weights[id] == (150, 0)
    await daemon.containers.update(second, Resources(cpuset_cpus="0"))
    assert cpus(daemon, id) == (0, 1)
    await daemon.containers.remove(second)
    assert (cpus(daemon, id), daemon.fakes.cgroups.scores[id]) == ((1,), 900)


async def test_cpus_that_the_host_lacks_are_refused_and_change_nothing(daemon: Daemon) -> None:
    id, container, guest = await running(daemon, resources=Resources(cpuset_cpus="1"))
    with pytest.raises(InvalidSpec, match="cpuset_cpus"):
        await daemon.containers.update(container, Resources(cpuset_cpus="9"))
    with pytest.raises(InvalidSpec, match="cpuset_cpus"):
        await daemon.containers.create(id, container_spec(attempt=1, resources=Resources(cpuset_cpus="9")))
    assert (cpus(daemon, id), len(daemon.containers.list()), guest.writes) == ((1,), 1, [])
    # nor is what was refused remembered
    await daemon.containers.update(container, Resources(oom_score_adj=7))
    assert cpus(daemon, id) == (1,)


async def test_limits_that_the_guest_refuses_leave_the_host_as_it_was(daemon: Daemon) -> None:
    id, container, guest = await running(daemon, resources=Resources(cpuset_cpus="1"))
    guest.refused = "cpu.max"
    with pytest.raises(GuestError, match=r"cpu\.max"):
        await daemon.containers.update(container, Resources(cpuset_cpus="2", cpu_quota=50_000))
    assert cpus(daemon, id) == (1,)


async def test_share_of_a_stopped_pod_is_left_alone(daemon: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    id, first, _ = await running(daemon, resources=Resources(cpuset_cpus="1"))
    await daemon.containers.create(id, container_spec(attempt=1, resources=Resources(cpuset_cpus="2")))
    await daemon.pods.stop(id)
    await daemon.containers.remove(first)
    assert (cpus(daemon, id), [each for each in caplog.messages if "its share" in each]) == ((1, 2), [])


async def test_share_after_a_restart_is_that_of_all_containers(daemon: Daemon) -> None:
    id, _, _ = await running(daemon, resources=Resources(cpuset_cpus="1"))
    await daemon.restart()
    await daemon.containers.create(id, container_spec(attempt=1, resources=Resources(cpuset_cpus="3")))
    assert cpus(daemon, id) == (1, 3)
