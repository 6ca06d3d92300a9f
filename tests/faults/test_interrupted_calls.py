"""Calls that the daemon's end cut short: containers that end meanwhile keep their last line and code, and a
retry of the call succeeds."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from sandbox.container import Container
from sandbox.errors import GuestError, Reserved, WrongState
from sandbox.guest import guest_pb2 as pb
from sandbox.pod import Pod
from sandbox.records import ContainerState
from sandbox.spec import ContainerId, ContainerSpec, PodId, PodSpec
from sandbox.store import RETRY_NS
from tests.fakes.guest import FakeAgent
from tests.faults.test_pod_faults import Daemon, pod_spec, root
from tests.kit.eventually import eventually

__all__ = ["root"]  # a fixture

LAST = b"T stdout F last\n"


class Ends:
    """What the log files held at the moment when each container was seen to have ended."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[int, bytes]] = {}

    def container_changed(self, container: Container) -> None:
        if container.record.state is ContainerState.EXITED:
            log = Path(container.record.log_path)
            self.seen[container.id] = (container.record.exit_code, log.read_bytes() if log.exists() else b"")

    def pod_changed(self, pod: Pod) -> None:
        """Nothing."""

    def pod_deleted(self, pod: Pod) -> None:
        """Nothing."""

    def container_deleted(self, container: Container) -> None:
        """Nothing."""


class Site:
    """A pod with containers that log."""

    def __init__(self, root: Path) -> None:
        self.daemon = Daemon(root)
        self.logs = root / "logs"
        self.logs.mkdir()
        self.spec: PodSpec = replace(pod_spec(), log_directory=str(self.logs))

    async def run(self) -> None:
        self.pod = PodId(await self.daemon.pods.run(self.spec))

    @property
    def agent(self) -> FakeAgent:
        return self.daemon.hypervisor.vms[self.pod].agent

    def container_spec(self, name: str) -> ContainerSpec:
        return ContainerSpec(name=name, image="example/web:1", log_path=f"{name}.log")

    async def create(self, name: str) -> ContainerId:
        return await self.daemon.containers.create(self.pod, self.container_spec(name))

    async def start(self, name: str) -> ContainerId:
        container = await self.create(name)
        await self.daemon.containers.start(container)
        return container

    async def restart(self) -> Ends:
        """Kill the daemon and recover; watch the ends of containers from the beginning."""
        await self.daemon.kill()
        self.daemon.start()
        ends = Ends()
        self.daemon.inventory.observe(ends)
        await self.daemon.built.recover()
        return ends

    def end_with(self, container: ContainerId, code: int) -> None:
        """Let a container print its last line and end."""
        self.agent.print_log(container, LAST)
        self.agent.exit(container, code)


@pytest.fixture
async def site(root: Path) -> AsyncIterator[Site]:
    site = Site(root)
    await site.run()
    yield site
    for agent in [vm.agent for vm in site.daemon.hypervisor.vms.values()]:
        agent.answer = lambda request: True
    for pod in list(site.daemon.inventory.pods.values()):
        await site.daemon.pods.remove(pod.id)
    await site.daemon.kill()


async def test_container_that_ends_while_the_daemon_recovers_has_its_last_line_first(site: Site) -> None:
    """Its end arrives when the Welcome was sent and its log was not asked for yet."""
    first, second = await site.start("first"), await site.start("second")

    def end_early(request: pb.Request) -> bool:
        if request.open_log.container_id == first:
            site.end_with(second, 7)
        return True

    site.agent.answer = end_early
    ends = await site.restart()
    await eventually(lambda: second in ends.seen)
    assert ends.seen == {second: (7, LAST)}


async def test_container_that_ends_before_its_start_was_recorded_ends_after_a_restart(site: Site) -> None:
    first, second = await site.start("first"), await site.create("second")
    site.agent.print_log(second, b"T stdout F hello\n")  # the guest has started it

    def end_early(request: pb.Request) -> bool:
        if request.open_log.container_id == first:
            site.end_with(second, 7)
        return True

    site.agent.answer = end_early
    ends = await site.restart()
    await eventually(lambda: second in ends.seen)
    assert ends.seen == {second: (7, b"T stdout F hello\n" + LAST)}


async def test_container_that_ends_while_the_connection_is_lost_has_its_last_line_first(site: Site) -> None:
    first, second = await site.start("first"), await site.start("second")
    ends = Ends()
    site.daemon.inventory.observe(ends)

    def end_early(request: pb.Request) -> bool:
        if request.open_log.container_id == first:
            site.end_with(second, 7)
        return True

    site.agent.answer = end_early
    site.agent.drop()
    await eventually(lambda: second in ends.seen)
    assert ends.seen == {second: (7, LAST)}


Stop = Callable[[Site, ContainerId], Awaitable[None]]
STOPS: dict[str, Stop] = {
    "StopContainer": lambda site, id: site.daemon.containers.stop(id, 30),
    "StopContainer at once": lambda site, id: site.daemon.containers.stop(id, 0),
    "StopPodSandbox": lambda site, id: site.daemon.pods.stop(site.pod),
    "RemoveContainer": lambda site, id: site.daemon.containers.remove(id),
}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
@pytest.mark.parametrize("restarted", [False, True])
async def test_container_that_has_ended_when_it_is_signalled_keeps_its_code(
    site: Site, stop: Stop, restarted: bool
) -> None:
    """The agent knows no process to signal any more, and the end is on its way."""
    container, other = await site.start("main"), await site.start("other")
    ends = await site.restart() if restarted else Ends()
    if not restarted:
        site.daemon.inventory.observe(ends)

    def has_ended(request: pb.Request) -> pb.Reply | bool:
        if request.signal.container_id != container:
            return True
        site.end_with(container, 7)
        return pb.Reply(failure=pb.Failure(step="signal", errno=errno.ESRCH, message="container has ended"))

    site.agent.answer = has_ended
    await stop(site, container)
    assert ends.seen[container] == (7, LAST)
    assert other in site.daemon.inventory.containers


async def test_stop_with_a_signal_that_fails_otherwise_fails(site: Site) -> None:
    container = await site.start("main")
    refused = pb.Reply(failure=pb.Failure(step="signal", errno=errno.EPERM, message="not permitted"))
    site.agent.answer = lambda request: refused if request.HasField("signal") else True
    with pytest.raises(GuestError, match="not permitted"):
        await site.daemon.containers.stop(container, 1)


async def test_stop_of_a_pod_kills_the_others_where_one_signal_fails(site: Site) -> None:
    first, second = await site.start("first"), await site.start("second")
    ends = Ends()
    site.daemon.inventory.observe(ends)
    site.agent.print_log(second, LAST)
    refused = pb.Reply(failure=pb.Failure(step="signal", errno=errno.EPERM, message="not permitted"))
    site.agent.answer = lambda request: refused if request.signal.container_id == first else True
    await site.daemon.pods.stop(site.pod)
    assert ends.seen == {first: (137, b""), second: (137, LAST)}


# ------------------------------------------------------------------------------------ retries


@pytest.mark.parametrize("ended", [False, True])
async def test_start_is_retried_after_a_restart_and_succeeds(site: Site, ended: bool) -> None:
    container = await site.start("main")
    if ended:
        site.end_with(container, 7)
        await eventually(lambda: not site.daemon.inventory.container(container).running)
    with pytest.raises(WrongState):
        await site.daemon.containers.start(container)
    await site.restart()
    await site.daemon.containers.start(container)
    starts = [each for each in site.agent.requests if each.HasField("start")]
    assert len(starts) == 1, "nothing was started again"
    assert site.daemon.containers.find(container).exit_code == (7 if ended else 0)


async def test_start_that_was_not_recorded_is_retried_and_succeeds(site: Site) -> None:
    container = await site.create("main")
    site.agent.print_log(container, b"")
    await site.restart()
    await site.daemon.containers.start(container)
    assert site.daemon.containers.find(container).state is ContainerState.RUNNING
    assert not [each for each in site.agent.requests if each.HasField("start")]


async def test_start_that_never_reached_the_guest_is_retried_and_starts(site: Site) -> None:
    container = await site.create("main")
    await site.restart()
    await site.daemon.containers.start(container)
    assert site.daemon.containers.find(container).state is ContainerState.RUNNING
    with pytest.raises(WrongState):
        await site.daemon.containers.start(container)


async def test_start_of_a_container_that_was_started_long_ago_is_refused(site: Site) -> None:
    container = await site.start("main")
    object_ = site.daemon.inventory.container(container)
    object_.update(started_at_ns=object_.record.started_at_ns - RETRY_NS - 1)
    await site.restart()
    with pytest.raises(WrongState):
        await site.daemon.containers.start(container)


async def test_start_that_failed_is_not_taken_for_one_that_succeeded(site: Site) -> None:
    container = await site.create("main")
    site.agent.answer = lambda request: (
        pb.Reply(failure=pb.Failure(step="exec", errno=2, message="no such program"))
        if request.HasField("start")
        else True
    )
    with pytest.raises(GuestError):
        await site.daemon.containers.start(container)
    await site.restart()
    with pytest.raises(WrongState):
        await site.daemon.containers.start(container)


async def test_run_is_retried_after_a_restart_and_returns_the_same_pod(site: Site) -> None:
    with pytest.raises(Reserved):
        await site.daemon.pods.run(site.spec)
    await site.restart()
    assert await site.daemon.pods.run(site.spec) == site.pod
    with pytest.raises(Reserved):
        await site.daemon.pods.run(replace(site.spec, hostname="another"))
    await site.create("main")
    with pytest.raises(Reserved):
        await site.daemon.pods.run(site.spec)


async def test_run_of_a_name_whose_pod_is_not_ready_is_refused(site: Site) -> None:
    await site.daemon.pods.stop(site.pod)
    await site.restart()
    with pytest.raises(Reserved):
        await site.daemon.pods.run(site.spec)


async def test_create_is_retried_after_a_restart_and_returns_the_same_container(site: Site) -> None:
    container = await site.create("main")
    with pytest.raises(Reserved):
        await site.create("main")
    await site.restart()
    assert await site.create("main") == container
    with pytest.raises(Reserved):
        changed = replace(site.container_spec("main"), command=("other",))
        await site.daemon.containers.create(site.pod, changed)
    await site.daemon.containers.start(container)
    with pytest.raises(Reserved):
        await site.create("main")
