"""An agent that ends each connection: it costs little, and its pod alone suffers."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sandbox.errors import GuestUnreachable
from sandbox.guest.frames import MAX_WELCOME
from sandbox.records import PodState
from sandbox.spec import ContainerSpec, PodId, PodSpec
from sandbox.vm_pods import reconnects
from sandbox.vm_pods.link import link_of
from tests.fakes.daemon import FakeHost, RestartableDaemon
from tests.fakes.guest import FakeAgent
from tests.kit.eventually import eventually

MAIN = ContainerSpec(name="main", image="example/web:1")


class Lied(RestartableDaemon):
    """A daemon over fakes."""

    def __init__(self, root: Path) -> None:
        self.fakes = FakeHost(root)
        super().__init__(self.fakes)

    def agent(self, pod: PodId) -> FakeAgent:
        """Return the agent of a pod's VM."""
        return self.fakes.hypervisor.vms[pod].agent


@pytest.fixture
async def daemon(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lied]:
    monkeypatch.setattr(reconnects, "FIRST_PAUSE_S", 0.01)
    root = Path(tempfile.mkdtemp(prefix="husk-faults-"))  # short, for the sockets in it
    daemon = Lied(root)
    yield daemon
    for pod in list(daemon.inventory.pods.values()):
        await daemon.pods.remove(pod.id)
    assert daemon.fakes.ledger.held == set()
    await daemon.kill()
    shutil.rmtree(root)


@pytest.mark.parametrize("welcome", [b"\xff" * 100, bytes(MAX_WELCOME + 1)], ids=["garbage", "too long"])
async def test_agent_that_breaks_each_connection_makes_its_pod_not_ready(
    daemon: Lied, caplog: pytest.LogCaptureFixture, welcome: bytes
) -> None:
    caplog.set_level(logging.WARNING, "sandbox")
    lying, other = [PodId(await daemon.pods.run(PodSpec(name=name, namespace="n", uid="u"))) for name in "ab"]
    container = await daemon.containers.create(lying, MAIN)
    await daemon.containers.start(container)
    agent = daemon.agent(lying)
    before = len(agent.hellos)
    agent.welcome = welcome
    agent.drop()
    await eventually(lambda: daemon.pods.find(lying).state, until=PodState.NOT_READY.__eq__, timeout_s=30)
    assert "its agent cannot be reached" in daemon.pods.find(lying).problem
    assert len(agent.hellos) - before <= reconnects.FAILURES_MAX
    lines = [each.getMessage() for each in caplog.records if lying in each.getMessage()]
    assert len(lines) == 2, lines
    with pytest.raises(GuestUnreachable, match="cannot be reached"):
        await link_of(daemon.inventory.pod(lying)).guest(5)
    assert daemon.pods.find(other).state is PodState.READY
    await daemon.containers.create(other, MAIN)
    await daemon.pods.stop(lying)


async def test_agent_that_is_lost_once_is_connected_again_at_once(daemon: Lied) -> None:
    pod = PodId(await daemon.pods.run(PodSpec(name="a", namespace="n", uid="u")))
    before = len(daemon.agent(pod).hellos)
    daemon.agent(pod).drop()
    await eventually(lambda: len(daemon.agent(pod).hellos) > before)
    assert daemon.pods.find(pod).state is PodState.READY
