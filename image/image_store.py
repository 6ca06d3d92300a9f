"""The image store as the daemon uses it: index, layers, pulls, root filesystems and garbage collection.

    ROOT/images/{images,layers,staging,trash}     see `index` and `layers`
    ROOT/rootfs/KEY                               see `stores/overlay`

After a crash: `load` drops what is broken or incomplete and keeps the rest; `collect`, once the containers
are known, removes what nothing uses. Nothing else needs repair.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Coroutine, Sequence
from pathlib import Path

import msgspec

from image.auth import Auth
from image.blobs import Progress
from image.errors import ImageError
from image.gc import Collector
from image.idmap import find_obstacle
from image.index import Image, Index
from image.layers import LayerStore
from image.options import ImageOptions
from image.puller import Puller
from image.running import Transfer
from image.stores.overlay import OverlayStore
from sandbox.host.limiter import Limiter

log = logging.getLogger(__name__)

# As long as the kernel lets dirty pages wait (vm.dirty_expire_centisecs). An image that is removed before was
# never written, and its 20,000 files are deleted five times as fast as when a syncfs runs beside.
SYNC_DELAY_S = 30.0
_INODE_BYTES = 4096


class FsUsage(msgspec.Struct, frozen=True, kw_only=True):
    """FilesystemUsage of the CRI's ImageFsInfo."""

    mountpoint: str  # a path of the filesystem that images lie on
    used_bytes: int
    inodes_used: int


class ImageStore:
    """All images below one directory. Belongs to one event loop; `load` it before use and close it.

    `in_use` returns the chain ids of all layers that containers use, or None while that is not known: then
    no layer is removed. It is called at each collection.
    """

    def __init__(
        self,
        root: Path,
        options: ImageOptions | None = None,
        in_use: Callable[[], Collection[str] | None] = tuple,
    ) -> None:
        options = options or ImageOptions()
        self._root = root / "images"
        self.index = Index(self._root, options.limits, options.pinned)
        self.layers = LayerStore(self._root, options.limits, options.min_free_bytes)
        self.rootfs = OverlayStore(root, self.layers)
        self.puller = Puller(self.index, self.layers, options, self._pull_ended)
        self._collector = Collector(self.index, self.layers, in_use)
        self._background: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()
        self._syncing = False

    def load(self) -> None:
        """Read the store, and delete what a crash left incomplete. Blocking: call it once, at start.

        Raises OSError when its directories cannot be made or read.
        """
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.layers.load()
        self.index.load(lambda image: all(self.layers.find(c) for c in image.chain_ids))

    async def close(self) -> None:
        """Cancel pulls and write what was pulled to the disk."""
        await self.puller.close()
        self._closing.set()
        while self._background:
            await asyncio.wait(self._background)

    def limiters(self) -> Sequence[Limiter]:
        """Return the limiters of what pulls do at once: downloads, unpacking, reading of documents."""
        return self.puller.limiters

    async def pull(
        self, ref: str, auth: Auth | None = None, *, on_progress: Callable[[Progress], None] | None = None
    ) -> Image:
        """Pull an image. See `Puller.pull`."""
        return await self.puller.pull(ref, auth, on_progress=on_progress)

    async def import_archive(
        self, path: Path, *, name: str = "", on_progress: Callable[[Progress], None] | None = None
    ) -> tuple[Image, ...]:
        """Import the images of an archive. See `Puller.import_archive`."""
        return await self.puller.import_archive(path, name=name, on_progress=on_progress)

    def transfers(self) -> Sequence[Transfer]:
        """Return the pulls and imports that are under way, the oldest first."""
        return self.puller.transfers.list()

    def find(self, ref: str) -> Image:
        """Return the image of a name, digest or id. Raises ImageNotFound."""
        return self.index.find(ref)

    def list(self) -> tuple[Image, ...]:
        """Return all images."""
        return self.index.list()

    async def remove(self, ref: str) -> Image | None:
        """Remove an image with all its names, and the layers that nothing else uses.

        `find` and `list` do not show it from the first moment on; its space is free on return. Returns None
        for an unknown reference, so that of two concurrent removals both succeed (CRI: "must not return an
        error if the image has already been removed").
        """
        image = self.index.remove(ref)
        if image is not None:
            await self.collect()
        return image

    async def collect(self) -> None:
        """Remove layers that nothing uses, as after the removal of a container whose image is gone."""
        await self._collector.collect()
        self._sync_later()

    def find_idmap_obstacle(self) -> str:
        """Return why root filesystems cannot have mapped ids; empty if they can. Blocking."""
        with self.layers.staging() as scratch:
            return find_obstacle(scratch)

    def fs_usage(self) -> FsUsage:
        """Return what images occupy, from sums that are kept as layers come and go."""
        usage = self.layers.usage
        entries = len(self.index.list())
        return FsUsage(
            mountpoint=str(self._root),
            used_bytes=usage.bytes + entries * _INODE_BYTES,
            inodes_used=usage.inodes + entries,
        )

    # --------------------------------------------------------------------------- background

    def _pull_ended(self) -> None:
        self._start(self._delete_discarded())
        self._sync_later()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _delete_discarded(self) -> None:
        """Delete what a pull staged, and what a failed or cancelled one left."""
        try:
            await self._collector.empty_trash()
        except OSError as error:
            log.warning(
                "what a pull discarded could not be deleted and is deleted at the next start: %s", error
            )

    def _sync_later(self) -> None:
        """No pull waits for the disk (see `layers`): sync in SYNC_DELAY_S, or when the store is closed."""
        if not self._syncing and self.layers.has_unsynced:
            self._syncing = True
            self._start(self._sync())

    async def _sync(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), SYNC_DELAY_S)
        try:
            await asyncio.to_thread(self.layers.sync)
        except (OSError, ImageError) as error:
            log.warning(
                "pulled layers could not be synced; after a power failure they are pulled again: %s", error
            )
            return
        finally:
            self._syncing = False
        self._sync_later()  # what was pulled meanwhile
