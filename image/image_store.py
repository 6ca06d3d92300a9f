"""Images as the daemon sees them: one object over index, layers, pulls and collection.

    ROOT/images/{images,layers,staging,trash}     see `index` and `layers`
    ROOT/rootfs/KEY                               see `stores/overlay`

Crash story: `load` at start drops what is broken or half-made and keeps the rest; `collect`, once
the containers are known, drops what nobody uses. Nothing else needs repair.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import msgspec

from image.auth import Auth
from image.blobs import Progress
from image.errors import ImageError
from image.gc import Collector
from image.idmap import find_obstacle
from image.index import Image, Index
from image.layers import LayerStore
from image.puller import Puller
from image.settings import Settings
from image.stores.overlay import OverlayStore
from sandbox.host.limiter import Limiter

log = logging.getLogger(__name__)

_INODE_BYTES = 4096


class FsUsage(msgspec.Struct, frozen=True, kw_only=True):
    mountpoint: str  # a path of the filesystem that images lie on
    used_bytes: int
    inodes_used: int


class ImageStore:
    """Belongs to one event loop. `load` before use, `close` in the end.

    `in_use` gives the chain ids of all layers that containers stand on; it is asked at every
    collection.
    """

    def __init__(
        self, root: Path, settings: Settings | None = None, in_use: Callable[[], Collection[str]] = tuple
    ) -> None:
        settings = settings or Settings()
        self._root = root / "images"
        self.index = Index(self._root)
        self.layers = LayerStore(self._root, settings.limits)
        self.rootfs = OverlayStore(root, self.layers)
        self.puller = Puller(self.index, self.layers, settings, self._settle)
        self._collector = Collector(self.index, self.layers, in_use)
        self._background: set[asyncio.Task[None]] = set()

    def load(self) -> None:
        """Read what is there and sweep what was begun and not finished. Blocking: once, at start."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.layers.load()
        self.index.load(lambda image: all(self.layers.find(c) for c in image.chain_ids))

    async def close(self) -> None:
        """End pulls, and see that what was pulled is on the disk."""
        await self.puller.close()
        while self._background:
            await asyncio.wait(self._background)

    def stages(self) -> Sequence[Limiter]:
        """Stages of a pull that only so many layers may be in at once, over all pulls."""
        return self.puller.stages

    async def pull(
        self, ref: str, auth: Auth | None = None, *, on_progress: Callable[[Progress], None] | None = None
    ) -> Image:
        """See `Puller.pull`."""
        return await self.puller.pull(ref, auth, on_progress=on_progress)

    async def import_archive(
        self, path: Path, *, name: str = "", on_progress: Callable[[Progress], None] | None = None
    ) -> tuple[Image, ...]:
        """See `Puller.import_archive`."""
        return await self.puller.import_archive(path, name=name, on_progress=on_progress)

    def find(self, ref: str) -> Image:
        """Raises ImageNotFound."""
        return self.index.find(ref)

    def list(self) -> tuple[Image, ...]:
        return self.index.list()

    async def remove(self, ref: str) -> Image | None:
        """Remove an image with all its names; its layers go unless something else uses them.

        It is gone from `find` and `list` at once. An unknown name is fine (None), so that two
        removals at a time both succeed.
        """
        image = self.index.remove(ref)
        if image is not None:
            await self.collect()
        return image

    async def collect(self) -> None:
        """Remove layers that nothing uses: after the removal of a container whose image is gone."""
        await self._collector.collect()

    def find_idmap_obstacle(self) -> str:
        """Why root filesystems cannot be had with shifted ids; empty when they can. Blocking."""
        with self.layers.staging() as scratch:
            return find_obstacle(scratch)

    def fs_usage(self) -> FsUsage:
        """What images take, from sums that are kept as layers come and go."""
        usage = self.layers.usage
        entries = len(self.index.list())
        return FsUsage(
            mountpoint=str(self._root),
            used_bytes=usage.bytes + entries * _INODE_BYTES,
            inodes_used=usage.inodes + entries,
        )

    def _settle(self) -> None:
        """Behind the caller's back: no pull waits for the disk (see `layers`)."""
        task = asyncio.create_task(self._write_out())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _write_out(self) -> None:
        try:
            # what a pull that failed or was called off discarded
            await self._collector.empty_trash()
            await asyncio.to_thread(self.layers.sync)
        except (OSError, ImageError) as error:
            log.warning("images are not known to be on the disk yet: %s", error)
