"""Devices that are plugged into a running QEMU, and unplugged: NICs and disks.

Each is a backend, which QEMU gets as a descriptor, and a device on the bus for hot-plugged devices, on which
QEMU finds a free slot. All names derive from the NIC's MAC address or the disk's serial number, so undoing
needs no memory of what was done.

A disk is three objects: `file-SERIAL` has the descriptor, `node-SERIAL` is what the device uses, and the
device. A guest can refuse to release a device. Then the node gets another file, which fails every request,
and the host's device is free all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import stat
import struct
import time
from pathlib import Path

from sandbox.errors import InvalidSpec, VmmError, VmmGone
from sandbox.vmm import DISK_FACT, Device, DiskSpec, NicSpec, VmSpec
from sandbox.vmm.qemu.argv import PLUG_BUS, check_text, nic_device, share_device
from sandbox.vmm.qemu.qmp import Monitor

log = logging.getLogger(__name__)

SERIAL_MAX = 20  # bytes; VIRTIO_BLK_ID_BYTES
UNPLUG_TIMEOUT_S = 5.0
BLKSSZGET, BLKPBSZGET = 0x1268, 0x127B  # linux/fs.h
_FILE = "file-"
_SECTOR = 512
_POLL_S = 0.005


async def plug_share(monitor: Monitor, tag: str) -> None:
    """Plug in a share, whose connection to its virtiofsd QEMU has already. Raises VmmError."""
    await monitor.execute("device_add", share_device(tag) | {"id": share_id(tag), "bus": PLUG_BUS})


async def connect_share(monitor: Monitor, tag: str, fd: int) -> None:
    """Give QEMU the connection to a share's virtiofsd. Raises VmmError."""
    name = f"fs-{tag}"
    await monitor.pass_descriptor(name, fd)
    address = {"type": "fd", "data": {"str": name}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    await monitor.execute("chardev-add", {"id": name, "backend": backend})


async def disconnect_share(monitor: Monitor, tag: str) -> None:
    """Close the connection of a share that is not plugged in. Raises VmmError."""
    await monitor.execute("chardev-remove", {"id": f"fs-{tag}"})


def share_id(tag: str) -> str:
    """Return QEMU's id of a share's device that was plugged in."""
    return f"share-{tag}"


async def plug(monitor: Monitor, spec: VmSpec, device: Device, fd: int) -> None:
    """See Growable.plug."""
    arguments = _describe(device, fd)
    kind, most = ("nic-", spec.max_nics - 1) if isinstance(device, NicSpec) else ("disk-", spec.max_disks)
    present = await plugged(monitor)
    if sum(name.startswith(kind) for name in present) >= most:
        raise VmmError(f"{device_id(device)} is more than this VM can have ({max(most, 0)} to plug in)")
    try:
        if isinstance(device, NicSpec):
            name = device_id(device)
            await monitor.pass_descriptor(name, fd)
            await monitor.execute("netdev_add", {"type": "tap", "id": f"net-{name}", "fd": name})
        else:
            await _add_node(monitor, device, fd)
        await monitor.execute("device_add", arguments | {"bus": PLUG_BUS})
    except BaseException:
        with contextlib.suppress(VmmError):
            await unplug(monitor, device)
        raise


async def unplug(monitor: Monitor, device: Device) -> None:
    """See Growable.unplug."""
    name = device_id(device)
    if name in await plugged(monitor):
        with contextlib.suppress(VmmError):  # it may be leaving already
            await monitor.execute("device_del", {"id": name})
    deadline = time.monotonic() + UNPLUG_TIMEOUT_S
    # QEMU releases the backend some time after the device has left the bus
    while not await _remove_backend(monitor, device):
        if time.monotonic() > deadline:
            await _fail(monitor, device)
            return
        await asyncio.sleep(_POLL_S)


async def resize_disk(monitor: Monitor, disk: DiskSpec, size: int) -> None:
    """See Growable.resize_disk."""
    await monitor.execute("block_resize", {"node-name": _node(disk), "size": size})


def device_id(device: Device) -> str:
    """Return QEMU's id of a device."""
    if isinstance(device, NicSpec):
        return f"nic-{device.mac.replace(':', '')}"
    return f"disk-{device.serial}"


async def describe_disks(monitor: Monitor) -> dict[str, str]:
    """Return the size in bytes and the access mode of each disk, as `disk.SERIAL`. Raises VmmError."""
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    found = {node["node-name"]: node for node in nodes} if isinstance(nodes, list) else {}
    disks = {name.removeprefix(_FILE): node for name, node in sorted(found.items()) if name.startswith(_FILE)}
    return {
        f"{DISK_FACT}{serial}": f"{node['image']['virtual-size']} {'ro' if node['ro'] else 'rw'}"
        for serial, node in disks.items()
    }


# ------------------------------------------------------------------------------------------ disks


def _node(disk: DiskSpec) -> str:
    return f"node-{disk.serial}"


def _file(disk: DiskSpec) -> str:
    return f"{_FILE}{disk.serial}"


def _describe(device: Device, fd: int) -> dict[str, object]:
    """Return the device as device_add takes it. Raises InvalidSpec, VmmError for what is not a disk."""
    if isinstance(device, NicSpec):
        check_text("mac", device.mac)
        return nic_device(f"net-{device_id(device)}", device.mac, device.mtu) | {"id": device_id(device)}
    check_text("serial", device.serial)
    if len(device.serial) > SERIAL_MAX:
        raise InvalidSpec("serial", f"{device.serial!r} is too long", f"at most {SERIAL_MAX} bytes")
    try:
        kind = os.fstat(fd).st_mode
    except OSError as error:
        raise VmmError(f"disk {device.serial}: {error.strerror}") from error
    if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
        raise VmmError(f"disk {device.serial} is neither a block device nor a regular file")
    return {
        "driver": "virtio-blk-pci",
        "id": device_id(device),
        "drive": _node(device),
        "serial": device.serial,
        "disable-legacy": "on",
        # by default QEMU stops the VM when the host's device is full
        "werror": "report",
        "rerror": "report",
        **(_geometry(fd) if stat.S_ISBLK(kind) else {}),
    }


def _geometry(fd: int) -> dict[str, object]:
    """Return the sizes of blocks, and whether they can be discarded, of the host's device."""
    logical, physical = (
        struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0] for request in (BLKSSZGET, BLKPBSZGET)
    )
    number = os.fstat(fd).st_rdev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    queue = next((place for place in (device / "queue", device / "../queue") if place.is_dir()), None)
    discards = queue is None or (queue / "discard_max_bytes").read_text().strip() != "0"
    return {
        "logical_block_size": logical,
        "physical_block_size": max(logical, physical),
        "discard": discards,
    }


async def _add_node(monitor: Monitor, disk: DiskSpec, fd: int) -> None:
    """Opening /dev/fdset/N duplicates the descriptor, where opening /proc/self/fd/N would check the
    permissions of QEMU's user again."""
    answer = await monitor.execute_with_descriptor("add-fd", {"opaque": _file(disk)}, fd)
    number = answer["fdset-id"] if isinstance(answer, dict) else None
    readonly = disk.readonly
    node: dict[str, object] = {"read-only": readonly} | ({} if readonly else {"discard": "unmap"})
    driver = "host_device" if stat.S_ISBLK(os.fstat(fd).st_mode) else "file"
    file = {"driver": driver, "filename": f"/dev/fdset/{number}", "node-name": _file(disk)}
    await monitor.execute("blockdev-add", node | file)
    await monitor.execute("blockdev-add", node | _raw(disk, _file(disk)))


def _raw(disk: DiskSpec, file: str) -> dict[str, object]:
    return {"driver": "raw", "node-name": _node(disk), "file": file}


async def _remove_backend(monitor: Monitor, device: Device) -> bool:
    """Remove what is left of a backend. Returns False while a device uses it. Raises VmmGone."""
    if isinstance(device, NicSpec):
        with contextlib.suppress(VmmError):
            await monitor.execute("netdev_del", {"id": f"net-{device_id(device)}"})
        return device_id(device) not in await plugged(monitor)
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    present = {node["node-name"] for node in nodes} if isinstance(nodes, list) else set()
    for name in (_node(device), _file(device)):
        if name in present:
            try:
                await monitor.execute("blockdev-del", {"node-name": name})
            except VmmGone:
                raise
            except VmmError:
                return False
    await _forget_descriptors(monitor, device)
    return True


async def _forget_descriptors(monitor: Monitor, disk: DiskSpec) -> None:
    sets = await monitor.execute("query-fdsets")
    for each in sets if isinstance(sets, list) else []:
        if any(entry.get("opaque") == _file(disk) for entry in each["fds"]):
            await monitor.execute("remove-fd", {"fdset-id": each["fdset-id"]})


async def _fail(monitor: Monitor, device: Device) -> None:
    """Take the host's device from a disk that the guest does not release. Raises VmmError."""
    if isinstance(device, NicSpec):
        raise VmmError(f"the guest does not release {device_id(device)}")
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    found = {node["node-name"]: node for node in nodes} if isinstance(nodes, list) else {}
    if _file(device) not in found:
        return  # it was taken earlier
    node, failing = found[_node(device)], f"lost-{device.serial}"
    if failing not in found:
        await monitor.execute("blockdev-add", _failing(failing, node["image"]["virtual-size"], node["ro"]))
    # repeated with all of its options: those that are not named go back to their defaults
    options = {"read-only": True} if device.readonly else {"read-only": False, "discard": "unmap"}
    await monitor.execute("blockdev-reopen", {"options": [options | _raw(device, failing)]})
    await monitor.execute("blockdev-del", {"node-name": _file(device)})
    await _forget_descriptors(monitor, device)
    log.warning("the guest does not release disk %s: its requests fail from now on", device.serial)


def _failing(name: str, size: int, readonly: bool) -> dict[str, object]:
    """A file whose requests all fail with EIO."""
    fault = {"event": "none", "errno": 5}
    image = {"driver": "null-co", "size": -(-size // _SECTOR) * _SECTOR, "read-only": readonly}
    return {"driver": "blkdebug", "node-name": name, "image": image, "inject-error": [fault]} | {
        "read-only": readonly
    }


async def plugged(monitor: Monitor) -> set[str]:
    """Return the ids of the devices that the VM has, those that are about to leave included."""
    answer = await monitor.execute("qom-list", {"path": "/machine/peripheral"})
    return {entry["name"] for entry in answer} if isinstance(answer, list) else set()
