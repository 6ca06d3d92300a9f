"""The seam for root filesystems: how a container gets a writable one from an image's layers.

One module per kind of store. What it makes is a value (`Rootfs`): a directory of the host or a disk.
`key` is the container's id. All names derive from it and from `target`, so `down` works after a crash at any
point, with no other record.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

from image.idmap import IdMap
from image.rootfs import Rootfs
from image.tree_ops import Usage

__all__ = ["Rootfs", "RootfsStore", "Usage"]


class RootfsStore(Protocol):
    """Makes and removes writable root filesystems. tests/contract/test_rootfs_store.py checks each store."""

    async def up(
        self,
        key: str,
        chain_ids: Sequence[str],
        target: Path,
        ids: IdMap | None = None,
        plain: Sequence[str] = (),
    ) -> Rootfs:
        """Make a new writable root from these layers, bottom first. With `ids`, their files belong to the
        ids outside, and so does what is written. `plain` are paths of directories on which an overlay can be
        mounted, none beneath another; they have the image's content, and are made where it has none.

        A HostTree is mounted at `target`, a directory, which is made if it is missing. What an earlier `up`
        with this key left, after a failure or a crash, is replaced. When cancelled, nothing stays. Raises
        ImageNotFound when a layer is not stored any more, StorageFailed, DiskFull, ValueError for a bad key.
        """

    async def down(self, key: str, target: Path) -> None:
        """Unmount the root and delete what the container wrote. Idempotent, also after a crash.

        Works while files in it are open. Raises StorageFailed, ValueError for a bad key.
        """

    def usage(self, key: str) -> Usage:
        """Return what the container wrote; zero for an unknown key. Blocking: reads the whole tree.

        Raises OSError.
        """

    def read(self, rootfs: Rootfs, name: str, limit: int) -> bytes:
        """Return a file's content as a process with that root finds it; empty: no such regular file.

        Of a `rootfs` that this store made and still holds. Blocking. Raises OSError when the root cannot be
        read, InvalidSpec for a file of more than `limit` bytes.
        """

    def keys(self) -> Collection[str]:
        """Return every key that has something in this store, for the removal of orphans at start."""
