"""Statistics, events and new limits on pods whose guests refuse, fall silent or die."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from sandbox.errors import GuestError, InvalidSpec, NotFound, VmmError, WrongState
from sandbox.events import Event, EventKind, Subscription
from sandbox.guest import guest_pb2 as pb
from sandbox.pod import Pod
from sandbox.records import ContainerState, PodState
from sandbox.spec import ContainerSpec, PodId, Resources, VmSize
from sandbox.stats import collector
from sandbox.stats.collector import RATE_WINDOW_NS, Rate, StatsCollector
from sandbox.stats.layer_usage import LayerUsage
from sandbox.stats.parse import PodStats
from sandbox.usage import CGROUP_FILES
from sandbox.vm_pods import control
from sandbox.vm_pods.usage import PATHS
from tests.fakes.guest import FakeAgent
from tests.fakes.host import FakeRootfs
from tests.faults.test_pod_faults import Daemon, container_spec, pod_spec

MIB = 1 << 20


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


@pytest.fixture
async def meter(daemon: Daemon) -> AsyncIterator[StatsCollector]:
    meter = StatsCollector(daemon.inventory, daemon.engines, LayerUsage(cast(Any, FakeRootfs(daemon.ledger))))
    yield meter
    await meter.close()


class Guest:
    """Answers ReadCgroup as a guest would: every cgroup has used `cpu_usec`."""

    def __init__(self, agent: FakeAgent) -> None:
        self.agent = agent
        self.cpu_usec = 1_000_000
        self.reads: list[pb.ReadCgroup] = []
        self.writes: list[pb.WriteCgroup] = []
        self.silent = False
        self.refused = ""  # name of a file that cannot be written
        self.wall_ns = 0
        self.rubbish = False
        agent.answer = self.answer

    def answer(self, request: pb.Request) -> pb.Reply | bool | None:
        match request.WhichOneof("body"):
            case "read_cgroup":
                self.reads.append(request.read_cgroup)
                return None if self.silent else self.values(request.read_cgroup)
            case "write_cgroup":
                self.writes.append(request.write_cgroup)
                if any(file.name == self.refused for file in request.write_cgroup.files):
                    return pb.Reply(
                        failure=pb.Failure(step=f"cgroup {self.refused}", errno=22, message="bad")
                    )
        return True

    def values(self, read: pb.ReadCgroup) -> pb.Reply:
        one = [f"usage_usec {self.cpu_usec}\n".encode(), *[b""] * (len(CGROUP_FILES) - 1)]
        files = [] if self.rubbish else [*one * len(read.container_ids), *[b""] * len(PATHS)]
        counts = [pb.ProcessCount(processes=1) for _ in read.container_ids]
        values = pb.CgroupValues(values=files, wall_ns=self.wall_ns, counts=counts)
        return pb.Reply(values=values)


async def running(daemon: Daemon, name: str = "web", **fields: Any) -> tuple[PodId, str, Guest]:
    id = await daemon.pods.run(pod_spec(name))
    container = await daemon.containers.create(id, container_spec(**fields))
    await daemon.containers.start(container)
    return id, container, Guest(daemon.hypervisor.vms[id].agent)


async def read(meter: StatsCollector, *ids: PodId, files: bool = False) -> list[PodStats]:
    return [one async for one in meter.read(ids, files=files)]


# --------------------------------------------------------------------------------- statistics


async def test_one_round_trip_brings_a_pod(daemon: Daemon, meter: StatsCollector) -> None:
    id, container, guest = await running(daemon)
    (found,) = await read(meter, id)
    assert (found.usage.cpu.usage_ns, found.processes) == (10**9, 1)
    assert [one.container_id for one in found.containers] == [container]
    assert found.containers[0].layer is not None
    assert found.containers[0].layer.bytes == 4096
    assert len(guest.reads) == 1
    assert guest.reads[0].count == pb.ReadCgroup.PROCESSES
    await read(meter, id, files=True)
    assert guest.reads[1].count == pb.ReadCgroup.FILES


async def test_containers_that_do_not_run_are_not_asked_about(daemon: Daemon, meter: StatsCollector) -> None:
    id, container, guest = await running(daemon)
    await daemon.containers.create(id, container_spec(attempt=1))
    await daemon.containers.stop(container, 0)
    (found,) = await read(meter, id)
    assert found.containers == ()
    assert list(guest.reads[0].container_ids) == ["."]


async def test_the_guests_clock_is_believed_within_reason(daemon: Daemon, meter: StatsCollector) -> None:
    import time

    id, _, guest = await running(daemon)
    for wall_ns in (0, 2**62):
        guest.wall_ns = wall_ns
        before = time.time_ns()
        (found,) = await read(meter, id)
        assert before <= found.at_ns <= time.time_ns()


async def test_rate_needs_two_samples() -> None:
    rate = Rate()
    assert rate.sample(RATE_WINDOW_NS, 1000) is None
    assert rate.sample(RATE_WINDOW_NS + 1, 2000) is None, "the samples are too close"
    assert rate.sample(3 * RATE_WINDOW_NS, 1000 + RATE_WINDOW_NS) == 500_000_000
    assert rate.sample(3 * RATE_WINDOW_NS + 1, 10**12) == 500_000_000
    assert rate.sample(5 * RATE_WINDOW_NS, 0) is None, "the counter started again"
    assert rate.sample(6 * RATE_WINDOW_NS, RATE_WINDOW_NS) == 1_000_000_000


async def test_who_asks_at_the_same_time_shares_a_read(daemon: Daemon, meter: StatsCollector) -> None:
    id, _, guest = await running(daemon)
    found = await asyncio.gather(*(read(meter, id) for _ in range(10)))
    assert all(len(one) == 1 for one in found)
    assert len(guest.reads) == 1


async def test_a_silent_guest_is_left_out_in_time(
    daemon: Daemon, meter: StatsCollector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(collector, "WAIT_S", 0.05)
    first, _, silent = await running(daemon)
    second, _, _ = await running(daemon, "other")
    silent.silent = True
    for _ in range(3):
        async with asyncio.timeout(1):
            assert [one.pod_id for one in await read(meter, first, second)] == [second]
    assert len(silent.reads) == 1, "one question at a time"
    assert caplog.text.count("cannot read the usage") == 1, "logged once"
    began = asyncio.get_running_loop().time()
    await read(meter, first)
    assert asyncio.get_running_loop().time() - began < 0.04, "who asks later does not wait again"


async def test_a_guest_that_answers_at_last_is_asked_again(
    daemon: Daemon, meter: StatsCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "WAIT_S", 0.05)
    monkeypatch.setattr(control, "GUEST_CALL_TIMEOUT_S", 0.1)
    id, _, guest = await running(daemon)
    guest.silent = True
    assert await read(meter, id) == []
    guest.silent = False
    async with asyncio.timeout(5):
        while not await read(meter, id):
            await asyncio.sleep(0.01)


async def test_a_lost_connection_holds_up_nobody(daemon: Daemon, meter: StatsCollector) -> None:
    id, _, _ = await running(daemon)
    pod = daemon.inventory.pods[id]
    pod.client = None
    async with asyncio.timeout(1):
        assert await read(meter, id) == []


async def test_a_vm_that_dies_while_it_is_asked(daemon: Daemon, meter: StatsCollector) -> None:
    id, _, guest = await running(daemon)
    guest.silent = True
    asking = asyncio.create_task(read(meter, id))
    await _until(lambda: guest.reads)
    await daemon.hypervisor.vms[id].die()
    async with asyncio.timeout(2):
        assert await asking == []


async def test_an_agent_that_answers_something_else(daemon: Daemon, meter: StatsCollector) -> None:
    id, _, guest = await running(daemon)
    guest.rubbish = True
    assert await read(meter, id) == []


async def test_unknown_and_stopped_pods_are_left_out(daemon: Daemon, meter: StatsCollector) -> None:
    id, _, guest = await running(daemon)
    await daemon.pods.stop(id)
    assert await read(meter, PodId("nope"), id) == []
    assert guest.reads == []


async def test_a_reader_that_goes_away_leaves_the_others_their_read(
    daemon: Daemon, meter: StatsCollector
) -> None:
    id, _, guest = await running(daemon)
    guest.silent = True
    gone, stays = (asyncio.create_task(read(meter, id)) for _ in range(2))
    await _until(lambda: guest.reads)
    gone.cancel()
    daemon.hypervisor.vms[id].agent.drop()
    async with asyncio.timeout(2):
        assert await stays == []
    assert gone.cancelled() or await asyncio.gather(gone, return_exceptions=True)


async def test_closing_ends_reads_under_way(daemon: Daemon) -> None:
    meter = StatsCollector(daemon.inventory, daemon.engines, LayerUsage(cast(Any, FakeRootfs(daemon.ledger))))
    id, _, guest = await running(daemon)
    guest.silent = True
    asking = asyncio.create_task(read(meter, id))
    await _until(lambda: guest.reads)
    await meter.close()
    async with asyncio.timeout(1):
        assert await asking == []


# ------------------------------------------------------------------------------------- events


async def seen(subscription: Subscription, count: int) -> list[Event]:
    found: list[Event] = []
    async with asyncio.timeout(5):
        async for event in subscription:
            found.append(event)
            if len(found) == count:
                break
    return found


async def test_the_events_of_a_life(daemon: Daemon) -> None:
    with daemon.events.subscribe() as subscription:
        id, container, _ = await running(daemon)
        await daemon.containers.stop(container, 0)
        await daemon.containers.remove(container)
        await daemon.pods.stop(id)
        await daemon.pods.remove(id)
        told = await seen(subscription, 8)
    assert [(event.id, event.kind) for event in told] == [
        (id, EventKind.CREATED),
        (id, EventKind.STARTED),
        (container, EventKind.CREATED),
        (container, EventKind.STARTED),
        (container, EventKind.STOPPED),
        (container, EventKind.DELETED),
        (id, EventKind.STOPPED),
        (id, EventKind.DELETED),
    ]
    assert [len(event.containers) for event in told] == [0, 0, 1, 1, 1, 0, 0, 0]
    assert [event.containers[0].state for event in told[2:5]] == [
        ContainerState.CREATED,
        ContainerState.RUNNING,
        ContainerState.EXITED,
    ]
    assert told[1].pod.state is PodState.READY
    assert told[7].pod.state is PodState.NOT_READY


async def test_removing_a_pod_tells_of_its_containers(daemon: Daemon) -> None:
    id, container, _ = await running(daemon)
    with daemon.events.subscribe() as subscription:
        await daemon.pods.remove(id)
        told = await seen(subscription, 4)
    assert {(event.id, event.kind) for event in told} == {
        (container, EventKind.STOPPED),
        (container, EventKind.DELETED),
        (id, EventKind.STOPPED),
        (id, EventKind.DELETED),
    }


async def test_a_dead_vm_is_told_for_the_pod_and_its_containers(daemon: Daemon) -> None:
    id, container, _ = await running(daemon)
    with daemon.events.subscribe() as subscription:
        await daemon.hypervisor.vms[id].die()
        told = await seen(subscription, 2)
    assert {(event.id, event.kind) for event in told} == {
        (id, EventKind.STOPPED),
        (container, EventKind.STOPPED),
    }


async def test_what_failed_to_start_is_told_only_if_it_was_shown(daemon: Daemon) -> None:
    with daemon.events.subscribe() as subscription:
        daemon.ledger.faults["vm.start"] = "before"
        with pytest.raises(Exception, match=r"vm\.start"):
            await daemon.pods.run(pod_spec())
        daemon.ledger.faults.clear()
        id = await daemon.pods.run(pod_spec())
        daemon.ledger.faults["rootfs.up"] = "after"
        with pytest.raises(Exception, match=r"rootfs\.up"):
            await daemon.containers.create(id, container_spec())
        daemon.ledger.faults.clear()
        daemon.events.close()
        told = [event async for event in subscription]
    assert [(event.id, event.kind) for event in told] == [(id, EventKind.CREATED), (id, EventKind.STARTED)]


# ------------------------------------------------------------------------------------- limits


async def test_limits_are_changed_in_place(daemon: Daemon) -> None:
    _, container, guest = await running(daemon)
    await daemon.containers.update(container, Resources(memory_limit=64 * MIB, oom_score_adj=500))
    await daemon.containers.update(container, Resources(cpu_quota=50_000))
    (first, second) = guest.writes
    assert first.container_id == container
    assert {file.name: file.value for file in first.files}["memory.max"] == str(64 * MIB)
    assert first.oom_score.adj == 500
    assert {file.name: file.value for file in second.files} == {
        "memory.oom.group": "1",
        "cpu.max": "50000 100000",
        "memory.max": str(64 * MIB),
    }
    record = daemon.containers.find(container)
    assert (record.resources.memory_limit, record.resources.cpu_quota) == (64 * MIB, 50_000)
    plan = daemon.inventory.container(container).plan
    assert plan.process.oom_score_adj == 500, "an exec gets the same"
    await daemon.restart()
    assert daemon.containers.find(container).resources == record.resources
    assert daemon.inventory.container(container).plan.process.oom_score_adj == 500


async def test_limits_that_the_guest_refuses_are_taken_back(daemon: Daemon) -> None:
    _, container, guest = await running(daemon, resources=Resources(memory_limit=64 * MIB))
    guest.refused = "cpu.max"
    with pytest.raises(GuestError, match=r"cpu\.max"):
        await daemon.containers.update(container, Resources(memory_limit=32 * MIB, cpu_quota=50_000))
    assert {file.name: file.value for file in guest.writes[-1].files}["memory.max"] == str(64 * MIB)
    assert daemon.containers.find(container).resources == Resources(memory_limit=64 * MIB)


async def test_bad_limits_change_nothing(daemon: Daemon) -> None:
    id, container, guest = await running(daemon)
    with pytest.raises(InvalidSpec, match="cpu_period"):
        await daemon.containers.update(container, Resources(cpu_period=5, memory_limit=9000 * MIB))
    with pytest.raises(InvalidSpec, match="cpu_period"):
        await daemon.pods.update(id, Resources(cpu_period=5), Resources())
    assert (guest.writes, daemon.grown) == ([], [])


async def test_limits_of_a_container_that_is_not_started_yet(daemon: Daemon) -> None:
    id, _, guest = await running(daemon)
    other = await daemon.containers.create(id, container_spec(attempt=1))
    await daemon.containers.update(other, Resources(memory_limit=64 * MIB))
    assert guest.writes == []
    await daemon.containers.start(other)
    start = next(each.start for each in guest.agent.requests if each.start.id == other)
    assert {file.name: file.value for file in start.cgroup}["memory.max"] == str(64 * MIB)


async def test_limits_of_what_has_ended(daemon: Daemon) -> None:
    id, container, _ = await running(daemon)
    await daemon.containers.stop(container, 0)
    with pytest.raises(WrongState):
        await daemon.containers.update(container, Resources(cpu_quota=50_000))
    await daemon.pods.stop(id)
    with pytest.raises(WrongState):
        await daemon.pods.update(id, Resources(cpu_quota=50_000), Resources())
    with pytest.raises(NotFound):
        await daemon.pods.update("nope", Resources(), Resources())


async def test_limits_of_all_containers_together(daemon: Daemon) -> None:
    id, _, guest = await running(daemon)
    await daemon.pods.update(id, Resources(memory_limit=64 * MIB), Resources(cpu_quota=5000))
    (write,) = guest.writes
    assert (write.container_id, write.HasField("oom_score")) == (".", False)
    assert [(file.name, file.value) for file in write.files] == [("memory.max", str(64 * MIB))]
    record = daemon.pods.find(id)
    assert (record.resources.memory_limit, record.overhead.cpu_quota) == (64 * MIB, 5000)
    assert record.spec.resources == Resources(), "the wish of the start stays what it was"


async def test_a_vm_is_made_large_enough_first(daemon: Daemon) -> None:
    id, container, guest = await running(daemon)
    await daemon.containers.update(container, Resources(memory_limit=1000 * MIB, cpu_quota=150_000))
    assert daemon.grown == [VmSize(memory_mib=1128, vcpus=2)]
    await daemon.pods.update(id, Resources(memory_limit=2000 * MIB), Resources())
    assert daemon.grown[1] == VmSize(memory_mib=2128, vcpus=2)
    await daemon.containers.update(container, Resources(memory_limit=10 * MIB))
    assert guest.writes, "and a lowered limit is written all the same"


async def test_a_container_with_huge_pages_has_them_before_it_starts(daemon: Daemon) -> None:
    id, _, guest = await running(daemon)
    wish = Resources(hugepage_limits={"2MB": 64 * MIB, "1GB": 0})
    spec = ContainerSpec(name="huge", image="example/web:1", resources=wish)
    container = await daemon.containers.create(id, spec)
    assert daemon.grown == [VmSize(memory_mib=256 + 64, vcpus=1, huge_mib=64)]
    asked = [request.huge_pages for request in guest.agent.requests if request.HasField("huge_pages")]
    assert [pages.count for pages in asked] == [32]
    await daemon.containers.remove(container)
    pages = Resources(hugepage_limits={"1GB": 1 << 30})
    with pytest.raises(InvalidSpec, match="hugepage_limits"):
        await daemon.containers.create(id, ContainerSpec(name="g", image="example/web:1", resources=pages))
    assert len(daemon.containers.list()) == 1


async def test_a_vm_that_cannot_grow_keeps_its_limits(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(pod: Pod, size: VmSize) -> None:
        raise VmmError("no room")

    monkeypatch.setattr(daemon.fakes, "grow", refuse)
    await daemon.restart()
    id, container, guest = await running(daemon)
    with pytest.raises(VmmError, match="no room"):
        await daemon.containers.update(container, Resources(memory_limit=1000 * MIB))
    with pytest.raises(VmmError, match="no room"):
        await daemon.pods.update(id, Resources(memory_limit=1000 * MIB), Resources())
    assert guest.writes == []
    assert daemon.containers.find(container).resources == Resources()


async def _until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)
