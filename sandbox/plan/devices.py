"""Device nodes of a container: the standard ones, and those that a client may request. Pure.

A VM has its own devices: a requested node is made only when the guest's kernel has the same device
under the same fixed numbers (Documentation/admin-guide/devices.txt). Any other is rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sandbox.errors import InvalidSpec
from sandbox.plan.paths import container_path
from sandbox.plan.values import DevicePlan
from sandbox.spec import ContainerSpec

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


def guest_devices(container: ContainerSpec) -> Sequence[RequestedDevice]:
    """Return the requested devices as nodes of the guest.

    Raises InvalidSpec for a device that a VM cannot be given, and for malformed permissions.
    """
    requested = []
    for number, device in enumerate(container.devices):
        field = f"config.devices[{number}]"
        node = GUEST_DEVICES.get(device.host_path)
        if node is None:
            raise InvalidSpec(
                f"{field}.host_path",
                f"{device.host_path!r} is a device of the host, which a VM cannot be given",
                ", ".join(GUEST_DEVICES),
            )
        permissions = device.permissions or "rwm"
        if not set(permissions) <= set("rwm"):
            raise InvalidSpec(f"{field}.permissions", f"{permissions!r} is malformed", "letters of rwm")
        path = container_path(device.container_path or device.host_path, f"{field}.container_path")
        requested.append(RequestedDevice(DevicePlan(path, node.major, node.minor), permissions))
    return requested
