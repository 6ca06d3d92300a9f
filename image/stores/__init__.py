"""The seam to a root filesystem: how a container gets a writable one out of an image's layers.

One file per kind, found by its name. `key` is the container's id: all names derive from it and
from `target`, so `down` works after a crash at any point, with no other memory.
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
    async def up(self, key: str, chain_ids: Sequence[str], target: Path, ids: IdMap | None = None) -> Rootfs:
        """Make a fresh writable root of these layers, bottom first; with `ids`, their files belong to the
        ids outside, and so does what is written.

        A HostTree is mounted at `target`, a directory, made if it is missing. What an `up` left behind that
        failed or was killed is replaced. Raises ImageNotFound when a layer is gone, StorageFailed, DiskFull.
        """

    async def down(self, key: str, target: Path) -> None:
        """Unmount it and delete what the container wrote. Idempotent, also after a crash."""

    def usage(self, key: str) -> Usage:
        """What the container wrote. Zero for an unknown key. Blocking: it walks the directory."""

    def read(self, rootfs: Rootfs, name: str, limit: int) -> bytes:
        """Return a file's content as a process with that root finds it; empty: no such regular file.

        Of a `rootfs` that this store made and still holds. Blocking. Raises OSError when the root cannot be
        read, InvalidSpec for a file of more than `limit` bytes.
        """

    def keys(self) -> Collection[str]:
        """Every key that holds something here, for the sweep at start."""
