"""Block devices of the host as disks of a pod's VM.

Containers have them as devices or, if they are privileged, as mounts. A disk is plugged in for the first
container that has it, shared by the others of the pod, and unplugged once the last of them has ended.

A device has one writer at a time: what one kernel has cached, another does not see. So a writable disk is
opened exclusively (O_EXCL of open(2)), and none is given that the host has mounted or uses otherwise. Within
the pod, the containers' device filters decide who may write.

Crash story: a container's record names the disks that it has or is about to get. The serial numbers are never
used again, so a disk that a guest did not release is not taken for another. The device is free on the host
when QEMU has closed it, and so at the latest with the VM.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import re
import stat
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from sandbox.container import Container
from sandbox.errors import DeviceBusy, GuestError, InvalidSpec, SandboxError, VmmError, VmmGone
from sandbox.guest import guest_pb2 as pb
from sandbox.host import mountinfo
from sandbox.host.tasks import Tasks
from sandbox.inventory import Inventory
from sandbox.plan.devices import GUEST_DEVICES, check_permissions
from sandbox.pod import Pod
from sandbox.records import ContainerState, DiskUse
from sandbox.spec import GuestDisk
from sandbox.vm_pods.link import link_of
from sandbox.vmm import DISK_FACT, DiskSpec, Machine

log = logging.getLogger(__name__)

FIND_TIMEOUT_S = 20.0
FIND_POLL_S = 0.01
RESIZE_POLL_S = 2.0
_NAME = re.compile(r"vd[a-z]{1,4}")
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFREG: "a regular file",
    stat.S_IFCHR: "a character device of the host",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}
_SECTOR = 512
BLKROGET = 0x125E  # linux/fs.h


class Requested(Struct, frozen=True):
    """A block device that a container is to have."""

    path: str
    field: str  # of the request
    number: int  # st_rdev
    readonly: bool
    node: os.stat_result

    @property
    def device(self) -> str:
        """The host's numbers, as sysfs has them."""
        return f"{os.major(self.number)}:{os.minor(self.number)}"


class Disks:
    """The step of a container's disks, and what happens to them later."""

    name = "disks"

    def __init__(self, inventory: Inventory, tasks: Tasks) -> None:
        self._inventory = inventory
        self._tasks = tasks
        self._watch: asyncio.Task[None] | None = None

    async def up(self, container: Container) -> None:
        """Plug in the disks that the pod does not have yet.

        Raises InvalidSpec with the field for what is not a block device, DeviceBusy, VmmError, GuestError.
        """
        spec = container.record.spec
        if not spec.devices and not spec.security.privileged:
            return  # as most containers; no thread is needed to find that out
        requested = await asyncio.to_thread(find_requested, container)
        if not requested:
            return
        pod = container.pod
        async with pod.disks_lock:
            uses = [await self._intend(container, wanted, requested) for wanted in requested]
            container.update(disks=tuple(uses))
            found: dict[str, DiskUse] = {}
            for number, (wanted, use) in enumerate(zip(requested, uses, strict=True)):
                if use.guest is None and use.serial not in found:
                    found[use.serial] = await self._plug(container, wanted, use)
                uses[number] = replace(found.get(use.serial, use), path=use.path)
            container.update(disks=tuple(uses))
        self.watch()

    async def down(self, container: Container) -> None:
        """Unplug the disks that no other container of the pod uses. Idempotent."""
        if not container.record.disks:
            return
        async with container.pod.disks_lock:
            for use in container.record.disks:
                if not self._users(container, use):
                    await _unplug(container.pod, use)
            # the record is written, or deleted, with the end of the step
            container.record = replace(container.record, disks=())

    async def release(self, container: Container) -> None:
        """Unplug the disks of a container that has ended; what fails is left to its removal. Never raises."""
        if not container.record.disks:
            return
        try:
            await self.down(container)
            container.update_anyway(disks=())
        except (SandboxError, OSError) as error:
            log.warning("container %s: its disks are still plugged in: %s", container.id, error)

    async def recover(self, pod: Pod) -> None:
        """Unplug what containers had that ended, or were being created, when no daemon ran. Never raises."""
        containers = list(self._inventory.containers_of(pod))
        for container in containers:
            if container.record.state is ContainerState.EXITED and not container.quarantined:
                await self.release(container)
        if not any(container.quarantined for container in containers):
            await self._unplug_unknown(pod)
        self.watch()

    async def _unplug_unknown(self, pod: Pod) -> None:
        """Unplug the disks that no record names any more. Never raises."""
        machine = link_of(pod).machine
        async with pod.disks_lock:
            named = {use.serial for each in self._inventory.containers_of(pod) for use in each.record.disks}
            try:
                present = await machine.describe() if machine else {}
                for name in present:
                    serial = name.removeprefix(DISK_FACT)
                    if name.startswith(DISK_FACT) and serial not in named:
                        await _unplug(pod, DiskUse(path="", device="", serial=serial))
            except SandboxError as error:
                log.warning("pod %s: a disk that no container has is still plugged in: %s", pod.id, error)

    # ------------------------------------------------------------------------------- sharing

    async def _intend(
        self, container: Container, wanted: Requested, requested: Sequence[Requested]
    ) -> DiskUse:
        """Return the disk that a device is or is to become. Raises as `_find_shared`."""
        shared = await self._find_shared(container, wanted)
        # one device at two paths is one disk
        number = next(n for n, each in enumerate(requested) if each.number == wanted.number)
        return DiskUse(
            path=wanted.path,
            device=wanted.device,
            serial=shared.serial if shared else f"{container.id[:12]}-{number}",
            readonly=shared.readonly if shared else wanted.readonly,
            guest=shared.guest if shared else None,
        )

    def _users(self, container: Container, use: DiskUse) -> list[Container]:
        """Return the other containers that use a disk; one whose record cannot be read may use any."""
        return [
            each
            for each in self._inventory.containers_of(container.pod)
            if each.id != container.id
            and (
                each.quarantined
                or (
                    each.record.state is not ContainerState.EXITED
                    and any(other.serial == use.serial for other in each.record.disks)
                )
            )
        ]

    async def _find_shared(self, container: Container, wanted: Requested) -> DiskUse | None:
        """Return the device as the pod's VM has it already. One that no container uses any more is unplugged.

        Raises DeviceBusy for another pod's, and for one that is read-only in the VM and must be writable.
        """
        for each in list(self._inventory.containers.values()):
            for use in each.record.disks:
                if use.device != wanted.device or each.id == container.id:
                    continue
                if each.pod is container.pod and each.record.state is ContainerState.EXITED:
                    if not self._users(each, use):
                        await _unplug(each.pod, use)
                elif each.pod is container.pod and use.guest is not None:
                    if use.readonly and not wanted.readonly:
                        problem = f"container {each.id[:12]} of this pod has it read-only; give both the same"
                        raise DeviceBusy(wanted.field, wanted.path, problem)
                    return use
                elif each.pod.record.ready and not (use.readonly and wanted.readonly):
                    problem = f"container {each.id[:12]} of pod {each.pod.id[:12]} has it"
                    raise DeviceBusy(wanted.field, wanted.path, problem)
        return None

    # ------------------------------------------------------------------------------- plugging

    async def _plug(self, container: Container, wanted: Requested, use: DiskUse) -> DiskUse:
        machine = _machine(container.pod)
        fd, readonly = await asyncio.to_thread(open_device, wanted)
        try:
            use = replace(use, readonly=readonly)
            await machine.plug(DiskSpec(serial=use.serial, readonly=readonly), fd)
        finally:
            os.close(fd)
        found = await _find_in_guest(container.pod, use)
        node = wanted.node
        guest = GuestDisk(
            name=found.name,
            major=found.major,
            minor=found.minor,
            size=found.size,
            mode=stat.S_IMODE(node.st_mode),
            uid=node.st_uid,
            gid=node.st_gid,
        )
        return replace(use, guest=guest)

    # ------------------------------------------------------------------------------- growth

    def watch(self) -> None:
        """Follow the sizes of the host's devices, while there are disks. The kernel has no cheaper sign of a
        change that every network namespace gets."""
        idle = self._watch is None or self._watch.done()
        if idle and any(each.record.disks for each in self._inventory.containers.values()):
            self._watch = self._tasks.spawn(self._follow_sizes(), "sizes of disks")

    async def _follow_sizes(self) -> None:
        while True:
            await asyncio.sleep(RESIZE_POLL_S)
            users = [each for each in self._inventory.containers.values() if each.record.disks]
            if not users:
                return
            for container in users:
                try:
                    await self._resize(container)
                except (SandboxError, OSError) as error:
                    log.warning("container %s: the new size of a disk is not seen: %s", container.id, error)

    async def _resize(self, container: Container) -> None:
        async with container.pod.disks_lock:
            machine = link_of(container.pod).machine
            for use in container.record.disks:
                size = device_size(use.device)
                if machine is None or use.guest is None or size in (None, use.guest.size):
                    continue
                assert size is not None
                await machine.resize_disk(DiskSpec(serial=use.serial, readonly=use.readonly), size)
                changed = replace(use, guest=replace(use.guest, size=size))
                disks = tuple(changed if each is use else each for each in container.record.disks)
                container.update_anyway(disks=disks)


def guest_disks(container: Container) -> Mapping[str, GuestDisk]:
    """Return the container's disks as the guest has them, by the paths of its specification."""
    return {use.path: use.guest for use in container.record.disks if use.guest is not None}


async def _unplug(pod: Pod, use: DiskUse) -> None:
    machine = link_of(pod).machine
    if machine is None or not pod.record.ready:
        return  # with the VM they end
    try:
        await machine.unplug(DiskSpec(serial=use.serial, readonly=use.readonly))
    except VmmGone:
        return


def _machine(pod: Pod) -> Machine:
    pod.require_ready()
    machine = link_of(pod).machine
    if machine is None:
        raise VmmGone("the VM has ended")
    return machine


async def _find_in_guest(pod: Pod, use: DiskUse) -> pb.DiskFound:
    """Wait until the guest's kernel has the disk. Raises VmmError after FIND_TIMEOUT_S, GuestError."""
    deadline = time.monotonic() + FIND_TIMEOUT_S
    while True:
        try:
            reply = await link_of(pod).call(pb.Request(find_disk=pb.FindDisk(serial=use.serial)))
        except GuestError as error:
            if error.errno != errno.ENODEV:
                raise
            if time.monotonic() > deadline:
                problem = f"the guest has not found {use.path} within {FIND_TIMEOUT_S:g} s"
                raise VmmError(f"{problem}; does its kernel have virtio_blk and ACPI hot-plug?") from error
            await asyncio.sleep(FIND_POLL_S)
            continue
        if not _NAME.fullmatch(reply.disk.name):
            raise VmmError(f"the guest names a disk {reply.disk.name!r}")
        return reply.disk


# ------------------------------------------------------------------------------------ the host


def find_requested(container: Container) -> Sequence[Requested]:
    """Return the container's block devices, each once: writable if it is so anywhere. Blocking.

    Raises InvalidSpec for what a VM cannot be given.
    """
    every = list(_requested(container))
    writable = {each.number for each in every if not each.readonly}
    return list({each.path: replace(each, readonly=each.number not in writable) for each in every}.values())


def _requested(container: Container) -> Iterator[Requested]:
    spec = container.record.spec
    for number, device in enumerate(spec.devices):
        if device.host_path in GUEST_DEVICES:
            continue
        field = f"config.devices[{number}]"
        node = _stat(device.host_path, f"{field}.host_path")
        readonly = "w" not in check_permissions(device.permissions, field)
        yield Requested(device.host_path, f"{field}.host_path", node.st_rdev, readonly, node)
    for number, mount in enumerate(spec.mounts):
        if spec.security.privileged and mount.host_path and Path(mount.host_path).is_block_device():
            field = f"config.mounts[{number}].host_path"
            node = _stat(mount.host_path, field)
            yield Requested(mount.host_path, field, node.st_rdev, mount.readonly, node)


def _stat(path: str, field: str) -> os.stat_result:
    accepted = f"block devices, {', '.join(GUEST_DEVICES)}"
    try:
        node = Path(path).stat()
    except OSError as error:
        problem = "does not exist" if error.errno == errno.ENOENT else f"cannot be found: {error.strerror}"
        raise InvalidSpec(field, f"{path!r} {problem}", accepted) from error
    if not stat.S_ISBLK(node.st_mode):
        kind = _KINDS.get(stat.S_IFMT(node.st_mode), "of another kind")
        raise InvalidSpec(field, f"{path!r} is {kind}, which a VM cannot be given", accepted)
    return node


def open_device(wanted: Requested) -> tuple[int, bool]:
    """Open a device; returns the descriptor, and whether it is read-only, as it is where the host has it so.

    Blocking. Raises DeviceBusy, InvalidSpec.
    """
    try:
        if not wanted.readonly:
            try:
                fd = os.open(wanted.path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
                if not struct.unpack("i", fcntl.ioctl(fd, BLKROGET, bytes(4)))[0]:
                    return fd, False
                os.close(fd)  # the kernel refuses the writes alone
            except OSError as error:
                if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                    raise
        # no writer may have it now; readers of several pods do not exclude each other
        os.close(os.open(wanted.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        return os.open(wanted.path, os.O_RDONLY | os.O_CLOEXEC), True
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DeviceBusy(wanted.field, wanted.path, describe_user(wanted.device)) from error
        raise InvalidSpec(wanted.field, f"{wanted.path!r} cannot be opened: {error.strerror}") from error


def describe_user(device: str) -> str:
    """Return what uses a device of the host, as far as that can be found."""
    points = [line.point for line in mountinfo.read() if line.device == device]
    if points:
        return f"the host has it mounted at {points[0]}"
    holders = Path(f"/sys/dev/block/{device}/holders")
    names = sorted(entry.name for entry in holders.iterdir()) if holders.is_dir() else []
    if names:
        return f"{', '.join(names)} of the host is made of it"
    return "another process has it exclusively, or a part of it is mounted or used as swap"


def device_size(device: str) -> int | None:
    """Return the size of a device of the host in bytes; None: it has gone."""
    try:
        return int(Path(f"/sys/dev/block/{device}/size").read_text()) * _SECTOR
    except (OSError, ValueError):
        return None
