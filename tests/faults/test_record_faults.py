"""Records that are broken, unreadable, newer, mixed up or lost: what they described runs on.

Each test runs a pod with two containers, kills the daemon, damages records, and starts the next daemon.
The VM, network, mounts and layers must be as before; the pod can be stopped and removed under its id, and
then nothing is left of it. The VM is a fake at the hypervisor's seam; tests/vm/test_adoption.py has a real
one.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cri.proto import runtime_v1_pb2 as api
from cri.responses.objects import pod_item
from sandbox.errors import PlanUnreadable, WrongState
from sandbox.host import files
from sandbox.host.mounts import mounts_below
from sandbox.lifecycle import UndoFailed
from sandbox.records import ContainerState, PodState
from sandbox.spec import ContainerId, PodId
from sandbox.vm_pods.link import link_of
from tests.faults.test_pod_faults import Daemon, container_spec, pod_spec, root

__all__ = ["root"]  # a fixture

SEED = 20  # of the flipped bits


@dataclass
class Site:
    """A pod with a running and a created container, beside another pod that must not notice anything."""

    daemon: Daemon
    pod: PodId
    running: ContainerId
    created: ContainerId
    other: PodId

    @property
    def pod_file(self) -> Path:
        return self.daemon.pod_store.path(self.pod)

    def container_file(self, id: ContainerId) -> Path:
        return self.daemon.container_store.path(id)

    async def restart(self) -> None:
        """Kill the daemon and start the next one: recovery, and then the release of what has no owner."""
        await self.daemon.restart()
        self.daemon.built.images.load()
        await self.daemon.built._release_orphans()

    def assert_untouched(self, before: Held) -> None:
        """Assert that the host is as it was, and the other pod in order."""
        assert self.held() == before
        vm = self.daemon.hypervisor.vms[self.pod]
        assert not vm.ended.is_set()
        assert self.daemon.pods.find(self.other).state is PodState.READY

    def held(self) -> Held:
        """Return what is held on the host: in the ledger, as mounts, and as files of run directories."""
        run = self.daemon.root / "run"
        return (
            frozenset(self.daemon.ledger.held),
            tuple(sorted(map(str, mounts_below(self.daemon.root)))),
            frozenset(path for path in run.rglob("*") if not path.is_socket()),
        )

    def assert_quarantined(self, reason: str) -> None:
        """Assert that clients see the pod as NOT_READY, with the reason, and cannot use it."""
        record = self.daemon.pods.find(self.pod)
        assert record.state is PodState.NOT_READY
        assert self.pod in [each.id for each in self.daemon.pods.list()]
        assert reason in record.problem
        assert self.daemon.built.metric_sources.sources().quarantined()["pod"] == 1
        assert reason in self.daemon.built.node.quarantined["pod"][self.pod]

    async def remove(self) -> None:
        """Stop and remove the pod as a kubelet does; nothing of it may be left."""
        await self.daemon.pods.stop(self.pod)
        await self.daemon.pods.stop(self.pod)
        assert self.pod not in self.daemon.hypervisor.vms
        assert [each for each in self.daemon.ledger.held if self.pod in each] == []
        await self.daemon.pods.remove(self.pod)
        assert not self.pod_file.exists()
        await self.daemon.pods.remove(self.other)
        self.daemon.assert_empty()
        assert self.daemon.pod_store.quarantined == self.daemon.container_store.quarantined == {}


Held = tuple[frozenset[str], tuple[str, ...], frozenset[Path]]


@pytest.fixture
async def site(root: Path) -> AsyncIterator[Site]:
    daemon = Daemon(root)
    pod = await daemon.pods.run(pod_spec("damaged", cgroup_parent="/kubepods/burstable"))
    running = await daemon.containers.create(pod, container_spec())
    await daemon.containers.start(running)
    created = await daemon.containers.create(pod, container_spec(attempt=1))
    other = await daemon.pods.run(pod_spec("other"))
    yield Site(daemon, pod, running, created, other)
    daemon.ledger.faults.clear()
    for each in list(daemon.inventory.pods.values()):
        await daemon.pods.remove(each.id)
    await daemon.kill()


def _edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Write a record as another release would: a new file, with a checksum that fits."""
    record = json.loads(path.read_text())
    change(record)
    files.write_json(path, record, checksum=True)


def _flip_value(path: Path) -> None:
    """Flip a bit of a digit in `created_at_ns`: the record is as valid as before."""
    content = bytearray(path.read_bytes())
    content[content.index(b'"created_at_ns":') + 20] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])  # within the id


def _swap_id(path: Path) -> None:
    _edit(path, lambda record: record.update(id="0" * 64))


def _make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "truncated"),
    "binary": (lambda path: path.write_bytes(bytes(range(256))), "malformed"),
    "version 99": (lambda path: _edit(path, lambda record: record.update(version=99)), "version 99"),
    "state of a newer version": (
        lambda path: _edit(path, lambda record: record.update(state="hibernating")),
        "hibernating",
    ),
    "field of a newer version": (lambda path: _edit(path, lambda record: record.update(gpu=1)), "gpu"),
    "unknown step": (
        lambda path: _edit(path, lambda record: record.update(steps=["run-dir", "gpu"])),
        "steps that this Husk does not know: gpu",
    ),
    "another id": (_swap_id, "another id"),
    "a flipped bit in a value": (_flip_value, "as its checksum shows"),
    "lost": (lambda path: path.unlink(), "it does not exist"),
    "a directory": (_make_directory, "it cannot be read: Is a directory"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
async def test_damaged_pod_record_leaves_the_pod_running_until_it_is_removed(
    site: Site, damage: Callable[[Path], object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = site.held()
    damage(site.pod_file)
    content = site.pod_file.read_bytes() if site.pod_file.is_file() else None
    for _ in range(2):
        caplog.clear()
        await site.restart()
        site.assert_quarantined(reason)
        site.assert_untouched(before)
        [line] = [each.getMessage() for each in caplog.records if site.pod in each.getMessage()]
        assert str(site.pod_file) in line and reason in line and "crictl rmp" in line
    if content is not None:
        assert site.pod_file.read_bytes() == content, "evidence stays as it is"
    assert site.daemon.containers.find(site.running).state is ContainerState.RUNNING
    if site.pod_file.is_dir():
        site.pod_file.rmdir()  # a person has to do this
    await site.remove()


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE])
async def test_unreadable_pod_record_is_used_again_once_it_can_be_read(
    site: Site, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    before, read = site.held(), Path.read_bytes

    def fail(path: Path) -> bytes:
        if path == site.pod_file:
            raise OSError(code, os.strerror(code))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        await site.restart()
        site.assert_quarantined(os.strerror(code))
        site.assert_untouched(before)
    await site.restart()
    assert site.daemon.pods.find(site.pod).state is PodState.READY
    site.assert_untouched(before)
    assert link_of(site.daemon.inventory.pods[site.pod]).client is not None, "its agent is connected again"


async def test_containers_of_quarantined_pod_are_shown_and_refuse_every_use(site: Site) -> None:
    _truncate(site.pod_file)
    await site.restart()
    containers = site.daemon.containers
    assert {each.id for each in site.daemon.pods.containers_of(site.pod)} == {site.running, site.created}
    before = site.held()
    with pytest.raises(WrongState, match="quarantined"):
        await containers.exec_sync(site.running, ["true"], 5)
    with pytest.raises(WrongState, match="quarantined"):
        await containers.attach(site.running, stdin=False, stdout=True, stderr=True)
    with pytest.raises(WrongState, match="quarantined"):
        await containers.stop(site.running, 1)
    with pytest.raises(WrongState, match="quarantined"):
        await containers.remove(site.running)
    with pytest.raises(WrongState, match="not-ready"):
        await containers.start(site.created)
    with pytest.raises(WrongState, match="not-ready"):
        await containers.create(site.pod, container_spec(attempt=2))
    site.assert_untouched(before)
    await site.remove()


async def test_container_of_two_damaged_records_keeps_its_files_until_the_pod_is_stopped(site: Site) -> None:
    _truncate(site.pod_file)
    _truncate(site.container_file(site.running))
    before = site.held()
    await site.restart()
    for call in (site.daemon.containers.remove(site.running), site.daemon.containers.stop(site.running, 0)):
        with pytest.raises(WrongState, match="may still run"):
            await call
    assert site.daemon.containers.find(site.running).state is ContainerState.UNKNOWN
    site.assert_untouched(before)
    await site.daemon.pods.stop(site.pod)
    assert site.daemon.containers.find(site.running).state is ContainerState.EXITED
    await site.daemon.containers.remove(site.running)
    assert not site.container_file(site.running).exists()
    await site.remove()


async def test_removal_of_quarantined_pod_that_fails_is_retried(site: Site) -> None:
    _truncate(site.pod_file)
    await site.restart()
    site.daemon.ledger.faults["network.down"] = "before"
    with pytest.raises(UndoFailed, match=r"network\.down"):
        await site.daemon.pods.remove(site.pod)
    assert site.pod_file.exists(), "the pod is not forgotten before all is released"
    site.daemon.ledger.faults.clear()
    await site.remove()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        DAMAGES[name]
        for name in ("truncated", "a flipped bit in a value", "version 99", "unknown step", "lost")
    ],
)
async def test_damaged_container_record_leaves_container_and_layers_alone(
    site: Site, damage: Callable[[Path], object], reason: str
) -> None:
    before = site.held()
    damage(site.container_file(site.running))
    await site.restart()
    site.assert_untouched(before)
    assert site.daemon.pods.find(site.pod).state is PodState.READY
    record = site.daemon.containers.find(site.running)
    assert (record.state, record.pod_id) == (ContainerState.UNKNOWN, site.pod)
    assert reason in record.message
    assert site.daemon.inventory.layers_in_use() is None, "which layers it needs is not known"
    await site.daemon.containers.remove(site.running)
    assert not site.container_file(site.running).exists()
    assert site.daemon.inventory.layers_in_use() is not None
    assert f"rootfs {site.running}" not in site.daemon.ledger.held
    guest = site.daemon.hypervisor.vms[site.pod].agent
    assert [each.remove.container_id for each in guest.requests if each.HasField("remove")] == [site.running]
    await site.remove()


async def test_damaged_container_record_of_unknown_pod_is_removed_under_its_id(site: Site) -> None:
    await site.daemon.pods.stop(site.pod)
    site.container_file(site.running).write_bytes(b"{")
    await site.restart()
    record = site.daemon.containers.find(site.running)
    assert record.state is ContainerState.UNKNOWN
    assert f"rootfs {site.running}" in site.daemon.ledger.held or record.message
    await site.daemon.containers.stop(site.running, 0)
    await site.daemon.containers.remove(site.running)
    await site.daemon.pods.remove(record.pod_id)
    await site.remove()


@pytest.mark.parametrize("lost", [("pods",), ("containers",), ("pods", "containers")], ids="+".join)
async def test_lost_directory_of_records_leaves_everything_running(site: Site, lost: tuple[str, ...]) -> None:
    before = site.held()
    for name in lost:
        shutil.rmtree(site.daemon.root / name)
    await site.restart()
    assert site.held() == before
    states = {id: site.daemon.pods.find(id).state for id in (site.pod, site.other)}
    expected = PodState.NOT_READY if "pods" in lost else PodState.READY
    assert set(states.values()) == {expected}
    containers = {each.id: each.state for each in site.daemon.pods.containers_of(site.pod)}
    if "containers" in lost:
        assert containers == {site.running: ContainerState.UNKNOWN, site.created: ContainerState.UNKNOWN}
        assert site.daemon.inventory.layers_in_use() is None
    else:
        assert containers == {site.running: ContainerState.RUNNING, site.created: ContainerState.CREATED}
    await site.remove()


async def test_container_records_without_pod_record_and_run_directory_are_kept(site: Site) -> None:
    await site.daemon.pods.stop(site.pod)
    site.pod_file.unlink()
    before = site.held()
    await site.restart()
    assert site.held() == before
    site.assert_quarantined("its container ")
    assert {each.id for each in site.daemon.pods.containers_of(site.pod)} == {site.running, site.created}
    await site.remove()


async def test_pod_record_without_container_records_is_recovered(site: Site) -> None:
    """Records of containers that never were mounted anywhere leave no trace, and nothing to protect."""
    for id in (site.running, site.created):
        await site.daemon.containers.remove(id)
    before = site.held()
    await site.restart()
    assert site.daemon.pods.find(site.pod).state is PodState.READY
    site.assert_untouched(before)


@pytest.mark.parametrize("kind", ["pod", "container"])
async def test_any_flipped_bit_leaves_the_vm_running(site: Site, kind: str) -> None:
    """In whatever field; the record is quarantined, by its checksum where it still has a meaning."""
    path = site.pod_file if kind == "pod" else site.container_file(site.running)
    good = path.read_bytes()
    layers = frozenset(each for each in site.daemon.ledger.held if each.startswith("rootfs "))
    for position in random.Random(SEED).sample(range(len(good) * 8), 60):
        damaged = bytearray(good)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        await site.restart()
        where = f"bit {position % 8} of {good[position // 8 - 20 : position // 8 + 20]!r}"
        vm = site.daemon.hypervisor.vms.get(site.pod)
        assert vm is not None and not vm.ended.is_set(), where
        assert f"network {site.pod}" in site.daemon.ledger.held, where
        assert layers <= site.daemon.ledger.held, where
        store = site.daemon.pod_store if kind == "pod" else site.daemon.container_store
        assert list(store.quarantined) == [path.stem], where
        path.write_bytes(good)
    await site.restart()
    assert site.daemon.pods.find(site.pod).ready


async def test_record_that_was_changed_on_purpose_counts_once_it_is_a_copy(site: Site) -> None:
    _flip_value(site.pod_file)
    await site.restart()
    site.assert_quarantined("replace it by a copy, which has no checksum")
    copy = site.pod_file.with_suffix(".copy")
    copy.write_bytes(site.pod_file.read_bytes())
    copy.rename(site.pod_file)
    await site.restart()
    assert site.daemon.pods.find(site.pod).ready


async def test_plan_with_a_flipped_bit_is_refused_at_the_start(site: Site) -> None:
    plan = site.daemon.inventory.container(site.created).plan_path
    content = bytearray(plan.read_bytes())
    content[content.index(b"/bin/true") + 1] ^= 1
    plan.write_bytes(content)
    await site.restart()
    with pytest.raises(PlanUnreadable, match="checksum"):
        await site.daemon.containers.start(site.created)
    assert site.daemon.containers.find(site.created).state is ContainerState.CREATED


async def test_quarantined_pod_is_listed_over_the_wire_and_described(site: Site) -> None:
    _truncate(site.pod_file)
    await site.restart()
    record = site.daemon.pods.find(site.pod)
    item = pod_item(record)
    assert (item.id, item.state) == (site.pod, api.SANDBOX_NOTREADY)
    assert item.metadata.uid and item.metadata.name and item.metadata.namespace
    facts = await site.daemon.pods.describe(record)
    assert "truncated" in str(facts["problem"])


GOLDEN = Path(__file__).parents[1] / "golden" / "records"


@pytest.mark.parametrize("version", [1, 2])
async def test_pod_of_earlier_version_whose_vm_has_ended_can_be_inspected_and_removed(
    site: Site, version: int
) -> None:
    pod, container = (
        json.loads((GOLDEN / f"v{version}-{name}.json").read_text()) for name in ("pod-vm", "container")
    )
    site.daemon.pod_store.path(pod["id"]).write_text(json.dumps(pod))
    site.daemon.container_store.path(container["id"]).write_text(json.dumps(container))
    (site.daemon.root / "containers" / f"{container['id']}.plan").write_bytes(b"\x0a\x40 of another version")
    await site.restart()
    assert site.daemon.pod_store.quarantined == site.daemon.container_store.quarantined == {}
    record = site.daemon.pods.find(pod["id"])
    assert (record.version, record.state) == (2, PodState.NOT_READY)
    assert "its VM" in record.problem or "the VM ended" in record.problem
    assert (await site.daemon.pods.describe(record))["isolation"] == "vm"
    ended = site.daemon.containers.find(container["id"])
    assert (ended.state, ended.exit_code) == (ContainerState.EXITED, 137)
    await site.daemon.containers.describe(ended)
    saved = json.loads(site.daemon.pod_store.path(pod["id"]).read_text())
    assert saved["version"] == 2 and saved["runtime"]["type"] == "vm", "it was migrated on disk too"
    await site.daemon.pods.remove(pod["id"])
    await site.remove()
