"""Unpacked layers, each stored once and shared by all images that stack it in the same way.

    ROOT/layers/CHAIN/fs/          the layer in overlayfs's form
    ROOT/layers/CHAIN/layer.json   what it is (`Layer`)
    ROOT/layers/CHAIN/unsynced     a boot id: not known to be on the disk yet
    ROOT/staging/RANDOM/           being made; renamed into place when complete
    ROOT/trash/RANDOM/             being deleted

A layer exists completely or not at all: it is renamed after both its digests were verified. Killed at any
point, what is incomplete lies in staging or trash, which the next start deletes. After a power failure a
layer that is still marked `unsynced` by another boot may lack data, so it is dropped and pulled again; in
return, no pull waits for the disk.

A layer is named by its chain id, not by its digest: the same archive may unpack differently on top of other
layers (OCI image-spec, config.md, "Layer ChainID").
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from image import layer, tree, tree_ops
from image.blobs import storage_error
from image.budget import Limits, Watch
from image.compression import Inflated, LargeWindows
from image.errors import DigestMismatch
from image.free_space import SpaceFloor
from image.inode_spreading import spread_directories
from image.tree_ops import Usage
from sandbox.host import files, threads
from sandbox.host.proc import boot_id
from sandbox.host.syscalls import syncfs

log = logging.getLogger(__name__)

STOP_LIMIT_S = 30.0  # how long a cancelled unpacking is awaited
DELETIONS = 4  # at a time


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """The description of a stored layer, as layer.json holds it."""

    chain_id: str
    diff_id: str
    bytes: int
    inodes: int


class LayerStore:
    """The layers below one directory. Not thread-safe: belongs to one event loop. `load` it before use."""

    def __init__(self, root: Path, limits: Limits | None = None, min_free_bytes: int = 0) -> None:
        self._root = root
        self.space = SpaceFloor(root, min_free_bytes)
        self._limits = limits or Limits()
        self.large_windows = LargeWindows()
        self._layers: dict[str, Layer] = {}
        self._unsynced: dict[str, Layer] = {}
        self._pins: Counter[str] = Counter()
        self._bytes = 0
        self._inodes = 0

    # ------------------------------------------------------------------------------ look-up

    @property
    def usage(self) -> Usage:
        """What all layers occupy."""
        return Usage(bytes=self._bytes, inodes=self._inodes)

    @property
    def has_unsynced(self) -> bool:
        """Whether `sync` has something to write."""
        return bool(self._unsynced)

    def find(self, chain_id: str) -> Layer | None:
        """Return a layer; None if it is not stored."""
        return self._layers.get(chain_id)

    def path(self, chain_id: str) -> Path:
        """Return the directory that overlayfs mounts for this layer."""
        return self._home(chain_id) / "fs"

    def stack(self, chain_ids: Sequence[str]) -> list[Path]:
        """Return the directories of these layers, topmost first; `chain_ids` are bottom first.

        Without those below a layer that hides everything: overlayfs ignores an opaque root. Blocking.
        """
        paths: list[Path] = []
        for chain_id in reversed(chain_ids):
            paths.append(self.path(chain_id))
            if tree.is_opaque(str(paths[-1])):
                break
        return paths

    def chain_ids(self) -> Collection[str]:
        """Return the chain ids of all layers."""
        return tuple(self._layers)

    def _home(self, chain_id: str) -> Path:
        return self._root / "layers" / chain_id.removeprefix("sha256:")

    @property
    def scratch(self) -> Path:
        """A directory for nameless files, on the store's file system."""
        return self._root / "staging"

    @property
    def trash(self) -> Path:
        """The directory of what is being deleted."""
        return self._root / "trash"

    # ----------------------------------------------------------------------------- start-up

    def load(self) -> None:
        """Read all layers and delete what is broken or incomplete. Blocking: call it once, at start.

        Raises OSError when the store's directories cannot be made or read; one bad layer is logged.
        """
        for name in ("layers", "staging", "trash"):
            (self._root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        spread_directories(self._root / "staging")
        for leftover in (self._root / "staging").iterdir():
            self._discard(leftover)
        for home in (self._root / "layers").iterdir():
            try:
                found = self._read(home)
            except (OSError, msgspec.DecodeError, ValueError, RecursionError) as error:
                log.warning("dropping layer %s, which is pulled again when needed: %s", home.name, error)
                self._discard(home)
            else:
                self._add(found, unsynced=(home / "unsynced").exists())
        self.empty_trash()

    def _read(self, home: Path) -> Layer:
        found = msgspec.json.decode((home / "layer.json").read_bytes(), type=Layer)
        if self._home(found.chain_id) != home or not (home / "fs").is_dir():
            raise ValueError("its description does not match its name")
        unsynced = home / "unsynced"
        if unsynced.exists() and unsynced.read_text(encoding="ascii") != boot_id():
            raise ValueError("the machine went down before the layer was synced to the disk")
        return found

    def _add(self, found: Layer, *, unsynced: bool) -> None:
        self._layers[found.chain_id] = found
        self._bytes += found.bytes
        self._inodes += found.inodes
        if unsynced:
            self._unsynced[found.chain_id] = found

    # ------------------------------------------------------------------------------- making

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """Yield a new directory; afterwards whatever is still in it goes to the trash.

        Raises DiskFull, StorageFailed.
        """
        try:
            path = Path(tempfile.mkdtemp(dir=self._root / "staging"))
        except OSError as error:
            raise storage_error(error, self._root / "staging", "making a directory") from error
        try:
            yield path
        finally:
            self._discard(path)

    @contextlib.contextmanager
    def pinned(self, chain_ids: Collection[str]) -> Iterator[None]:
        """Protect these layers from `remove`, whether they exist yet or not. Nests."""
        self._pins.update(chain_ids)
        try:
            yield
        finally:
            self._pins.subtract(chain_ids)
            self._pins = +self._pins

    async def unpack(
        self, chain_id: str, diff_id: str, below: Sequence[str] | None, blob: Path
    ) -> Layer | None:
        """Make a layer from an archive; `below` are the chain ids under it, bottom first.

        With None for `below`, these are not stored yet: returns None where the layer depends on them, as one
        does that hard-links to a file below, or lacks the directory of a file.

        Of several that make the same layer at once, the first to finish stores it; all return that one.
        Raises LayerRejected, DigestMismatch, DiskFull, StorageFailed; then nothing is kept. When cancelled it
        waits up to STOP_LIMIT_S until its thread has stopped, which would write into what is being deleted.
        """
        with self.staging() as stage:
            stop = threading.Event()
            try:
                found = await threads.run(
                    lambda: self._unpack(stage, chain_id, diff_id, below, blob, stop),
                    "husk-unpack",
                    on_cancel=stop.set,
                    linger_s=STOP_LIMIT_S,
                )
            except tree.NeedsBelow:
                return None
            if (stored := self._layers.get(chain_id)) is not None:
                return stored
            try:
                stage.rename(self._home(chain_id))
            except OSError as error:
                raise storage_error(error, stage, "storing a layer") from error
        self._add(found, unsynced=True)
        return found

    def _unpack(
        self,
        stage: Path,
        chain_id: str,
        diff_id: str,
        below: Sequence[str] | None,
        blob: Path,
        stop: threading.Event,
    ) -> Layer:
        target = stage / "fs"
        watch = Watch(self._limits, "unpack_s", stop)
        try:
            target.mkdir()
            (stage / "unsynced").write_text(boot_id(), encoding="ascii")
            lowers = None if below is None else [str(path) for path in self.stack(below)]
            with (
                blob.open("rb") as file,
                contextlib.closing(Inflated(file, self._limits, watch.check, self.large_windows)) as plain,
            ):
                usage = layer.unpack(
                    self._guarded(plain), str(target), lowers=lowers, limits=self._limits, watch=watch
                )
                actual = plain.digest
            if actual != diff_id:
                raise DigestMismatch("unpacked layer (diff id)", diff_id, actual)
            found = Layer(chain_id=chain_id, diff_id=diff_id, bytes=usage.bytes, inodes=usage.inodes)
            files.write_json(stage / "layer.json", found)
        except OSError as error:
            raise storage_error(error, target, "unpacking a layer") from error
        return found

    def _guarded(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the chunks of an archive while there is free space for them."""
        for chunk in chunks:
            self.space.check("unpacking a layer", len(chunk))
            yield chunk

    def sync(self) -> None:
        """Write all layers to the disk, then remove their marks. Blocking. Raises OSError.

        A layer that is made or made again meanwhile stays marked.
        """
        synced = dict(self._unsynced)
        if not synced:
            return
        _syncfs(self._root)
        for chain_id, found in synced.items():
            if self._unsynced.get(chain_id) is found:
                del self._unsynced[chain_id]
                (self._home(chain_id) / "unsynced").unlink(missing_ok=True)

    # ----------------------------------------------------------------------------- deleting

    def remove(self, chain_ids: Collection[str]) -> None:
        """Remove layers at once; `empty_trash` frees their space. Pinned and unknown ones are left alone."""
        for chain_id in chain_ids:
            found = self._layers.get(chain_id)
            if found is None or self._pins[chain_id]:
                continue
            del self._layers[chain_id]
            self._unsynced.pop(chain_id, None)
            self._bytes -= found.bytes
            self._inodes -= found.inodes
            self._discard(self._home(chain_id))

    def _discard(self, path: Path) -> None:
        """Move a directory to the trash: a rename, so that what is half deleted is never read as a layer."""
        try:
            path.rename(self.trash / secrets.token_hex(16))
        except FileNotFoundError:
            return
        except OSError:
            _delete(path)

    def empty_trash(self) -> None:
        """Delete what is in the trash. Blocking. What cannot be deleted is logged and tried the next time.

        DELETIONS directories at a time, because deleting is mostly waiting for the disk.
        """
        with ThreadPoolExecutor(DELETIONS, "husk-trash") as pool:
            list(pool.map(_delete, self.trash.iterdir()))


def _delete(path: Path) -> None:
    try:
        (path / "layer.json").unlink(missing_ok=True)  # without its description it is not a layer
        tree_ops.remove(path)
    except OSError as error:
        log.warning("cannot delete %s, which is tried again later: %s", path, error)


def _syncfs(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syncfs(fd, what=path)
    finally:
        os.close(fd)
