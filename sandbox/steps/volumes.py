"""Volumes of containers in either kind of pod: images that are mounted, and the sources of mounts.

images/ID/N    where the host mounts an image that is the source of mount N of container ID
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from image.stores import RootfsStore
from sandbox.container import Container
from sandbox.errors import InvalidSpec
from sandbox.host.openat import open_beneath
from sandbox.spec import MountSpec
from sandbox.steps.pod import remove_tree
from sandbox.steps.rootfs import id_map, require_tree

FIND = os.O_PATH | os.O_CLOEXEC


async def mount_images(store: RootfsStore, container: Container) -> None:
    """Mount the images that are sources of the container's mounts.

    Raises ImageNotFound, StorageFailed, DiskFull, and RootfsUnusable for a store that makes disks.
    """
    for volume in container.record.image_volumes:
        place = image_place(container, volume.mount)
        await asyncio.to_thread(place.mkdir, 0o700, parents=True, exist_ok=True)
        ids = id_map(container.pod.record.spec.user_namespace)
        rootfs = await store.up(image_key(container, volume.mount), volume.chain_ids, place, ids)
        require_tree(rootfs)


async def unmount_images(store: RootfsStore, container: Container) -> None:
    """Unmount the images. Idempotent."""
    for volume in container.record.image_volumes:
        await store.down(image_key(container, volume.mount), image_place(container, volume.mount))
    await asyncio.to_thread(remove_tree, _images(container))


def image_key(container: Container, number: int) -> str:
    """Return the image's key in the store: the container's id, for the sweep, and the mount's number."""
    return f"{container.id}.{number}"


def image_place(container: Container, number: int) -> Path:
    """Return where the image of this mount is mounted on the host."""
    return _images(container) / str(number)


def _images(container: Container) -> Path:
    return container.pod.run_dir / "images" / container.id


def open_source(container: Container, number: int, mount: MountSpec) -> int:
    """Open the source of a mount: a path of the host, or one in an image, whose links stay in the image.

    Returns an O_PATH descriptor that the caller owns. Blocking. Raises InvalidSpec for a path that does not
    exist.
    """
    at = f"config.mounts[{number}]"
    if mount.image:
        try:
            return open_beneath(image_place(container, number), mount.image_sub_path or ".", os.O_PATH)
        except OSError as error:
            problem = f"{mount.image_sub_path!r} is not in the image: {error.strerror}"
            raise InvalidSpec(f"{at}.image_sub_path", problem) from error
    try:
        return os.open(os.path.realpath(mount.host_path), FIND)
    except FileNotFoundError as error:
        raise InvalidSpec(f"{at}.host_path", f"{mount.host_path!r} does not exist") from error
