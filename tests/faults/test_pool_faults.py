"""Templates and pool: each step fails in turn, or the daemon is killed in it, and nothing is left.

Hypervisor, network and cgroups are fakes; tests/vm/test_pool.py has the real ones.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from sandbox.errors import PhaseFailed
from sandbox.lifecycle import Step
from sandbox.records import PodRecord, PodState, Source, VmRuntime
from sandbox.spec import Resources
from sandbox.vm_pods.scratch import Booted, Netns, RunDir, ScratchVm, WaitingCgroup
from sandbox.vmm import Feature
from tests.fakes.daemon import HANDLER
from tests.fakes.guest import FakeAgent
from tests.faults.test_pod_faults import Daemon, pod_spec
from tests.kit.eventually import eventually

POOL = msgspec.structs.replace(HANDLER, source="pool", pool_size=2)
TEMPLATE = msgspec.structs.replace(HANDLER, source="template")
DEADLINE_S = 10


@pytest.fixture
async def daemon() -> AsyncIterator[Daemon]:
    # a short path, as it has sockets in it
    root = Path(tempfile.mkdtemp(prefix="husk-faults-"))
    daemon = Daemon(root, handler=POOL)
    yield daemon
    daemon.ledger.faults.clear()
    for record in list(daemon.pods.list()):
        await daemon.pods.remove(record.id)
    await daemon.pool.close()
    await daemon.kill()
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.vm_pods.pool.RETRY_S", 0.05)
    monkeypatch.setattr("sandbox.vm_pods.pool.QUIET_S", 0.0)


async def until(condition: Callable[[], bool]) -> None:
    await eventually(condition, until=bool, timeout_s=DEADLINE_S)


def waiting(daemon: Daemon) -> list[PodRecord]:
    """The pooled VMs that can be claimed."""
    paused = {id for id, vm in daemon.hypervisor.vms.items() if vm.paused}
    return [record for record in daemon.pod_store if record.id in paused]


async def filled(daemon: Daemon, count: int = 2) -> list[PodRecord]:
    await daemon.pool.start()
    await until(lambda: len(waiting(daemon)) == count)
    return waiting(daemon)


def templates(daemon: Daemon) -> list[str]:
    directory = daemon.root / "run" / "templates"
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def held(daemon: Daemon) -> dict[str, int]:
    kinds = [thing.split()[0] for thing in daemon.ledger.held]
    return {kind: kinds.count(kind) for kind in ("vm", "netns", "cgroup", "network")}


def assert_nothing_but(daemon: Daemon, count: int) -> None:
    """Assert that `count` pooled VMs exist, each with its namespace and its cgroup, and nothing else."""
    assert held(daemon) == {"vm": count, "netns": count, "cgroup": count, "network": 0}


def source_of(record: PodRecord) -> Source:
    assert isinstance(record.runtime, VmRuntime)
    return record.runtime.source


async def test_pod_acquires_the_oldest_pooled_vm(daemon: Daemon) -> None:
    first, second = await filled(daemon)
    assert templates(daemon) == ["key1"]
    id = await daemon.pods.run(pod_spec())
    assert id == first.id
    record = daemon.pods.find(id)
    assert (source_of(record), record.state, record.spec.name) == (Source.POOL, PodState.READY, "web")
    assert not daemon.hypervisor.vms[id].paused
    assert second.id in {each.id for each in waiting(daemon)}
    await until(lambda: len(waiting(daemon)) == 2)
    await daemon.pods.remove(id)
    assert_nothing_but(daemon, 2)


async def test_guest_whose_clock_runs_too_fast_does_not_become_a_template(daemon: Daemon) -> None:
    agent = FakeAgent()
    agent.now_ns = 10**18
    agents = [agent]
    daemon.hypervisor.make_agent = lambda: agents.pop() if agents else FakeAgent()
    await filled(daemon)
    assert templates(daemon) == ["key1"] and not agents, "of another boot"


async def test_pooled_vms_are_not_listed_as_pods(daemon: Daemon) -> None:
    await filled(daemon)
    assert daemon.pods.list() == []


async def test_larger_pod_gets_a_grown_vm(daemon: Daemon) -> None:
    await filled(daemon)
    limits = Resources(memory_limit=512 << 20, cpu_quota=200_000, cpu_period=100_000)
    id = await daemon.pods.run(pod_spec(resources=limits))
    assert source_of(daemon.pods.find(id)) is Source.POOL
    assert daemon.hypervisor.vms[id].grown == (640, 2)


async def test_pod_that_is_too_large_to_grow_boots(daemon: Daemon) -> None:
    await filled(daemon)
    id = await daemon.pods.run(pod_spec(resources=Resources(memory_limit=64 << 30)))
    record = daemon.pods.find(id)
    assert source_of(record) is Source.BOOT and record.vm_handle is not None
    assert record.vm_handle.spec.memory_mib == (64 << 10) + 128


@pytest.mark.parametrize("fault", ["vm.resume", "vm.grow"])
async def test_pooled_vm_that_fails_is_replaced_by_one_that_boots(daemon: Daemon, fault: str) -> None:
    await filled(daemon)
    daemon.ledger.faults[fault] = "before"
    id = await daemon.pods.run(pod_spec(resources=Resources(memory_limit=512 << 20)))
    record = daemon.pods.find(id)
    assert (source_of(record), record.state) == (Source.BOOT, PodState.READY)
    assert (
        record.vm_handle is not None
        and record.vm_handle.spec.memory_mib == 640
        and not record.vm_handle.spec.template
    )
    await daemon.pods.remove(id)
    await until(lambda: len(waiting(daemon)) == 2)
    assert_nothing_but(daemon, 2)


@pytest.mark.parametrize("fault", ["cgroup.create", "network.up"])
@pytest.mark.parametrize("moment", ["before", "after"])
async def test_failed_claim_releases_the_pooled_vm(daemon: Daemon, fault: str, moment: str) -> None:
    await filled(daemon)
    daemon.ledger.faults[fault] = moment
    with pytest.raises(PhaseFailed):
        await daemon.pods.run(pod_spec())
    assert daemon.pods.list() == []
    daemon.ledger.faults.clear()
    await until(lambda: len(waiting(daemon)) == 2)
    assert_nothing_but(daemon, 2)
    assert await daemon.pods.run(pod_spec()), "the name is free again"


async def test_pooled_vm_that_dies_is_replaced(daemon: Daemon) -> None:
    first, _ = await filled(daemon)
    daemon.hypervisor.vms[first.id].ended.set()
    await until(lambda: first.id not in daemon.hypervisor.vms and len(waiting(daemon)) == 2)
    # the next one may be made while the last things of the dead one are released
    await eventually(lambda: held(daemon)["cgroup"], until=lambda count: count == 2, timeout_s=DEADLINE_S)
    assert_nothing_but(daemon, 2)
    assert await daemon.pods.run(pod_spec()) != first.id


async def test_broken_template_is_deleted_and_made_again(daemon: Daemon) -> None:
    daemon.fakes.handlers[""] = TEMPLATE
    await daemon.pool.start()
    await until(lambda: templates(daemon) == ["key1"])
    daemon.ledger.faults["vm.restore"] = "before"
    id = await daemon.pods.run(pod_spec())
    record = daemon.pods.find(id)
    assert (source_of(record), record.state) == (Source.BOOT, PodState.READY)
    daemon.ledger.faults.clear()
    await until(lambda: templates(daemon) == ["key1"])
    again = await daemon.pods.run(pod_spec(name="again"))
    assert source_of(daemon.pods.find(again)) is Source.TEMPLATE


async def test_template_of_another_guest_image_is_not_used(daemon: Daemon) -> None:
    await filled(daemon)
    stale = {record.id for record in waiting(daemon)}
    daemon.hypervisor.generation = 2
    id = await daemon.pods.run(pod_spec())
    assert id not in stale and source_of(daemon.pods.find(id)) is Source.BOOT
    await until(lambda: templates(daemon) == ["key2"] and len(waiting(daemon)) == 2)
    assert not stale & {record.id for record in waiting(daemon)}
    await daemon.pods.remove(id)
    assert_nothing_but(daemon, 2)


@pytest.mark.parametrize("fault", ["cgroup.create", "network.prepare", "vm.start", "vm.save"])
async def test_template_that_cannot_be_made_leaves_nothing(daemon: Daemon, fault: str) -> None:
    daemon.ledger.faults[fault] = "after"
    await daemon.pool.start()
    await until(lambda: bool(daemon.pool._problems))
    assert templates(daemon) == []
    assert_nothing_but(daemon, 0)
    daemon.ledger.faults.clear()
    id = await daemon.pods.run(pod_spec())
    assert source_of(daemon.pods.find(id)) is Source.BOOT, "pods boot meanwhile"


@pytest.mark.parametrize("fault", ["vm.pause"])
async def test_pooled_vm_that_cannot_be_made_leaves_nothing(daemon: Daemon, fault: str) -> None:
    daemon.ledger.faults[fault] = "before"
    await daemon.pool.start()
    await until(lambda: bool(daemon.pool._problems))
    assert_nothing_but(daemon, 0)
    assert list(daemon.pod_store) == []


async def test_daemon_that_stops_takes_down_pooled_vms(daemon: Daemon) -> None:
    await filled(daemon)
    id = await daemon.pods.run(pod_spec())
    await daemon.pool.close()
    assert [record.id for record in daemon.pod_store] == [id]
    assert set(daemon.hypervisor.vms) == {id}


async def test_daemon_that_stops_while_making_a_vm_leaves_nothing(daemon: Daemon) -> None:
    agent = daemon.hypervisor.make_agent()
    await daemon.pool.start()
    await until(lambda: templates(daemon) == ["key1"])
    agent.silent = True
    daemon.hypervisor.make_agent = lambda: agent
    await until(lambda: any(not vm.paused for vm in daemon.hypervisor.vms.values()))
    await daemon.pool.close()
    assert_nothing_but(daemon, 0)
    assert list(daemon.pod_store) == []


async def test_pooled_vms_of_a_killed_daemon_are_taken_down_by_the_next(daemon: Daemon) -> None:
    before = await filled(daemon)
    id = await daemon.pods.run(pod_spec())
    await daemon.restart()
    assert [record.id for record in daemon.pod_store] == [id]
    assert set(daemon.hypervisor.vms) == {id}
    after = await filled(daemon)
    assert not {each.id for each in before} & {each.id for each in after}
    await daemon.pods.remove(id)
    assert_nothing_but(daemon, 2)


async def test_template_of_a_killed_daemon_is_taken_down_by_the_next(daemon: Daemon) -> None:
    agent = daemon.hypervisor.make_agent()
    agent.silent = True
    make = daemon.hypervisor.make_agent
    daemon.hypervisor.make_agent = lambda: agent
    await daemon.pool.start()
    await until(lambda: bool(daemon.hypervisor.vms))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sandbox.vm_pods.templates.Templates.clean", _nothing)  # the process is dead
        await daemon.restart()
    assert templates(daemon) == ["building"]
    daemon.hypervisor.make_agent = make
    await filled(daemon)
    assert templates(daemon) == ["key1"]
    assert_nothing_but(daemon, 2)


async def _nothing(*arguments: object) -> None: ...


async def test_claim_that_cannot_be_saved_releases_the_vm_and_the_name(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = await filled(daemon)
    put = daemon.pod_store.put

    def refuse_claims(record: PodRecord) -> None:
        if record.state is not PodState.WAITING:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(record)

    with monkeypatch.context() as patch:
        patch.setattr(daemon.pod_store, "put", refuse_claims)
        with pytest.raises(OSError, match="No space left"):
            await daemon.pods.run(pod_spec())
    assert daemon.inventory.pods == {}
    await until(lambda: first.id not in daemon.hypervisor.vms and len(waiting(daemon)) == 2)
    id = await daemon.pods.run(pod_spec())
    assert source_of(daemon.pods.find(id)) is Source.POOL


# --------------------------------------------------------------------------------- a template's steps


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", [RunDir, WaitingCgroup, Netns, Booted], ids=lambda step: step.name)
async def test_failed_step_of_a_template_is_named_and_undone(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, step: type[Step[ScratchVm]], moment: str
) -> None:
    up = step.up

    async def fail(self: Step[ScratchVm], vm: ScratchVm) -> None:
        if moment == "after":
            await up(self, vm)
        raise OSError(errno.EIO, "the fault of the test")

    with monkeypatch.context() as patch:
        patch.setattr(step, "up", fail)
        await daemon.pool.start()
        await until(lambda: bool(daemon.pool._problems))
        await until(lambda: templates(daemon) == [])
        assert_nothing_but(daemon, 0)
    await until(lambda: templates(daemon) == ["key1"] and len(waiting(daemon)) == 2)
    assert_nothing_but(daemon, 2)


@pytest.mark.parametrize("step", [RunDir, WaitingCgroup, Netns, Booted], ids=lambda step: step.name)
async def test_step_of_a_template_is_taken_down_twice_and_without_its_up(
    daemon: Daemon, step: type[Step[ScratchVm]]
) -> None:
    templates = daemon.pool._deps.templates
    (found,) = (each for each in templates._steps(None) if isinstance(each, step))
    for _ in range(2):
        await found.down(ScratchVm("template", daemon.root / "run/templates/building"))
    assert_nothing_but(daemon, 0)


async def test_failure_that_repeats_is_logged_once(daemon: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    daemon.ledger.faults["vm.start"] = "before"
    starts = daemon.ledger.refused
    await daemon.pool.start()
    await until(lambda: daemon.ledger.refused > starts + 3)
    assert len([each for each in caplog.records if "could not make a VM in advance" in each.message]) == 1


async def test_driver_that_cannot_save_boots_its_pods(daemon: Daemon) -> None:
    daemon.hypervisor.supported = frozenset()
    await daemon.pool.start()
    pod = await daemon.pods.run(pod_spec())
    assert source_of(daemon.pods.find(pod)) is Source.BOOT
    assert (templates(daemon), waiting(daemon), daemon.pool._problems) == ([], [], {})


async def test_driver_that_cannot_pause_has_templates_and_no_pool(daemon: Daemon) -> None:
    daemon.hypervisor.supported = frozenset({Feature.SAVE})
    await daemon.pool.start()
    await until(lambda: templates(daemon) == ["key1"])
    pod = await daemon.pods.run(pod_spec())
    assert source_of(daemon.pods.find(pod)) is Source.TEMPLATE
    assert (waiting(daemon), daemon.pool._problems) == ([], {})
