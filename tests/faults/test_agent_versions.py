"""Pods whose agent is of another release than the daemon: newer daemon, older guest image.

What agent and daemon say to each other is tested in tests/contract; here is what becomes of the pod.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sandbox.errors import GuestUnreachable, SandboxError, WrongState
from sandbox.guest.frames import MIN_VERSION, VERSION
from sandbox.records import ContainerState, PodState
from sandbox.spec import ContainerSpec, PodId, PodSpec
from sandbox.vm_pods.link import link_of
from tests.fakes.daemon import FakeHost, RestartableDaemon
from tests.fakes.guest import FakeAgent
from tests.kit.eventually import eventually

OLD = (MIN_VERSION - 1, MIN_VERSION - 1)
SPEC = PodSpec(name="web", namespace="default", uid="u")
MAIN = ContainerSpec(name="main", image="example/web:1")


class Upgraded(RestartableDaemon):
    """A daemon over fakes, with one pod that runs one container."""

    def __init__(self, root: Path) -> None:
        self.fakes = FakeHost(root)
        super().__init__(self.fakes)

    async def run(self) -> None:
        """Start the pod and its container."""
        self.pod = PodId(await self.pods.run(SPEC))
        self.container = await self.containers.create(self.pod, MAIN)
        await self.containers.start(self.container)

    @property
    def agent(self) -> FakeAgent:
        return self.fakes.hypervisor.vms[self.pod].agent

    def assert_stopped_and_removed(self) -> None:
        """Assert that nothing of the pod is left."""
        assert self.fakes.ledger.held == set()
        self.assert_no_files()


@pytest.fixture
async def daemon() -> AsyncIterator[Upgraded]:
    root = Path(tempfile.mkdtemp(prefix="husk-faults-"))  # short, for the sockets in it
    daemon = Upgraded(root)
    await daemon.run()
    yield daemon
    for pod in list(daemon.inventory.pods.values()):
        await daemon.pods.remove(pod.id)
    await daemon.kill()
    shutil.rmtree(root)


async def upgrade(daemon: Upgraded, versions: tuple[int, int]) -> None:
    """Restart the daemon; from now on the agent speaks these versions."""
    await daemon.kill()
    daemon.agent.versions = versions
    daemon.start()
    await daemon.built.recover()


@pytest.mark.parametrize("versions", [(1, VERSION), (MIN_VERSION, VERSION + 7)])
async def test_agent_with_an_overlapping_range_is_recovered(
    daemon: Upgraded, versions: tuple[int, int]
) -> None:
    await upgrade(daemon, versions)
    assert daemon.pods.find(daemon.pod).state is PodState.READY
    assert daemon.containers.find(daemon.container).state is ContainerState.RUNNING
    await daemon.containers.stop(daemon.container, 0)
    assert daemon.containers.find(daemon.container).exit_code == 137


@pytest.mark.parametrize("versions", [OLD, (VERSION + 1, VERSION + 2)])
async def test_agent_without_a_common_version_makes_its_pod_not_ready(
    daemon: Upgraded, versions: tuple[int, int]
) -> None:
    await upgrade(daemon, versions)
    record = daemon.pods.find(daemon.pod)
    assert record.state is PodState.NOT_READY
    assert f"version {versions[0]}" in record.problem or f"versions {versions[0]}" in record.problem
    assert "can only be stopped and removed" in record.problem
    assert daemon.containers.find(daemon.container).state is ContainerState.UNKNOWN
    assert len(daemon.agent.hellos) == 2, "a retry would be useless"
    assert daemon.fakes.ledger.held, "the VM runs on until the pod is stopped"
    with pytest.raises(WrongState):
        await daemon.containers.exec_sync(daemon.container, ["true"], 1)
    with pytest.raises(GuestUnreachable, match="protocol version"):
        await link_of(daemon.inventory.pod(daemon.pod)).guest(5)


@pytest.mark.parametrize("container_first", [True, False])
@pytest.mark.parametrize("restarted", [True, False])
async def test_pod_with_an_agent_that_is_too_old_is_stopped_and_removed(
    daemon: Upgraded, container_first: bool, restarted: bool
) -> None:
    await upgrade(daemon, OLD)
    if restarted:
        await daemon.restart()
    if container_first:  # as the kubelet does
        await daemon.containers.stop(daemon.container, 30)
    await daemon.pods.stop(daemon.pod)
    assert daemon.containers.find(daemon.container).state is ContainerState.EXITED
    await daemon.containers.remove(daemon.container)
    await daemon.pods.remove(daemon.pod)
    daemon.assert_stopped_and_removed()


async def test_other_pods_are_recovered_beside_one_with_an_old_agent(daemon: Upgraded) -> None:
    other = await daemon.pods.run(PodSpec(name="other", namespace="default", uid="v"))
    await upgrade(daemon, OLD)
    assert daemon.pods.find(daemon.pod).state is PodState.NOT_READY
    assert daemon.pods.find(other).state is PodState.READY
    container = await daemon.containers.create(other, MAIN)
    await daemon.containers.start(container)


async def test_agent_that_changes_its_version_on_a_reconnect_makes_its_pod_not_ready(
    daemon: Upgraded,
) -> None:
    """No honest agent does that, and a hostile one must not be retried for ever."""
    daemon.agent.versions = OLD
    daemon.agent.drop()
    await eventually(lambda: daemon.pods.find(daemon.pod).state is PodState.NOT_READY)
    with pytest.raises(SandboxError):
        await link_of(daemon.inventory.pod(daemon.pod)).guest(5)
    await daemon.pods.remove(daemon.pod)
    daemon.assert_stopped_and_removed()
