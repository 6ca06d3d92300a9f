"""Disks of containers: whose they are, and that each is unplugged after failures and crashes.

The VM is a fake at the hypervisor's seam, the devices are loop devices of the host.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.errors import DeviceBusy, InvalidSpec, PhaseFailed
from sandbox.guest import guest_pb2 as pb
from sandbox.host import process
from sandbox.records import ContainerState
from sandbox.spec import ContainerId, DeviceSpec, MountSpec, PodId, SecuritySpec
from sandbox.vm_pods import disks
from sandbox.vm_pods.disks import Disks
from tests.faults.test_pod_faults import Daemon, container_spec, daemon, pod_spec, root
from tests.kit.eventually import eventually
from tests.kit.loops import loop_device

__all__ = ["daemon", "root"]  # fixtures


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    with loop_device(1 << 20) as made:
        yield made


@pytest.fixture
async def pod(daemon: Daemon) -> AsyncIterator[PodId]:
    yield await daemon.pods.run(pod_spec())


async def create(daemon: Daemon, pod: PodId, path: Path, may: str = "rwm", **more: Any) -> ContainerId:
    attempt = len(daemon.inventory.containers)
    device = DeviceSpec(container_path="/dev/xvda", host_path=str(path), permissions=may)
    return await daemon.containers.create(pod, container_spec(devices=(device,), attempt=attempt, **more))


def plugged(daemon: Daemon, pod: PodId) -> list[int]:
    return list(daemon.hypervisor.vms[pod].disks.values())


async def test_disk_is_shared_in_the_pod_and_unplugged_with_its_last_container(
    daemon: Daemon, pod: PodId, disk: Path
) -> None:
    first, second = await create(daemon, pod, disk), await create(daemon, pod, disk)
    assert plugged(daemon, pod) == [disk.stat().st_rdev]
    (node,) = [n for n in daemon.inventory.container(first).plan.devices if n.path == "/dev/xvda"]
    assert (node.major, node.minor) == (254, 0)
    assert node in daemon.inventory.container(second).plan.devices
    await daemon.containers.start(first)
    await daemon.containers.stop(first, 0)
    await daemon.containers.remove(first)
    assert plugged(daemon, pod) == [disk.stat().st_rdev]
    await daemon.containers.start(second)
    daemon.hypervisor.vms[pod].agent.exit(second, 0)
    await eventually(lambda: plugged(daemon, pod), until=lambda found: found == [])
    await daemon.containers.remove(second)


async def test_device_at_two_paths_of_a_privileged_container_is_one_disk(
    daemon: Daemon, pod: PodId, disk: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(disk)
    mount = MountSpec(container_path="/disk", host_path=str(tmp_path / "link"), readonly=True)
    security = SecuritySpec(privileged=True)
    container = await create(daemon, pod, disk, mounts=(mount,), security=security)
    assert plugged(daemon, pod) == [disk.stat().st_rdev]
    plan = daemon.inventory.container(container).plan
    sources = {each.target: each.source for each in plan.mounts if each.target in ("/disk", "/dev/xvda")}
    assert sources == {"/disk": "/dev/vda", "/dev/xvda": "/dev/vda"}
    assert "/dev/xvda" not in [node.path for node in plan.devices]


async def test_writable_disk_belongs_to_one_pod_and_read_only_ones_to_many(
    daemon: Daemon, pod: PodId, disk: Path
) -> None:
    other = await daemon.pods.run(pod_spec("other"))
    reader = await create(daemon, pod, disk, "r")
    await create(daemon, other, disk, "rm")
    with pytest.raises(PhaseFailed, match=f"pod {other[:12]}|of this pod has it read-only") as failed:
        await create(daemon, pod, disk)
    assert isinstance(failed.value.__cause__, DeviceBusy)
    assert daemon.containers.find(reader).disks[0].readonly
    await daemon.pods.stop(other)
    await daemon.containers.remove(reader)
    writer = await create(daemon, pod, disk)
    assert not daemon.containers.find(writer).disks[0].readonly
    last = await daemon.pods.run(pod_spec("last"))
    with pytest.raises(PhaseFailed, match=f"pod {pod[:12]} has it"):
        await create(daemon, last, disk, "r")


async def test_device_that_another_process_has_is_busy(daemon: Daemon, pod: PodId, disk: Path) -> None:
    holder = os.open(disk, os.O_RDONLY | os.O_EXCL)
    try:
        for permissions in ("rwm", "r"):
            with pytest.raises(PhaseFailed, match=r"config\.devices\[0\]\.host_path.*busy.*exclusively"):
                await create(daemon, pod, disk, permissions)
    finally:
        os.close(holder)
    assert plugged(daemon, pod) == []
    await create(daemon, pod, disk)


@pytest.mark.parametrize("operation", ["vm.plug", "vm.unplug"])
async def test_failing_hypervisor_leaves_nothing_plugged(
    daemon: Daemon, pod: PodId, disk: Path, operation: str
) -> None:
    daemon.ledger.faults[operation] = "before"
    if operation == "vm.plug":
        with pytest.raises(PhaseFailed, match="volumes"):
            await create(daemon, pod, disk)
    else:
        container = await create(daemon, pod, disk)
        with pytest.raises(Exception, match=r"vm\.unplug"):
            await daemon.containers.remove(container)
        daemon.ledger.faults.clear()
        await daemon.containers.remove(container)
    assert plugged(daemon, pod) == []


async def test_disk_that_the_guest_does_not_find_is_unplugged(
    daemon: Daemon, pod: PodId, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "FIND_TIMEOUT_S", 0.1)
    missing = pb.Reply(failure=pb.Failure(step="disk", errno=errno.ENODEV))
    agent = daemon.hypervisor.vms[pod].agent
    agent.answer = lambda request: missing if request.HasField("find_disk") else True
    with pytest.raises(PhaseFailed, match="virtio_blk"):
        await create(daemon, pod, disk)
    assert plugged(daemon, pod) == []
    named = pb.Reply(disk=pb.DiskFound(name="../sda"))
    agent.answer = lambda request: named if request.HasField("find_disk") else True
    with pytest.raises(PhaseFailed, match="names a disk"):
        await create(daemon, pod, disk)
    assert plugged(daemon, pod) == []


@pytest.mark.parametrize("moment", ["before", "plugged", "after"])
async def test_daemon_killed_while_plugging_leaves_nothing_plugged(
    daemon: Daemon, pod: PodId, disk: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    hanging = asyncio.Event()
    plug, find = Disks._plug, disks._find_in_guest

    async def hang_around(self: Disks, container: Any, wanted: Any, use: Any) -> Any:
        if moment == "after":
            await plug(self, container, wanted, use)
        hanging.set()
        await asyncio.Event().wait()

    async def hang_in_guest(pod: Any, use: Any) -> Any:
        hanging.set()
        await asyncio.Event().wait()

    if moment == "plugged":
        monkeypatch.setattr(disks, "_find_in_guest", hang_in_guest)
    else:
        monkeypatch.setattr(Disks, "_plug", hang_around)
    creating = asyncio.create_task(create(daemon, pod, disk))
    await hanging.wait()
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    await daemon.kill()
    assert plugged(daemon, pod) == ([] if moment == "before" else [disk.stat().st_rdev])
    monkeypatch.setattr(Disks, "_plug", plug)
    monkeypatch.setattr(disks, "_find_in_guest", find)
    daemon.start()
    await daemon.built.recover()
    await eventually(lambda: plugged(daemon, pod), until=lambda found: found == [])
    await create(daemon, pod, disk)


async def test_container_that_ended_without_a_daemon_has_its_disk_unplugged_at_the_next_start(
    daemon: Daemon, pod: PodId, disk: Path
) -> None:
    kept = await create(daemon, pod, disk, "r")
    with loop_device(1 << 20) as other:
        ended = await create(daemon, pod, other)
        for container in (kept, ended):
            await daemon.containers.start(container)
        await daemon.kill()
        daemon.hypervisor.vms[pod].agent.exit(ended, 0)
        daemon.start()
        await daemon.built.recover()
        await eventually(lambda: plugged(daemon, pod), until=lambda found: found == [disk.stat().st_rdev])
        assert daemon.containers.find(ended).state is ContainerState.EXITED
    assert daemon.containers.find(kept).disks[0].guest is not None


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/nonexistent/disk", "does not exist"),
        ("/dev", "is a directory"),
        ("/etc/passwd", "is a regular file"),
        ("/dev/kmsg", "is a character device"),
    ],
)
async def test_what_is_not_a_block_device_is_refused_by_name(
    daemon: Daemon, pod: PodId, path: str, problem: str
) -> None:
    with pytest.raises(InvalidSpec, match=f"'{path}' {problem}") as refused:
        await create(daemon, pod, Path(path))
    assert refused.value.field == "config.devices[0].host_path"
    assert "block devices" in refused.value.accepted


async def test_device_that_the_host_has_mounted_is_busy_with_the_place(
    daemon: Daemon, pod: PodId, tmp_path: Path
) -> None:
    with loop_device(4 << 20) as disk:
        await run("mkfs.ext4", "-q", str(disk))
        await run("mount", str(disk), str(tmp_path))
        try:
            with pytest.raises(PhaseFailed, match=f"busy: the host has it mounted at {tmp_path}"):
                await create(daemon, pod, disk, "r")
        finally:
            await run("umount", str(tmp_path))


async def run(*command: str) -> None:
    done = await process.run(command, timeout_s=20)
    assert done.status == 0, done.stderr
