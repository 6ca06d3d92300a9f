"""Block devices of the host in containers: disks of the VM, plugged in and unplugged with the containers."""

from __future__ import annotations

import contextlib
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.loops import content_of, is_free, loop_device
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
SLEEP = ("sleep", "3600")
MIB = 1 << 20
PRIVILEGED = api.LinuxContainerConfig(security_context=api.LinuxContainerSecurityContext(privileged=True))


def device(path: Path | str, inside: str = "/dev/xvda", permissions: str = "mrw") -> api.Device:
    """As a kubelet sends a volume with volumeMode Block."""
    return api.Device(host_path=str(path), container_path=inside, permissions=permissions)


def sh(cri: Cri, container: str, script: str) -> str:
    result = cri.exec(container, "sh", "-c", script)
    assert result.code == 0, result
    return result.stdout.strip()


def refusal(cri: Cri, pod: Pod, **fields: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as fault:
        cri.create(pod, BUSYBOX, SLEEP, **fields)
    return fault.value.code(), str(fault.value.details())


@contextlib.contextmanager
def new_pod(cri: Cri, name: str) -> Iterator[Pod]:
    """A pod that is gone before its devices are."""
    pod = cri.run_pod(name)
    try:
        yield pod
    finally:
        cri.stop_pod(pod)
        cri.remove_pod(pod)


def wait_free(path: Path) -> None:
    eventually_sync(lambda: is_free(path), timeout_s=20)


def test_block_device_is_a_disk_with_its_size_content_and_limits(cri: Cri, pod: Pod) -> None:
    with (
        loop_device(24 * MIB, b"written by the host", sector=4096) as disk,
        loop_device() as other,
        loop_device(readonly=True) as frozen,
    ):
        disks = [device(disk), device(other, "/data/disk", "r"), device(frozen, "/dev/frozen")]
        container = cri.run(pod, BUSYBOX, SLEEP, devices=disks)
        assert not is_free(disk), "the VM has it exclusively"
        assert sh(cri, container, "blockdev --getsize64 /dev/xvda; blockdev --getss /dev/xvda").split() == [
            str(24 * MIB),
            "4096",
        ]
        node = disk.stat()
        assert sh(cri, container, "head -c 19 /dev/xvda") == "written by the host"
        owner = f"{stat.filemode(node.st_mode)} {node.st_uid} {node.st_gid}"
        assert sh(cri, container, "stat -c '%A %u %g' /dev/xvda") == owner
        # fsync reaches the file behind the host's device
        sh(cri, container, "echo written by the guest | dd of=/dev/xvda bs=4096 conv=fsync,sync seek=5 2>&1")
        with content_of(disk).open("rb") as file:
            file.seek(5 * 4096)
            assert file.read(20) == b"written by the guest"
        for path in ("/data/disk", "/dev/frozen"):
            assert cri.exec(container, "sh", "-c", f"echo x | dd of={path} bs=512 conv=sync").code != 0
            assert sh(cri, container, f"head -c 512 {path} | wc -c") == "512"
        # another container of the pod may make a node, and not open it
        numbers = sh(cri, container, "echo $((0x$(stat -c %t /dev/xvda))) $((0x$(stat -c %T /dev/xvda)))")
        stranger = cri.run(pod, BUSYBOX, SLEEP)
        sh(cri, stranger, f"mknod /disk b {numbers}")
        assert "not permitted" in cri.exec(stranger, "head", "-c", "1", "/disk").stderr
        cri.remove(container)
        assert is_free(disk) and is_free(other)


def test_disk_of_two_containers_is_one_until_the_last_has_ended(cri: Cri) -> None:
    with loop_device() as disk, new_pod(cri, "two") as pod:
        first = cri.run(pod, BUSYBOX, SLEEP, devices=[device(disk)])
        second = cri.run(pod, BUSYBOX, SLEEP, devices=[device(disk, "/dev/mine")])
        numbers = sh(cri, first, "stat -c %t:%T /dev/xvda")
        assert sh(cri, second, "stat -c %t:%T /dev/mine") == numbers
        sh(cri, first, "echo shared | dd of=/dev/xvda bs=512 conv=sync 2>&1")  # not written back yet
        assert sh(cri, second, "head -c 6 /dev/mine") == "shared"
        cri.stop(first, timeout=0)
        assert sh(cri, second, "head -c 6 /dev/mine") == "shared"
        assert not is_free(disk)
        cri.stop(second, timeout=0)
        wait_free(disk)  # with its end, before it is removed
        assert content_of(disk).read_bytes()[:6] == b"shared"
        # and again, as a kubelet restarts it
        third = cri.run(pod, BUSYBOX, SLEEP, devices=[device(disk, permissions="r")])
        assert sh(cri, third, "head -c 6 /dev/xvda") == "shared"
        code, text = refusal(cri, pod, devices=[device(disk)])
        assert code is grpc.StatusCode.FAILED_PRECONDITION and "read-only" in text


def test_twenty_disks_are_plugged_at_once_and_each_is_the_right_one(cri: Cri) -> None:
    with contextlib.ExitStack() as held:
        contents = [f"disk {number:02}".encode() for number in range(20)]
        disks = [held.enter_context(loop_device(MIB, begin)) for begin in contents]
        pod = held.enter_context(new_pod(cri, "twenty"))
        half = [
            cri.run(pod, BUSYBOX, SLEEP, devices=[device(d, f"/dev/d{n}") for n, d in enumerate(part)])
            for part in (disks[:10], disks[10:])
        ]
        for base, container in zip((0, 10), half, strict=True):
            seen = sh(cri, container, "for n in 0 1 2 3 4 5 6 7 8 9; do head -c 7 /dev/d$n; echo; done")
            assert seen.splitlines() == [f"disk {base + n:02}" for n in range(10)]
        cri.remove(half[0])
        again = cri.run(pod, BUSYBOX, SLEEP, devices=[device(disks[3])])
        assert sh(cri, again, "head -c 7 /dev/xvda") == "disk 03"
        cri.stop_pod(pod)
        assert all(is_free(disk) for disk in disks)


def test_privileged_container_makes_and_mounts_a_file_system(cri: Cri) -> None:
    with (
        loop_device(64 * MIB, b"\xff" * (64 * MIB)) as disk,
        loop_device() as other,
        new_pod(cri, "maker") as pod,
    ):
        mounts = [api.Mount(host_path=str(other), container_path="/host/disk")]
        container = cri.run(pod, BUSYBOX, SLEEP, devices=[device(disk)], mounts=mounts, linux=PRIVILEGED)
        full = content_of(disk).stat().st_blocks
        sh(cri, container, "blkdiscard /dev/xvda")
        assert content_of(disk).stat().st_blocks < full / 2, "discards reach the host's file"
        # by its other name: busybox takes every path in the mount table for mounted (docs/limits.md)
        find = "cd /sys/dev/block/$((0x$(stat -c %t /dev/xvda))):$((0x$(stat -c %T /dev/xvda)))"
        sh(cri, container, f"{find} && mke2fs /dev/$(sed -n s/DEVNAME=//p uevent) >/dev/null")
        sh(cri, container, "mkdir /m && mount -t ext4 /dev/xvda /m")
        sh(cri, container, "echo kept >/m/file && sync && umount /m")
        # a mount of a block device is the device
        sh(cri, container, "echo direct | dd of=/host/disk bs=512 conv=sync,fsync 2>&1")
        assert content_of(other).read_bytes()[:6] == b"direct"
        cri.remove(container)
        point = scratch_dir("mounted")
        subprocess.run(["mount", "-t", "ext4", str(disk), str(point)], check=True)
        try:
            assert (point / "file").read_text() == "kept\n"
            code, text = refusal(cri, pod, devices=[device(disk)])
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert "config.devices[0].host_path" in text and "is busy" in text
        finally:
            subprocess.run(["umount", str(point)], check=True)
            point.rmdir()


def test_device_that_is_missing_or_of_another_kind_is_refused_by_name(cri: Cri, pod: Pod) -> None:
    directory = scratch_dir("kinds")
    (directory / "file").touch()
    for path, problem in (
        (directory / "none", "does not exist"),
        (directory / "file", "is a regular file"),
        (directory, "is a directory"),
        (Path("/dev/kmsg"), "is a character device"),
    ):
        code, text = refusal(cri, pod, devices=[device("/dev/null", "/dev/n"), device(path)])
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "config.devices[1].host_path" in text and f"{str(path)!r} {problem}" in text
    with loop_device() as disk, new_pod(cri, "holder") as holder:
        code, text = refusal(cri, pod, devices=[device(disk, permissions="rx")])
        assert code is grpc.StatusCode.INVALID_ARGUMENT and "config.devices[0].permissions" in text
        cri.run(holder, BUSYBOX, SLEEP, devices=[device(disk)])
        code, text = refusal(cri, pod, devices=[device(disk)])
        assert code is grpc.StatusCode.FAILED_PRECONDITION and f"pod {holder.id[:12]}" in text
        cri.stop_pod(holder)
        cri.remove(cri.run(pod, BUSYBOX, SLEEP, devices=[device(disk)]))
        assert is_free(disk)


def test_disk_outlives_the_daemon_grows_and_is_free_after_the_vm_died(daemon: Daemon, cri: Cri) -> None:
    with loop_device() as disk, new_pod(cri, "outlived") as pod:
        first = cri.run(pod, BUSYBOX, SLEEP, devices=[device(disk)])
        ending = cri.run(pod, BUSYBOX, ("sh", "-c", "read x </dev/xvda; sleep 3600"), devices=[device(disk)])
        daemon.kill()
        daemon.start()
        assert sh(cri, first, "blockdev --getsize64 /dev/xvda") == str(16 * MIB)
        with content_of(disk).open("r+b") as file:
            file.truncate(20 * MIB)
        subprocess.run(["losetup", "--set-capacity", str(disk)], check=True)
        eventually_sync(
            lambda: sh(cri, first, "blockdev --getsize64 /dev/xvda"),
            until=lambda size: size == str(20 * MIB),
            timeout_s=30,
        )
        cri.remove(ending)
        assert not is_free(disk)
        daemon.kill_vmm(pod.id)
        wait_free(disk)
        eventually_sync(lambda: cri.status(first).state, until=lambda state: state == api.CONTAINER_EXITED)
        cri.remove(first)
