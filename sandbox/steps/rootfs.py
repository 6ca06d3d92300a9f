"""A container's root filesystem, as the store of root filesystems makes it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from image.idmap import IdMap
from image.rootfs import HostTree, Rootfs
from image.stores import RootfsStore
from sandbox.container import Container
from sandbox.errors import RootfsUnusable
from sandbox.plan.mounts import plain_directories
from sandbox.spec import UserNamespace


@dataclass(frozen=True, slots=True)
class ContainerRootfs:
    """A writable root made of the image's layers; a tree is mounted in the pod's share."""

    store: RootfsStore
    name = "rootfs"

    async def up(self, container: Container) -> None:
        """Make the root filesystem and record of which kind it is."""
        await asyncio.to_thread(self._point(container).mkdir, 0o755, exist_ok=True)
        ids = id_map(container.pod.record.spec.user_namespace)
        record, target = container.record, container.rootfs_mount
        plain = plain_directories(record.spec, record.defaults)
        container.record_rootfs(await self.store.up(container.id, record.chain_ids, target, ids, plain))

    async def down(self, container: Container) -> None:
        """Delete it, and what the container wrote to it. Idempotent."""
        await self.store.down(container.id, container.rootfs_mount)
        with suppress(FileNotFoundError):
            self._point(container).rmdir()  # an empty directory of a tmpfs: quicker than a thread

    @staticmethod
    def _point(container: Container) -> Path:
        """The mount point, as it is made: the share itself is read-only."""
        return container.pod.back_of(container.pod.rootfs_share) / container.id


def require_tree(rootfs: Rootfs) -> Path:
    """Return the directory of the host that the root filesystem is. Raises RootfsUnusable for a disk."""
    if isinstance(rootfs, HostTree):
        return Path(rootfs.path)
    raise RootfsUnusable(f"{rootfs.path}: a disk cannot be used where a directory of the host is needed")


def id_map(space: UserNamespace | None) -> IdMap | None:
    """Return a user namespace's mapping as `image` takes it."""
    return IdMap(uids=space.uids, gids=space.gids) if space else None
