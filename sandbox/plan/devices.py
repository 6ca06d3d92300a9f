"""Device nodes of a container: the standard ones, and those that a client may request. Pure.

A VM has its own devices: a requested node is made when the guest's kernel has the same device under the same
fixed numbers (Documentation/admin-guide/devices.txt), or when it is a block device of the host, which the VM
has as a disk, under numbers that the guest chose. Any other is rejected.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sandbox.errors import InvalidSpec
from sandbox.plan.paths import container_path
from sandbox.plan.values import DevicePlan
from sandbox.spec import ContainerSpec, GuestDisk

# OCI runtime-spec, config-linux.md, "Default Devices"; ptmx is a link and the console a bind mount
STANDARD = (
    DevicePlan("/dev/null", 1, 3),
    DevicePlan("/dev/zero", 1, 5),
    DevicePlan("/dev/full", 1, 7),
    DevicePlan("/dev/random", 1, 8),
    DevicePlan("/dev/urandom", 1, 9),
    DevicePlan("/dev/tty", 5, 0),
)
# every guest has it: virtio-fs, which carries root filesystems, is FUSE
FUSE = DevicePlan("/dev/fuse", 10, 229)
# the guest's kernel loads its module when the node is opened
TUN = DevicePlan("/dev/net/tun", 10, 200)

GUEST_DEVICES = {node.path: node for node in (*STANDARD, FUSE, TUN)}


@dataclass(frozen=True, slots=True)
class RequestedDevice:
    """A device of the specification, as a node where the container runs."""

    node: DevicePlan
    permissions: str  # letters of rwm
    bound: str = ""  # in a privileged container: the guest's node that is bound over the path


def guest_devices(container: ContainerSpec, disks: Mapping[str, GuestDisk]) -> Sequence[RequestedDevice]:
    """Return the requested devices as nodes of the guest; `disks` are its disks by their paths on the host.

    Raises InvalidSpec for a device that a VM cannot be given, and for malformed permissions.
    """
    requested = []
    for number, device in enumerate(container.devices):
        field = f"config.devices[{number}]"
        disk = disks.get(device.host_path)
        node = GUEST_DEVICES.get(device.host_path)
        if node is None and disk is None:
            raise InvalidSpec(
                f"{field}.host_path",
                f"{device.host_path!r} is a device of the host, which a VM cannot be given",
                f"block devices, {', '.join(GUEST_DEVICES)}",
            )
        path = container_path(device.container_path or device.host_path, f"{field}.container_path")
        permissions = check_permissions(device.permissions, field)
        if disk is not None:
            plan = DevicePlan(path, disk.major, disk.minor, disk.mode, stat.S_IFBLK, disk.uid, disk.gid)
            requested.append(RequestedDevice(plan, permissions, bound=f"/dev/{disk.name}"))
        elif node is not None:
            requested.append(RequestedDevice(DevicePlan(path, node.major, node.minor), permissions))
    return requested


def check_permissions(permissions: str, field: str) -> str:
    """Return a device's permissions, whose default is all of them. Raises InvalidSpec."""
    if not set(permissions) <= set("rwm"):
        raise InvalidSpec(f"{field}.permissions", f"{permissions!r} is malformed", "letters of rwm")
    return permissions or "rwm"
