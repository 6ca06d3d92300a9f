"""Templates and pool: each moment fails in turn, or the daemon is killed in it, and nothing is left.

The far side is faked; see tests/vm/test_factory.py for the real one.
"""

from __future__ import annotations

import asyncio
import errno
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from sandbox.errors import PhaseFailed
from sandbox.records import PodRecord, PodState, Source, VmRuntime
from sandbox.spec import Resources
from tests.fakes.daemon import HANDLER
from tests.fakes.guest import FakeAgent
from tests.faults.test_pod_faults import Daemon, pod_spec

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
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


def waiting(daemon: Daemon) -> list[PodRecord]:
    """Those that are ready to be claimed."""
    paused = {id for id, vm in daemon.hypervisor.vms.items() if vm.paused}
    return [record for record in daemon.pod_store if record.id in paused]


async def filled(daemon: Daemon, count: int = 2) -> list[PodRecord]:
    await daemon.pool.start()
    await until(lambda: len(waiting(daemon)) == count)
    return waiting(daemon)


def templates(daemon: Daemon) -> list[str]:
    directory = daemon.root / "run" / "templates"
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def assert_nothing_but(daemon: Daemon, count: int) -> None:
    """`count` VMs that wait, each with its namespace and its cgroup."""
    kinds = [thing.split()[0] for thing in daemon.ledger.held]
    assert {kind: kinds.count(kind) for kind in ("vm", "netns", "cgroup", "network")} == {
        "vm": count,
        "netns": count,
        "cgroup": count,
        "network": 0,
    }


def source_of(record: PodRecord) -> Source:
    assert isinstance(record.runtime, VmRuntime)
    return record.runtime.source


async def test_a_pod_takes_the_vm_that_has_waited_longest(daemon: Daemon) -> None:
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


async def test_no_template_has_a_clock_that_runs_too_fast(daemon: Daemon) -> None:
    agent = FakeAgent()
    agent.now_ns = 10**18
    agents = [agent]
    daemon.hypervisor.make_agent = lambda: agents.pop() if agents else FakeAgent()
    await filled(daemon)
    assert templates(daemon) == ["key1"] and not agents, "of another boot"


async def test_what_waits_is_no_pod_of_anybodys(daemon: Daemon) -> None:
    await filled(daemon)
    assert daemon.pods.list() == []


async def test_a_larger_pod_gets_a_grown_vm(daemon: Daemon) -> None:
    await filled(daemon)
    limits = Resources(memory_limit=512 << 20, cpu_quota=200_000, cpu_period=100_000)
    id = await daemon.pods.run(pod_spec(resources=limits))
    assert source_of(daemon.pods.find(id)) is Source.POOL
    assert daemon.hypervisor.vms[id].grown == (640, 2)


async def test_a_pod_too_large_to_grow_boots(daemon: Daemon) -> None:
    await filled(daemon)
    id = await daemon.pods.run(pod_spec(resources=Resources(memory_limit=64 << 30)))
    record = daemon.pods.find(id)
    assert source_of(record) is Source.BOOT and record.vm_handle is not None
    assert record.vm_handle.spec.memory_mib == (64 << 10) + 128


@pytest.mark.parametrize("fault", ["vm.resume", "vm.grow"])
async def test_a_vm_that_cannot_be_used_is_replaced_by_one_that_boots(daemon: Daemon, fault: str) -> None:
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
async def test_a_claim_that_fails_gives_up_what_was_made_ahead(
    daemon: Daemon, fault: str, moment: str
) -> None:
    await filled(daemon)
    daemon.ledger.faults[fault] = moment
    with pytest.raises(PhaseFailed):
        await daemon.pods.run(pod_spec())
    assert daemon.pods.list() == []
    daemon.ledger.faults.clear()
    await until(lambda: len(waiting(daemon)) == 2)
    assert_nothing_but(daemon, 2)
    assert await daemon.pods.run(pod_spec()), "the name is free again"


async def test_a_vm_that_dies_while_it_waits_is_replaced(daemon: Daemon) -> None:
    first, _ = await filled(daemon)
    daemon.hypervisor.vms[first.id].ended.set()
    await until(lambda: first.id not in daemon.hypervisor.vms and len(waiting(daemon)) == 2)
    assert_nothing_but(daemon, 2)
    assert await daemon.pods.run(pod_spec()) != first.id


async def test_a_broken_template_is_given_up_and_made_anew(daemon: Daemon) -> None:
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


async def test_a_template_of_another_guest_image_is_never_used(daemon: Daemon) -> None:
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
async def test_a_template_that_cannot_be_made_leaves_nothing(daemon: Daemon, fault: str) -> None:
    daemon.ledger.faults[fault] = "after"
    await daemon.pool.start()
    await until(lambda: bool(daemon.pool._problems))
    assert templates(daemon) == []
    assert_nothing_but(daemon, 0)
    daemon.ledger.faults.clear()
    id = await daemon.pods.run(pod_spec())
    assert source_of(daemon.pods.find(id)) is Source.BOOT, "pods boot meanwhile"


@pytest.mark.parametrize("fault", ["vm.pause"])
async def test_a_vm_that_cannot_be_made_ahead_leaves_nothing(daemon: Daemon, fault: str) -> None:
    daemon.ledger.faults[fault] = "before"
    await daemon.pool.start()
    await until(lambda: bool(daemon.pool._problems))
    assert_nothing_but(daemon, 0)
    assert list(daemon.pod_store) == []


async def test_a_daemon_that_ends_takes_down_what_waits(daemon: Daemon) -> None:
    await filled(daemon)
    id = await daemon.pods.run(pod_spec())
    await daemon.pool.close()
    assert [record.id for record in daemon.pod_store] == [id]
    assert set(daemon.hypervisor.vms) == {id}


async def test_a_daemon_that_ends_in_the_middle_of_making_one(daemon: Daemon) -> None:
    agent = daemon.hypervisor.make_agent()
    await daemon.pool.start()
    await until(lambda: templates(daemon) == ["key1"])
    agent.silent = True
    daemon.hypervisor.make_agent = lambda: agent
    await until(lambda: any(not vm.paused for vm in daemon.hypervisor.vms.values()))
    await daemon.pool.close()
    assert_nothing_but(daemon, 0)
    assert list(daemon.pod_store) == []


async def test_a_killed_daemon_leaves_what_waits_to_the_next(daemon: Daemon) -> None:
    before = await filled(daemon)
    id = await daemon.pods.run(pod_spec())
    await daemon.restart()
    assert [record.id for record in daemon.pod_store] == [id]
    assert set(daemon.hypervisor.vms) == {id}
    after = await filled(daemon)
    assert not {each.id for each in before} & {each.id for each in after}
    await daemon.pods.remove(id)
    assert_nothing_but(daemon, 2)


async def test_killed_while_a_template_is_made(daemon: Daemon) -> None:
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


async def test_a_claim_that_cannot_be_written_down_gives_up_the_vm_and_the_name(
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
