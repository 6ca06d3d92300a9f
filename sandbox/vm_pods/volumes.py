"""A container's volumes: files of the host, and images, in the share that the guest sees.

    back/volumes/ID/N    an empty directory or file for each mount of the specification

Volumes are mounted on these points in the mount namespace of the virtiofsd that exports the share, and
nowhere else: a volume that its owner unmounts must not be busy because a copy of it is mounted in the
owner's own namespace, and nothing of a pod fills the host's mount table.

Volumes on huge pages are not among them: they are the guest's own (see `huge`). For them, and for what
the container may have of huge pages, the VM is made larger here; that is never undone, as with all memory.

Nor are those of live files, which the step before has copied to the guest (see `live_files`).

Crash story: deleting a mount point detaches what is mounted on it in other namespaces (rmdir(2)
does, since Linux 3.18), so no process is needed to undo; and they end with the virtiofsd.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from image import idmap
from image.stores import RootfsStore
from sandbox.container import Container
from sandbox.errors import InvalidSpec, VmmGone
from sandbox.host import mount_flags, mounts, process
from sandbox.plan import MountSource, huge_mib
from sandbox.plan.shares import GUEST_VOLUMES, VOLUMES_TAG
from sandbox.plan.values import HugeDirectory
from sandbox.spec import MountSpec, Propagation
from sandbox.steps.pod import remove_tree
from sandbox.steps.rootfs import id_map
from sandbox.steps.volumes import FIND, mount_images, open_source, unmount_images
from sandbox.vm_pods.hugepages import find_directory, guest_path
from sandbox.vm_pods.resize import Resizer
from sandbox.vm_pods.runtime import runtime_of


@dataclass(frozen=True, slots=True)
class Volumes:
    """A container's volumes: its mounts as seen by the guest, and memory for its huge pages."""

    store: RootfsStore
    resizer: Resizer
    name = "volumes"

    async def up(self, container: Container) -> None:
        directories = await self._attach(container) if container.record.spec.mounts else []
        if directories or huge_mib(container.record.resources):
            pod = container.pod
            async with pod.lock:
                pod.require_ready()
                limits = {container.id: container.record.resources}
                await self.resizer.ensure_capacity(
                    pod, pod.record.resources, pod.record.overhead, limits, directories
                )

    async def _attach(self, container: Container) -> Sequence[HugeDirectory]:
        """What lies on huge pages is attached to nothing, and given back."""
        await mount_images(self.store, container)
        return await asyncio.to_thread(_attach_all, container)

    async def down(self, container: Container) -> None:
        await asyncio.to_thread(_detach_all, container)
        await unmount_images(self.store, container)


def _detach_all(container: Container) -> None:
    mounts.unmount_tree(container.volumes)
    remove_tree(_back(container))


def _back(container: Container) -> Path:
    return container.pod.back_of(container.pod.volumes_share) / container.id


def find_sources(container: Container) -> list[MountSource]:
    """Where the guest finds them, and what they are, while they are up. Raises InvalidSpec."""
    found = []
    for number, mount in enumerate(container.record.spec.mounts):
        if number in container.live:
            found.append(container.live[number])
            continue
        with _source(container, number, mount) as source:
            is_directory = stat.S_ISDIR(os.fstat(source).st_mode)
            huge = find_directory(source, number, mount)
        if huge:
            found.append(MountSource(path=guest_path(huge), is_directory=True))
            continue
        found.append(
            MountSource(
                path=f"{GUEST_VOLUMES}/{container.id}/{number}",
                is_directory=is_directory,
                submounts=_submounts(mount) if is_directory else (),
            )
        )
    return found


def _submounts(mount: MountSpec) -> tuple[str, ...]:
    """Relative paths of what is mounted below the source, where the guest must know (see MountSource)."""
    if not mount.readonly or mount.recursive_readonly or mount.image:
        return ()
    source = Path(os.path.realpath(mount.host_path))
    points = (point for point in mounts.mounts_below(source) if point != source)
    return tuple(dict.fromkeys(str(point.relative_to(source)) for point in points))


# ------------------------------------------------------------------------------------ attaching


def _attach_all(container: Container) -> Sequence[HugeDirectory]:
    back = _back(container)
    back.mkdir(mode=0o755, exist_ok=True)
    with contextlib.ExitStack() as held:
        trees, directories = {}, []
        for number, mount in enumerate(container.record.spec.mounts):
            if number in container.live:
                continue
            source = held.enter_context(_source(container, number, mount))
            if huge := find_directory(source, number, mount):
                directories.append(huge)
                continue
            _make_point(back / str(number), source)
            what = Path(mount.host_path or mount.image)
            tree = mounts.clone_tree(source, what)
            held.callback(os.close, tree)
            _shift(number, tree, what, mount)
            _shape(tree, what, mount)
            trees[number] = tree
        _in_exporter(container, trees)
    return directories


def _make_point(point: Path, source: int) -> None:
    if stat.S_ISDIR(os.fstat(source).st_mode):
        point.mkdir(mode=0o755)
    else:
        point.touch(mode=0o644)


def _shift(number: int, tree: int, what: Path, mount: MountSpec) -> None:
    """The kubelet asks for it where the pod has a user namespace. Raises InvalidSpec."""
    ids = id_map(mount.ids)
    if ids is None:
        return
    try:
        with idmap.user_namespace(ids) as namespace:
            idmap.map_ids(tree, namespace, what)
    except OSError as error:
        problem = f"the file system of {what} cannot map ids: {error.strerror or error}"
        raise InvalidSpec(f"config.mounts[{number}].uidMappings", problem, "an empty list") from error


def _shape(tree: int, what: Path, mount: MountSpec) -> None:
    """A slave of the source's peer group, or out of it: what is mounted in here stays here."""
    private = mount.propagation is Propagation.PRIVATE
    mounts.set_tree_attributes(
        tree,
        what,
        propagation=mount_flags.MS_PRIVATE if private else mount_flags.MS_SLAVE,
        readonly=mount.readonly,
        recursive=mount.recursive_readonly or bool(mount.image),
    )


def _in_exporter(container: Container, trees: dict[int, int]) -> None:
    """Attach them where the share is exported. Raises VmmGone when that has ended."""
    handle = runtime_of(container.pod).handle
    exporter = handle.helpers.get(VOLUMES_TAG) if handle else None
    if exporter is None:  # the VMM itself exports it, as the daemon sees it
        _attach(trees, container.volumes)
        return
    try:
        namespace = os.open(f"/proc/{exporter.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise VmmGone("virtiofsd for volumes has ended") from error
    try:
        if not process.alive(exporter):
            raise VmmGone("virtiofsd for volumes has ended")
        # its root is the share
        mounts.in_namespace(namespace, lambda: _attach(trees, Path("/") / container.id))
    finally:
        os.close(namespace)


def _attach(trees: dict[int, int], directory: Path) -> None:
    for number, tree in trees.items():
        point = os.open(directory / str(number), FIND)
        try:
            mounts.attach_tree(tree, point, directory / str(number))
        finally:
            os.close(point)


@contextlib.contextmanager
def _source(container: Container, number: int, mount: MountSpec) -> Iterator[int]:
    source = open_source(container, number, mount)
    try:
        yield source
    finally:
        os.close(source)
