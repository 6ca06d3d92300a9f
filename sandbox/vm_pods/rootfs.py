"""How a VM comes by a container's root filesystem."""

from __future__ import annotations

from image.rootfs import Disk, HostTree
from sandbox.container import Container
from sandbox.errors import RootfsUnusable
from sandbox.plan.shares import GUEST_ROOTFS


def guest_root(container: Container) -> str:
    """Return the guest's directory that is the container's root.

    A tree is mounted in the share of root filesystems by its store, so nothing has to be attached. Raises
    RootfsUnusable for a disk, as no store makes disks.
    """
    match container.rootfs:
        case HostTree():
            return f"{GUEST_ROOTFS}/{container.id}"
        case Disk(path=path):
            raise RootfsUnusable(f"{path}: a VM cannot be given a disk as a root filesystem")
