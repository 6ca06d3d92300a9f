"""Root filesystems by overlayfs.

    ROOT/rootfs/KEY/upper    what the container wrote
    ROOT/rootfs/KEY/work     overlayfs's work directory
    ROOT/rootfs/KEY/empty    the only lower layer of an image without layers
    ROOT/rootfs/KEY/plain    directories that are mounted over their places, so as not to be in the overlay
    ROOT/rootfs/KEY/points   mount points of layers with mapped ids

Layers are passed to the kernel as /proc/self/fd/N. mount(2) takes one page of options, which the paths of
about forty layers would fill; short names allow as many as overlayfs can stack, and need no escaping of
colons and commas.

Mounted `volatile` (overlayfs.rst, "Volatile mount"): a writable layer never outlives the machine's boot, as
its container is gone then, so neither an fsync in the guest nor the unmount waits for the host's disk.
Mounted nosuid and nodev: set-id programs and device nodes are for the guest's kernel, which sees them through
virtio-fs; on the host they must have no effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from image import idmap, plain_directory, tree_ops
from image.blobs import storage_error
from image.errors import ImageNotFound
from image.idmap import IdMap
from image.layers import LayerStore
from image.rootfs import HostTree, Rootfs
from image.tree_ops import Usage
from sandbox.host import mount_flags, syscalls, threads
from sandbox.host.mounts import unmount_all
from sandbox.host.openat import read_beneath

_PATH_ONLY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME_LIMIT = 128


class OverlayStore:
    """The `RootfsStore` that mounts overlayfs at `target`. See there for each method."""

    def __init__(self, root: Path, layers: LayerStore) -> None:
        self._root = root / "rootfs"
        self._layers = layers

    async def up(
        self,
        key: str,
        chain_ids: Sequence[str],
        target: Path,
        ids: IdMap | None = None,
        plain: Sequence[str] = (),
    ) -> Rootfs:
        """Mount a new root filesystem. A cancelled call waits for the mount and undoes it."""
        for chain_id in chain_ids:
            if self._layers.find(chain_id) is None:
                raise ImageNotFound(
                    chain_id, "a layer of the image is not stored any more; pull the image again"
                )
        with self._layers.pinned(chain_ids):
            await threads.run(
                lambda: self._up(key, chain_ids, target, ids, plain),
                "husk-rootfs",
                discard=lambda _: self._down(key, target),
            )
        return HostTree(path=str(target))

    async def down(self, key: str, target: Path) -> None:
        """Unmount `target` and delete the writable layer."""
        await asyncio.to_thread(self._down, key, target)

    def usage(self, key: str) -> Usage:
        """Measure the writable layer, plain directories included."""
        parts = [tree_ops.measure(self._home(key) / name) for name in ("upper", "plain")]
        return Usage(bytes=sum(each.bytes for each in parts), inodes=sum(each.inodes for each in parts))

    def read(self, rootfs: Rootfs, name: str, limit: int) -> bytes:
        """Read a file through the mount."""
        return read_beneath(Path(rootfs.path), name, limit)

    def keys(self) -> Collection[str]:
        """Return the names of all directories."""
        try:
            return tuple(path.name for path in self._root.iterdir())
        except FileNotFoundError:
            return ()

    # ------------------------------------------------------------------------- in a thread

    def _home(self, key: str) -> Path:
        if not key or len(key) > _NAME_LIMIT or "/" in key or key.startswith("."):
            raise ValueError(f"not a key: {key!r}")
        return self._root / key

    def _up(
        self, key: str, chain_ids: Sequence[str], target: Path, ids: IdMap | None, plain: Sequence[str]
    ) -> None:
        home = self._home(key)
        self._down(key, target)
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("upper", "work", "empty", "points"):
                (home / name).mkdir(parents=True)
                (home / name).chmod(0o755)
            target.mkdir(parents=True, exist_ok=True)
            lowers = self._layers.stack(chain_ids)
            _copy_root_attributes(lowers, home / "upper", ids)
            _mount(lowers or [home / "empty"], home, target, ids)
            for number, path in enumerate(plain):
                plain_directory.attach(target, path, home / "plain" / str(number), ids)
        except OSError as error:
            self._down(key, target)
            raise storage_error(error, target, "mounting a root filesystem") from error

    def _down(self, key: str, target: Path) -> None:
        home = self._home(key)
        try:
            unmount_all(target)  # a killed `up` may have been repeated
            tree_ops.remove(home)
        except OSError as error:
            raise storage_error(error, home, "removing a root filesystem") from error


def _copy_root_attributes(lowers: Sequence[Path], upper: Path, ids: IdMap | None) -> None:
    """Give the upper directory the owner and mode of the image's root: it is the merged view's root."""
    top = lowers[0].stat() if lowers else upper.stat()
    owner = (top.st_uid, top.st_gid)
    if ids is not None:
        owner = ids.to_outside(top.st_uid, top.st_gid)
    os.chown(upper, *owner)
    upper.chmod(top.st_mode & 0o7777)


def _mount(lowers: Sequence[Path], home: Path, target: Path, ids: IdMap | None) -> None:
    def mount(lowers: Sequence[Path], target: Path) -> None:
        _mount_overlay(lowers, home / "upper", home / "work", target)

    if ids is None:
        mount(lowers, target)
        return
    tree = idmap.mount_mapped(lowers, ids, home / "points", mount)
    try:
        idmap.attach_mount(tree, target)
    finally:
        os.close(tree)


@contextlib.contextmanager
def _opened(paths: Sequence[Path]) -> Iterator[list[str]]:
    fds: list[int] = []
    try:
        for path in paths:
            fds.append(os.open(path, _PATH_ONLY))  # noqa: PERF401 (what is open must be closed)
        yield [f"/proc/self/fd/{fd}" for fd in fds]
    finally:
        for fd in fds:
            os.close(fd)


def _mount_overlay(lowers: Sequence[Path], upper: Path, work: Path, target: Path) -> None:
    with _opened([upper, work, *lowers]) as (upper_fd, work_fd, *lower_fds):
        options = f"lowerdir={':'.join(lower_fds)},upperdir={upper_fd},workdir={work_fd}"
        try:
            _mount_at(target, f"{options},volatile")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _mount_at(target, options)  # a kernel before 5.10


def _mount_at(target: Path, options: str) -> None:
    if len(options) >= os.sysconf("SC_PAGE_SIZE"):
        raise OSError(errno.E2BIG, "too many layers for one mount", str(target))
    syscalls.mount("husk", target, "overlay", mount_flags.MS_NOSUID | mount_flags.MS_NODEV, options)
