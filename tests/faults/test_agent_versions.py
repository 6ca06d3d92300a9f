"""Pods whose agent is of another release than the daemon: newer daemon, older guest image.

What agent and daemon say to each other is tested in tests/contract; here is what becomes of the pod.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from sandbox.errors import GuestUnreachable, WrongState
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.frames import MIN_VERSION, VERSION
from sandbox.records import ContainerState, PodState
from sandbox.spec import ContainerSpec, PodId, PodSpec
from sandbox.vm_pods.link import link_of
from tests.fakes.daemon import FakeHost, RestartableDaemon
from tests.fakes.guest import FakeAgent
from tests.kit.eventually import eventually

OLD = (MIN_VERSION - 1, MIN_VERSION - 1)
NEW = (VERSION + 1, VERSION + 2)
SPEC = PodSpec(name="web", namespace="default", uid="u")
MAIN = ContainerSpec(name="main", image="example/web:1", log_path="main.log")


class Upgraded(RestartableDaemon):
    """A daemon over fakes, with one pod that runs one container."""

    def __init__(self, root: Path) -> None:
        self.fakes = FakeHost(root)
        super().__init__(self.fakes)

    async def run(self) -> None:
        """Start the pod and its container."""
        self.log = self.root / "logs" / "main.log"
        self.log.parent.mkdir()
        self.pod = PodId(await self.pods.run(replace(SPEC, log_directory=str(self.log.parent))))
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


@pytest.mark.parametrize("versions", [OLD, NEW])
async def test_agent_without_a_common_version_makes_its_pod_not_ready(
    daemon: Upgraded, versions: tuple[int, int]
) -> None:
    await upgrade(daemon, versions)
    record = daemon.pods.find(daemon.pod)
    assert record.state is PodState.NOT_READY
    assert f"version {versions[0]}" in record.problem or f"versions {versions[0]}" in record.problem
    assert "can only be stopped and removed" in record.problem
    assert daemon.containers.find(daemon.container).state is ContainerState.RUNNING
    first, refused, spoken = daemon.agent.hellos
    assert first.version == refused.version == VERSION
    assert versions[0] <= spoken.version <= versions[1], "after that, in a version of the agent's"
    assert spoken.wall_ns == 0, "which is another field in version 1"
    assert daemon.fakes.ledger.held, "the VM runs on until the pod is stopped"
    with pytest.raises(WrongState):
        await daemon.containers.exec_sync(daemon.container, ["true"], 1)
    with pytest.raises(WrongState):
        await daemon.containers.create(daemon.pod, ContainerSpec(name="more", image="example/web:1"))
    client = await link_of(daemon.inventory.pod(daemon.pod)).guest(5)
    with pytest.raises(
        GuestUnreachable, match=f"protocol version {spoken.version}: ping cannot be requested"
    ):
        client.post(pb.Request(ping=pb.Ping()))


@pytest.mark.parametrize("versions", [OLD, NEW])
@pytest.mark.parametrize("restarts", [0, 2])
@pytest.mark.parametrize("ending", ["by itself", "stopped", "with its pod"])
async def test_container_with_an_agent_of_another_release_keeps_its_last_line_and_code(
    daemon: Upgraded, versions: tuple[int, int], restarts: int, ending: str
) -> None:
    daemon.agent.print_log(daemon.container, b"T stdout F first\n")
    await eventually(lambda: daemon.log.exists() and daemon.log.read_bytes().endswith(b"first\n"))
    await upgrade(daemon, versions)
    for _ in range(restarts):
        await daemon.restart()
        assert daemon.pods.find(daemon.pod).state is PodState.NOT_READY
    daemon.agent.print_log(daemon.container, b"T stdout F last\n")
    match ending:
        case "by itself":
            daemon.agent.exit(daemon.container, 7)
            await eventually(lambda: not daemon.inventory.container(daemon.container).running)
        case "stopped":
            await daemon.containers.stop(daemon.container, 30)
        case _:
            await daemon.pods.stop(daemon.pod)
    record = daemon.containers.find(daemon.container)
    code = {"by itself": 7, "stopped": 128 + 15, "with its pod": 137}[ending]
    assert (record.state, record.exit_code) == (ContainerState.EXITED, code)
    assert daemon.log.read_bytes() == b"T stdout F first\nT stdout F last\n"


async def test_container_that_ended_during_the_upgrade_keeps_its_last_line_and_code(daemon: Upgraded) -> None:
    await daemon.kill()
    daemon.agent.print_log(daemon.container, b"T stdout F last\n")
    daemon.agent.exit(daemon.container, 7)
    await upgrade(daemon, OLD)
    await eventually(lambda: not daemon.inventory.container(daemon.container).running)
    assert daemon.containers.find(daemon.container).exit_code == 7
    assert daemon.log.read_bytes() == b"T stdout F last\n"


async def test_vm_of_an_old_agent_that_ends_ends_its_containers(daemon: Upgraded) -> None:
    await upgrade(daemon, OLD)
    problem = daemon.pods.find(daemon.pod).problem
    daemon.fakes.hypervisor.vms[daemon.pod].ended.set()
    await eventually(lambda: not daemon.inventory.container(daemon.container).running)
    assert daemon.containers.find(daemon.container).exit_code == 137
    assert daemon.pods.find(daemon.pod).problem == problem


async def test_running_container_of_an_old_agent_is_removed_from_its_guest(daemon: Upgraded) -> None:
    await upgrade(daemon, OLD)
    await daemon.containers.remove(daemon.container)
    assert daemon.agent.containers == {}
    assert [each.signal for each in daemon.agent.signals] == [9]


async def test_connection_to_an_old_agent_that_is_lost_is_made_again(daemon: Upgraded) -> None:
    await upgrade(daemon, OLD)
    daemon.agent.drop()
    daemon.agent.print_log(daemon.container, b"T stdout F last\n")
    await eventually(lambda: daemon.log.exists() and daemon.log.read_bytes() == b"T stdout F last\n")


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
    daemon.agent.versions = OLD
    daemon.agent.drop()
    await eventually(lambda: daemon.pods.find(daemon.pod).state is PodState.NOT_READY)
    await daemon.pods.remove(daemon.pod)
    daemon.assert_stopped_and_removed()


@pytest.mark.parametrize("welcome", [pb.Welcome(), pb.Welcome(version=7, min_version=99, max_version=99)])
async def test_agent_with_which_nothing_can_be_done_is_not_retried(
    daemon: Upgraded, welcome: pb.Welcome
) -> None:
    """No honest agent refuses its own version, and a hostile one must not be retried for ever."""
    agent = daemon.agent
    agent.welcome = welcome.SerializeToString() or b"\x1a\x00"  # of no bytes none would be sent
    agent.drop()
    container = daemon.inventory.container(daemon.container)
    await eventually(lambda: container.record.state is ContainerState.UNKNOWN)
    tried = len(agent.hellos)
    assert tried <= 3
    with pytest.raises(GuestUnreachable, match="protocol version"):
        await link_of(daemon.inventory.pod(daemon.pod)).guest(5)
    await daemon.containers.stop(daemon.container, 30)
    await daemon.pods.remove(daemon.pod)
    assert len(agent.hellos) == tried
    daemon.assert_stopped_and_removed()
