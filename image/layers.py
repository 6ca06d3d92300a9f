"""Unpacked layers, each once, shared by all images that stack it the same way.

    ROOT/layers/CHAIN/fs/          the layer in overlayfs's form
    ROOT/layers/CHAIN/layer.json   what it is (`Layer`)
    ROOT/layers/CHAIN/unsynced     a boot id: not known to be on the disk yet
    ROOT/staging/RANDOM/           being made; renamed into place when whole
    ROOT/trash/RANDOM/             being deleted

A layer is there whole or not at all: it is renamed when both its digests were right. Killed at any
point, what is left lies in staging or trash, which the next start deletes. After a power cut a
layer still marked `unsynced` by another boot may lack its data, so it is dropped and pulled again;
in return no pull has to wait for the disk. A layer is named by chain id, not by digest, as the
same archive may come out differently above other layers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from image import layer
from image.blobs import storage_error
from image.compression import Inflated
from image.errors import DigestMismatch
from image.inode_spreading import scatter
from image.layer import Limits, Usage
from sandbox.host import threads
from sandbox.host.proc import boot_id
from sandbox.host.syscalls import syncfs

log = logging.getLogger(__name__)

STOP_LIMIT_S = 30.0
DELETIONS = 4  # at a time


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    chain_id: str
    diff_id: str
    bytes: int
    inodes: int


class LayerStore:
    """Not thread-safe: belongs to one event loop. `load` it before use."""

    def __init__(self, root: Path, limits: Limits | None = None) -> None:
        self._root = root
        self._limits = limits or Limits()
        self._layers: dict[str, Layer] = {}
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}  # and how many hold or await it
        self._pins: Counter[str] = Counter()
        self._bytes = 0
        self._inodes = 0

    # ------------------------------------------------------------------------------ look-up

    @property
    def usage(self) -> Usage:
        return Usage(bytes=self._bytes, inodes=self._inodes)

    def find(self, chain_id: str) -> Layer | None:
        return self._layers.get(chain_id)

    def path(self, chain_id: str) -> Path:
        return self._home(chain_id) / "fs"

    def chain_ids(self) -> Collection[str]:
        return tuple(self._layers)

    def _home(self, chain_id: str) -> Path:
        return self._root / "layers" / chain_id.removeprefix("sha256:")

    @property
    def trash(self) -> Path:
        return self._root / "trash"

    # ----------------------------------------------------------------------------- start-up

    def load(self) -> None:
        """Read what is there; what is broken goes to the trash. Blocking: once, at start."""
        for name in ("layers", "staging", "trash"):
            (self._root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        scatter(self._root / "staging")
        for leftover in (self._root / "staging").iterdir():
            self._discard(leftover)
        for home in (self._root / "layers").iterdir():
            try:
                self._add(self._read(home))
            except (OSError, msgspec.DecodeError, ValueError) as error:
                log.warning("layer %s is dropped: %s", home.name, error)
                self._discard(home)
        self.empty_trash()

    def _read(self, home: Path) -> Layer:
        found = msgspec.json.decode((home / "layer.json").read_bytes(), type=Layer)
        if self._home(found.chain_id) != home or not (home / "fs").is_dir():
            raise ValueError("does not fit its name")
        unsynced = home / "unsynced"
        if unsynced.exists() and unsynced.read_text(encoding="ascii") != boot_id():
            raise ValueError("the machine went down before it was written out")
        return found

    def _add(self, found: Layer) -> None:
        self._layers[found.chain_id] = found
        self._bytes += found.bytes
        self._inodes += found.inodes

    # ------------------------------------------------------------------------------- making

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A directory of one's own, deleted afterwards with whatever is in it."""
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
        """These are about to be used: `remove` leaves them alone."""
        self._pins.update(chain_ids)
        try:
            yield
        finally:
            self._pins.subtract(chain_ids)
            self._pins = +self._pins

    @contextlib.asynccontextmanager
    async def making(self, chain_id: str) -> AsyncIterator[None]:
        """One maker at a time; whoever comes second finds the layer made."""
        lock, users = self._locks.get(chain_id, (asyncio.Lock(), 0))
        self._locks[chain_id] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            _, users = self._locks.pop(chain_id)
            if users > 1:
                self._locks[chain_id] = lock, users - 1

    async def unpack(self, chain_id: str, diff_id: str, below: Sequence[str], blob: Path) -> Layer:
        """Make a layer of an archive; `below` are the chain ids under it, bottom first.

        Raises LayerRejected, DigestMismatch, DiskFull, StorageFailed. Cancelled, it waits until its
        thread has stopped, so nobody writes into a directory that is being deleted.
        """
        lowers = [str(self.path(under)) for under in reversed(below)]
        with self.staging() as stage:
            stop = threading.Event()
            found = await threads.run(
                lambda: self._unpack(stage, chain_id, diff_id, lowers, blob, stop),
                "husk-unpack",
                on_cancel=stop.set,
                linger_s=STOP_LIMIT_S,
            )
            try:
                stage.rename(self._home(chain_id))
            except OSError as error:
                raise storage_error(error, stage, "storing a layer") from error
        self._add(found)
        return found

    def _unpack(
        self,
        stage: Path,
        chain_id: str,
        diff_id: str,
        lowers: Sequence[str],
        blob: Path,
        stop: threading.Event,
    ) -> Layer:
        target = stage / "fs"
        try:
            target.mkdir()
            (stage / "unsynced").write_text(boot_id(), encoding="ascii")
            with blob.open("rb") as file, contextlib.closing(Inflated(file)) as plain:
                usage = layer.unpack(iter(plain), str(target), lowers=lowers, limits=self._limits, stop=stop)
                actual = plain.digest
            if actual != diff_id:
                raise DigestMismatch("unpacked layer (diff id)", diff_id, actual)
            found = Layer(chain_id=chain_id, diff_id=diff_id, bytes=usage.bytes, inodes=usage.inodes)
            (stage / "layer.json").write_bytes(msgspec.json.encode(found))
        except OSError as error:
            raise storage_error(error, target, "unpacking a layer") from error
        return found

    def sync(self) -> None:
        """Bring all that is here to the disk and note it. Blocking."""
        marks = [self._home(chain_id) / "unsynced" for chain_id in tuple(self._layers)]
        marks = [mark for mark in marks if mark.exists()]
        if not marks:
            return
        _syncfs(self._root)
        for mark in marks:
            mark.unlink(missing_ok=True)

    # ----------------------------------------------------------------------------- deleting

    def remove(self, chain_ids: Collection[str]) -> None:
        """Take layers away at once; `empty_trash` frees their space. Pinned ones stay."""
        for chain_id in chain_ids:
            found = self._layers.get(chain_id)
            if found is None or self._pins[chain_id]:
                continue
            del self._layers[chain_id]
            self._bytes -= found.bytes
            self._inodes -= found.inodes
            self._discard(self._home(chain_id))

    def _discard(self, path: Path) -> None:
        """A rename, so what is half deleted is never taken for a layer."""
        try:
            path.rename(self.trash / secrets.token_hex(16))
        except FileNotFoundError:
            return
        except OSError:
            # a layer without its description is none
            (path / "layer.json").unlink(missing_ok=True)
            _delete(path)

    def empty_trash(self) -> None:
        """Blocking; again after a crash. A few at a time: deleting is mostly waiting for the disk."""
        with ThreadPoolExecutor(DELETIONS, "husk-trash") as pool:
            list(pool.map(_delete, self.trash.iterdir()))


def _delete(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("cannot delete %s yet: %s", path, error)


def _syncfs(path: Path) -> None:
    """syncfs(2): one filesystem, not the whole machine as os.sync."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syncfs(fd, what=path)
    finally:
        os.close(fd)
