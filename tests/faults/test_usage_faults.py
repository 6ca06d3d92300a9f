"""Stats, events and changed limits of pods whose guests refuse, do not answer or die."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.errors import BeyondNode, GuestError, InvalidSpec, NotFound, PhaseFailed, VmmError, WrongState
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
from sandbox.vm_pods.link import link_of
from sandbox.vm_pods.usage import PATHS
from tests.fakes.guest import FakeAgent
from tests.fakes.host import FakeRootfs
from tests.faults.test_pod_faults import Daemon, container_spec, pod_spec
from tests.kit.eventually import eventually

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
async def stats(daemon: Daemon) -> AsyncIterator[StatsCollector]:
    stats = StatsCollector(daemon.inventory, daemon.engines, LayerUsage(FakeRootfs(daemon.ledger)))
    yield stats
    await stats.close()


class Guest:
    """Replies to ReadCgroup as a guest does: every cgroup has used `cpu_usec`."""

    def __init__(self, agent: FakeAgent) -> None:
        self.agent = agent
        self.cpu_usec = 1_000_000
        self.reads: list[pb.ReadCgroup] = []
        self.writes: list[pb.WriteCgroup] = []
        self.silent = False
        self.refused = ""  # name of a file that cannot be written
        self.wall_ns = 0
        self.malformed = False
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
        files = [] if self.malformed else [*one * len(read.container_ids), *[b""] * len(PATHS)]
        counts = [pb.ProcessCount(processes=1) for _ in read.container_ids]
        values = pb.CgroupValues(values=files, wall_ns=self.wall_ns, counts=counts)
        return pb.Reply(values=values)


async def running(daemon: Daemon, name: str = "web", **fields: Any) -> tuple[PodId, str, Guest]:
    id = await daemon.pods.run(pod_spec(name))
    container = await daemon.containers.create(id, container_spec(**fields))
    await daemon.containers.start(container)
    return id, container, Guest(daemon.hypervisor.vms[id].agent)


async def read(stats: StatsCollector, *ids: PodId, files: bool = False) -> list[PodStats]:
    return [one async for one in stats.read(ids, files=files)]


# --------------------------------------------------------------------------------- statistics


async def test_one_round_trip_reads_a_pod(daemon: Daemon, stats: StatsCollector) -> None:
    id, container, guest = await running(daemon)
    (found,) = await read(stats, id)
    assert (found.usage.cpu.usage_ns, found.processes) == (10**9, 1)
    assert [one.container_id for one in found.containers] == [container]
    assert found.containers[0].layer is not None
    assert found.containers[0].layer.bytes == 4096
    assert len(guest.reads) == 1
    assert guest.reads[0].count == pb.ReadCgroup.PROCESSES
    await read(stats, id, files=True)
    assert guest.reads[1].count == pb.ReadCgroup.FILES


async def test_containers_that_do_not_run_are_not_read(daemon: Daemon, stats: StatsCollector) -> None:
    id, container, guest = await running(daemon)
    await daemon.containers.create(id, container_spec(attempt=1))
    await daemon.containers.stop(container, 0)
    (found,) = await read(stats, id)
    assert found.containers == ()
    assert list(guest.reads[0].container_ids) == ["."]


async def test_time_of_the_guest_is_limited_to_the_round_trip(daemon: Daemon, stats: StatsCollector) -> None:
    id, _, guest = await running(daemon)
    for wall_ns in (0, 2**62):
        guest.wall_ns = wall_ns
        before = time.time_ns()
        (found,) = await read(stats, id)
        assert before <= found.at_ns <= time.time_ns()


async def test_rate_needs_two_samples() -> None:
    rate = Rate()
    assert rate.sample(RATE_WINDOW_NS, 1000) is None
    assert rate.sample(RATE_WINDOW_NS + 1, 2000) is None, "the samples are too close"
    assert rate.sample(3 * RATE_WINDOW_NS, 1000 + RATE_WINDOW_NS) == 500_000_000
    assert rate.sample(3 * RATE_WINDOW_NS + 1, 10**12) == 500_000_000
    assert rate.sample(5 * RATE_WINDOW_NS, 0) is None, "the counter started again"
    assert rate.sample(6 * RATE_WINDOW_NS, RATE_WINDOW_NS) == 1_000_000_000


async def test_concurrent_callers_share_one_read(daemon: Daemon, stats: StatsCollector) -> None:
    id, _, guest = await running(daemon)
    found = await asyncio.gather(*(read(stats, id) for _ in range(10)))
    assert all(len(one) == 1 for one in found)
    assert len(guest.reads) == 1


async def test_guest_that_does_not_answer_is_left_out_in_time(
    daemon: Daemon, stats: StatsCollector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(collector, "WAIT_S", 0.05)
    first, _, silent = await running(daemon)
    second, _, _ = await running(daemon, "other")
    silent.silent = True
    for _ in range(3):
        async with asyncio.timeout(1):
            assert [one.pod_id for one in await read(stats, first, second)] == [second]
    assert len(silent.reads) == 1, "one read at a time"
    assert caplog.text.count("cannot read the usage") == 1, "logged once"
    began = asyncio.get_running_loop().time()
    await read(stats, first)
    assert asyncio.get_running_loop().time() - began < 0.04, "later callers do not wait again"


async def test_guest_that_answers_again_is_read_again(
    daemon: Daemon, stats: StatsCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "WAIT_S", 0.05)
    monkeypatch.setattr(control, "GUEST_CALL_TIMEOUT_S", 0.1)
    id, _, guest = await running(daemon)
    guest.silent = True
    assert await read(stats, id) == []
    guest.silent = False
    await eventually(lambda: read(stats, id))


async def test_pod_without_connection_is_left_out_at_once(daemon: Daemon, stats: StatsCollector) -> None:
    id, _, _ = await running(daemon)
    pod = daemon.inventory.pods[id]
    link_of(pod).client = None
    async with asyncio.timeout(1):
        assert await read(stats, id) == []


async def test_vm_that_dies_during_a_read_is_left_out(daemon: Daemon, stats: StatsCollector) -> None:
    id, _, guest = await running(daemon)
    guest.silent = True
    reading = asyncio.create_task(read(stats, id))
    await eventually(lambda: guest.reads)
    await daemon.hypervisor.vms[id].die()
    async with asyncio.timeout(2):
        assert await reading == []


async def test_agent_that_sends_the_wrong_values_is_left_out(daemon: Daemon, stats: StatsCollector) -> None:
    id, _, guest = await running(daemon)
    guest.malformed = True
    assert await read(stats, id) == []


async def test_unknown_and_stopped_pods_are_left_out(daemon: Daemon, stats: StatsCollector) -> None:
    id, _, guest = await running(daemon)
    await daemon.pods.stop(id)
    assert await read(stats, PodId("nope"), id) == []
    assert guest.reads == []


async def test_cancelled_caller_leaves_the_read_to_the_others(daemon: Daemon, stats: StatsCollector) -> None:
    id, _, guest = await running(daemon)
    guest.silent = True
    gone, stays = (asyncio.create_task(read(stats, id)) for _ in range(2))
    await eventually(lambda: guest.reads)
    gone.cancel()
    daemon.hypervisor.vms[id].agent.drop()
    async with asyncio.timeout(2):
        assert await stays == []
    assert gone.cancelled() or await asyncio.gather(gone, return_exceptions=True)


async def test_close_cancels_running_reads(daemon: Daemon) -> None:
    stats = StatsCollector(daemon.inventory, daemon.engines, LayerUsage(FakeRootfs(daemon.ledger)))
    id, _, guest = await running(daemon)
    guest.silent = True
    reading = asyncio.create_task(read(stats, id))
    await eventually(lambda: guest.reads)
    await stats.close()
    async with asyncio.timeout(1):
        assert await reading == []


# ------------------------------------------------------------------------------------- events


async def seen(subscription: Subscription, count: int) -> list[Event]:
    found: list[Event] = []
    async with asyncio.timeout(5):
        async for event in subscription:
            found.append(event)
            if len(found) == count:
                break
    return found


async def test_life_of_a_pod_has_its_events_in_order(daemon: Daemon) -> None:
    with daemon.events.subscribe() as subscription:
        id, container, _ = await running(daemon)
        await daemon.containers.stop(container, 0)
        await daemon.containers.remove(container)
        await daemon.pods.stop(id)
        await daemon.pods.remove(id)
        events = await seen(subscription, 8)
    assert [(event.id, event.kind) for event in events] == [
        (id, EventKind.CREATED),
        (id, EventKind.STARTED),
        (container, EventKind.CREATED),
        (container, EventKind.STARTED),
        (container, EventKind.STOPPED),
        (container, EventKind.DELETED),
        (id, EventKind.STOPPED),
        (id, EventKind.DELETED),
    ]
    assert [len(event.containers) for event in events] == [0, 0, 1, 1, 1, 0, 0, 0]
    assert [event.containers[0].state for event in events[2:5]] == [
        ContainerState.CREATED,
        ContainerState.RUNNING,
        ContainerState.EXITED,
    ]
    assert events[1].pod.state is PodState.READY
    assert events[7].pod.state is PodState.NOT_READY


async def test_removed_pod_has_events_of_its_containers(daemon: Daemon) -> None:
    id, container, _ = await running(daemon)
    with daemon.events.subscribe() as subscription:
        await daemon.pods.remove(id)
        events = await seen(subscription, 4)
    assert {(event.id, event.kind) for event in events} == {
        (container, EventKind.STOPPED),
        (container, EventKind.DELETED),
        (id, EventKind.STOPPED),
        (id, EventKind.DELETED),
    }


async def test_dead_vm_has_events_of_the_pod_and_its_containers(daemon: Daemon) -> None:
    id, container, _ = await running(daemon)
    with daemon.events.subscribe() as subscription:
        await daemon.hypervisor.vms[id].die()
        events = await seen(subscription, 2)
    assert {(event.id, event.kind) for event in events} == {
        (id, EventKind.STOPPED),
        (container, EventKind.STOPPED),
    }


async def test_failed_start_has_no_event_unless_it_was_listed(daemon: Daemon) -> None:
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
        events = [event async for event in subscription]
    assert [(event.id, event.kind) for event in events] == [(id, EventKind.CREATED), (id, EventKind.STARTED)]


# ------------------------------------------------------------------------------------- limits


async def test_limits_of_a_running_container_are_changed(daemon: Daemon) -> None:
    _, container, guest = await running(daemon)
    await daemon.containers.update(container, Resources(memory_limit=64 * MIB, oom_score_adj=500))
    await daemon.containers.update(container, Resources(cpu_quota=50_000))
    (first, second) = guest.writes
    assert first.container_id == container
    assert {file.name: file.value for file in first.files}["memory.max"] == str(64 * MIB)
    assert first.oom_score.adj == 500
    assert {file.name: file.value for file in second.files} == {
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


async def test_limits_that_the_guest_refuses_are_restored(daemon: Daemon) -> None:
    _, container, guest = await running(daemon, resources=Resources(memory_limit=64 * MIB))
    guest.refused = "cpu.max"
    with pytest.raises(GuestError, match=r"cpu\.max"):
        await daemon.containers.update(container, Resources(memory_limit=32 * MIB, cpu_quota=50_000))
    assert {file.name: file.value for file in guest.writes[-1].files}["memory.max"] == str(64 * MIB)
    assert daemon.containers.find(container).resources == Resources(memory_limit=64 * MIB)


async def test_invalid_limits_change_nothing(daemon: Daemon) -> None:
    id, container, guest = await running(daemon)
    with pytest.raises(InvalidSpec, match="cpu_period"):
        await daemon.containers.update(container, Resources(cpu_period=5, memory_limit=9000 * MIB))
    with pytest.raises(InvalidSpec, match="cpu_period"):
        await daemon.pods.update(id, Resources(cpu_period=5), Resources())
    assert (guest.writes, daemon.grown) == ([], [])


async def test_limits_of_a_created_container_apply_at_its_start(daemon: Daemon) -> None:
    id, _, guest = await running(daemon)
    other = await daemon.containers.create(id, container_spec(attempt=1))
    await daemon.containers.update(other, Resources(memory_limit=64 * MIB))
    assert guest.writes == []
    await daemon.containers.start(other)
    start = next(each.start for each in guest.agent.requests if each.start.id == other)
    assert {file.name: file.value for file in start.cgroup}["memory.max"] == str(64 * MIB)


async def test_limits_of_a_stopped_container_or_pod_are_rejected(daemon: Daemon) -> None:
    id, container, _ = await running(daemon)
    await daemon.containers.stop(container, 0)
    with pytest.raises(WrongState):
        await daemon.containers.update(container, Resources(cpu_quota=50_000))
    await daemon.pods.stop(id)
    with pytest.raises(WrongState):
        await daemon.pods.update(id, Resources(cpu_quota=50_000), Resources())
    with pytest.raises(NotFound):
        await daemon.pods.update("nope", Resources(), Resources())


async def test_limits_of_a_pod_apply_to_all_containers_together(daemon: Daemon) -> None:
    id, _, guest = await running(daemon)
    await daemon.pods.update(id, Resources(memory_limit=64 * MIB), Resources(cpu_quota=5000))
    (write,) = guest.writes
    assert (write.container_id, write.HasField("oom_score")) == (".", False)
    assert [(file.name, file.value) for file in write.files] == [("memory.max", str(64 * MIB))]
    record = daemon.pods.find(id)
    assert (record.resources.memory_limit, record.overhead.cpu_quota) == (64 * MIB, 5000)
    assert record.spec.resources == Resources(), "the original spec is unchanged"


async def test_vm_grows_before_limits_are_written(daemon: Daemon) -> None:
    id, container, guest = await running(daemon)
    await daemon.containers.update(container, Resources(memory_limit=1000 * MIB, cpu_quota=150_000))
    assert daemon.grown == [VmSize(memory_mib=1128, vcpus=2)]
    await daemon.pods.update(id, Resources(memory_limit=2000 * MIB), Resources())
    assert daemon.grown[1] == VmSize(memory_mib=2128, vcpus=2)
    await daemon.containers.update(container, Resources(memory_limit=10 * MIB))
    assert guest.writes, "and a lowered limit is written too"


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Resources(memory_limit=4097 * MIB), "4097 MiB asked for; the node has 4096 MiB and 4 CPUs"),
        (Resources(cpu_quota=500_000), "5 CPUs asked for; the node has 4096 MiB and 4 CPUs"),
    ],
)
async def test_limits_beyond_the_node_are_refused_and_change_nothing(
    daemon: Daemon, limits: Resources, words: str
) -> None:
    id, container, guest = await running(daemon, resources=Resources(memory_limit=64 * MIB))
    created = await daemon.containers.create(id, container_spec(attempt=1))
    grown = list(daemon.grown)
    for each in (container, created):
        before = daemon.containers.find(each).resources
        with pytest.raises(BeyondNode, match=words):
            await daemon.containers.update(each, limits)
        assert daemon.containers.find(each).resources == before
    with pytest.raises(BeyondNode, match=words):
        await daemon.pods.update(id, limits, Resources())
    with pytest.raises(BeyondNode, match=words):
        await daemon.containers.create(id, container_spec(attempt=2, resources=limits))
    assert daemon.pods.find(id).resources == Resources()
    assert (guest.writes, daemon.grown, len(daemon.containers.list())) == ([], grown, 2)


async def test_memory_alone_after_swap_is_applied_without_swap(daemon: Daemon) -> None:
    _, container, guest = await running(
        daemon, resources=Resources(memory_limit=64 * MIB, memory_swap_limit=64 * MIB)
    )
    for limit in (128 * MIB, 32 * MIB):
        await daemon.containers.update(container, Resources(memory_limit=limit))
        written = {file.name: file.value for file in guest.writes[-1].files}
        assert written == {"memory.max": str(limit), "memory.swap.max": "0"}
        resources = daemon.containers.find(container).resources
        assert (resources.memory_limit, resources.memory_swap_limit) == (limit, limit)


async def test_swap_is_refused_where_it_is_asked_for_and_changes_nothing(daemon: Daemon) -> None:
    id, container, guest = await running(daemon)
    swap = Resources(memory_limit=64 * MIB, memory_swap_limit=128 * MIB)
    with pytest.raises(InvalidSpec, match="a VM has no swap"):
        await daemon.containers.update(container, swap)
    with pytest.raises(InvalidSpec, match="a VM has no swap"):
        await daemon.pods.update(id, swap, Resources())
    with pytest.raises(InvalidSpec, match="a VM has no swap"):
        await daemon.containers.create(id, container_spec(attempt=1, resources=swap))
    assert (guest.writes, daemon.grown, len(daemon.containers.list())) == ([], [], 1)


async def test_vm_has_the_limits_of_its_containers_before_they_start(daemon: Daemon) -> None:
    """Each grows it in turn; one that was created counts, one that has ended does not."""
    id = await daemon.pods.run(pod_spec("web"))
    limits = Resources(memory_limit=500 * MIB, cpu_quota=100_000)
    sizes = []
    for attempt in range(3):
        await daemon.containers.create(id, container_spec(attempt=attempt, resources=limits))
        sizes.append(daemon.grown[-1])
    assert [(size.memory_mib, size.vcpus) for size in sizes] == [(628, 1), (1128, 2), (1628, 3)]
    await daemon.containers.create(id, container_spec(attempt=3))
    assert (daemon.grown[-1].memory_mib, daemon.grown[-1].vcpus) == (1628 + 256, 4), "beside one without"
    raised = Resources(memory_limit=1000 * MIB)
    await daemon.containers.update(daemon.containers.list()[0].id, raised)
    assert daemon.grown[-1].memory_mib == 1628 + 256 + 500, "a limit that is raised before the start too"


async def test_limits_that_are_raised_at_once_add_up(daemon: Daemon) -> None:
    id = await daemon.pods.run(pod_spec("web"))
    limits, raised = Resources(memory_limit=100 * MIB), Resources(memory_limit=500 * MIB)
    made = await asyncio.gather(
        *(daemon.containers.create(id, container_spec(attempt=each, resources=limits)) for each in range(3))
    )
    assert daemon.grown[-1].memory_mib == 3 * 100 + 128
    await asyncio.gather(*(daemon.containers.update(each, raised) for each in made))
    assert daemon.grown[-1].memory_mib == 3 * 500 + 128
    await daemon.containers.update(made[0], limits)
    await daemon.containers.update(made[1], Resources(memory_limit=950 * MIB))
    assert daemon.grown[-1].memory_mib == 100 + 950 + 500 + 128, "and one that was lowered counts as lowered"


async def test_container_whose_vm_cannot_grow_is_not_created(daemon: Daemon) -> None:
    id = await daemon.pods.run(pod_spec("web"))

    async def refuse(pod: Pod, size: VmSize) -> None:
        raise VmmError("no memory")

    daemon.fakes.grow = refuse  # type: ignore[method-assign]
    limits = Resources(memory_limit=500 * MIB)
    with pytest.raises(PhaseFailed, match="no memory"):
        await daemon.containers.create(id, container_spec(resources=limits))
    assert daemon.containers.list() == []
    await daemon.containers.create(id, container_spec())


async def test_container_has_its_huge_pages_before_it_starts(daemon: Daemon) -> None:
    id, _, guest = await running(daemon)
    resources = Resources(hugepage_limits={"2MB": 64 * MIB, "1GB": 0})
    spec = ContainerSpec(name="huge", image="example/web:1", resources=resources)
    container = await daemon.containers.create(id, spec)
    assert daemon.grown == [VmSize(memory_mib=256 + 64, vcpus=1, huge_mib=64)]
    asked = [request.huge_pages for request in guest.agent.requests if request.HasField("huge_pages")]
    assert [pages.count for pages in asked] == [32]
    await daemon.containers.remove(container)
    pages = Resources(hugepage_limits={"1GB": 1 << 30})
    with pytest.raises(InvalidSpec, match="hugepage_limits"):
        await daemon.containers.create(id, ContainerSpec(name="g", image="example/web:1", resources=pages))
    assert len(daemon.containers.list()) == 1


async def test_limits_stay_when_the_vm_cannot_grow(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(pod: Pod, size: VmSize) -> None:
        raise VmmError("no memory slot is free")

    monkeypatch.setattr(daemon.fakes, "grow", refuse)
    await daemon.restart()
    id, container, guest = await running(daemon)
    with pytest.raises(VmmError, match="no memory slot is free"):
        await daemon.containers.update(container, Resources(memory_limit=1000 * MIB))
    with pytest.raises(VmmError, match="no memory slot is free"):
        await daemon.pods.update(id, Resources(memory_limit=1000 * MIB), Resources())
    assert guest.writes == []
    assert daemon.containers.find(container).resources == Resources()
