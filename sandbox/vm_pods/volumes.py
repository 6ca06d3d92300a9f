"""A container's volumes: files of the host, and images, in the share that the guest sees.

They are mounted in the mount namespace of the virtiofsd that exports the share, and nowhere else: a volume
that its owner unmounts must not be busy because a copy of it is mounted in the owner's own namespace, and
nothing of a pod fills the host's mount table. The containers of a pod share what is mounted (see
`exports`).

Volumes on huge pages are not among them: they are the guest's own (see `huge`). For them, and for what the
container may have of huge pages, the VM is made larger here; that is never undone, as with all memory.

Nor are those of live files, which the step before has copied to the guest (see `live_files`).

Crash story: see `exports`. What the guest still has mounted of a container whose creation the daemon's end
cut short is unmounted once the pod is recovered (`release_unused`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from image import idmap
from image.stores import RootfsStore
from sandbox.container import Container
from sandbox.errors import DeadlineExceeded, GuestError, GuestUnreachable, InvalidSpec
from sandbox.guest import guest_pb2 as pb
from sandbox.host import mount_flags, mountinfo, mounts
from sandbox.inventory import Inventory
from sandbox.plan import MountSource
from sandbox.plan.shares import GUEST_VOLUMES
from sandbox.plan.values import HugeDirectory
from sandbox.pod import Pod
from sandbox.records import VolumePart, VolumeUse
from sandbox.spec import MountSpec
from sandbox.steps.pod import remove_tree
from sandbox.steps.rootfs import id_map
from sandbox.steps.volumes import mount_images, open_source, unmount_images
from sandbox.vm_pods.disks import guest_disks
from sandbox.vm_pods.exports import (
    Export,
    Exporter,
    Wanted,
    attach,
    guest_place,
    known_exports,
    names_in_use,
    relax,
    remove_points,
)
from sandbox.vm_pods.hugepages import find_directory, guest_path
from sandbox.vm_pods.link import link_of
from sandbox.vm_pods.resize import Resizer
from sandbox.vm_pods.uncached import MAX_PARTS, is_uncached, open_share, uncached_below

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Volumes:
    """A container's mounts as seen by the guest, and a VM that is large enough for its limits."""

    store: RootfsStore
    resizer: Resizer
    inventory: Inventory
    name = "volumes"

    async def up(self, container: Container) -> None:
        """Export what the container mounts, and grow the VM to the container's limits.

        Raises InvalidSpec with the field, VmmGone, GuestError, GuestUnreachable, ImageNotFound, DiskFull,
        StorageFailed, RootfsUnusable, BeyondNode, VmmError.
        """
        directories = await self._attach(container) if container.record.spec.mounts else []
        pod = container.pod
        async with pod.lock:
            pod.require_ready()
            limits = {container.id: container.record.resources}
            await self.resizer.ensure_capacity(
                pod, pod.record.resources, pod.record.overhead, limits, directories
            )

    async def _attach(self, container: Container) -> Sequence[HugeDirectory]:
        """Return what lies on huge pages, which is attached to nothing."""
        await mount_images(self.store, container)
        async with container.pod.exports_lock:
            others = self._others(container)
            found = await asyncio.to_thread(_attach_all, container, others)
            if found is None:
                able = await open_share(container.pod)
                found = await asyncio.to_thread(_attach_all, container, others, uncached=able)
            assert found is not None
            directories, made = found
            await _mount_in_guest(container.pod, made)
        return directories

    async def down(self, container: Container) -> None:
        """Release the exports that no other container of the pod uses. Idempotent."""
        async with container.pod.exports_lock:
            others = self._others(container)
            if container.record.volumes and not any(other.quarantined for other in others):
                kept = names_in_use(others)
                unused = names_in_use([container]) - kept
                if unused:
                    await _unmount_in_guest(container.pod, kept)
                    await asyncio.to_thread(remove_points, container.pod, sorted(unused))
            # the record is written, or deleted, with the end of the step
            container.record = msgspec.structs.replace(container.record, volumes=())
        await self.resizer.release(container)
        if _old(container).exists():
            await asyncio.to_thread(_remove_old, container)
        await unmount_images(self.store, container)

    def _others(self, container: Container) -> list[Container]:
        return [each for each in self.inventory.containers_of(container.pod) if each.id != container.id]


def _remove_old(container: Container) -> None:
    """Remove the mounts of a container that an older daemon made: each had a separate directory."""
    mounts.unmount_tree(container.volumes)
    remove_tree(_old(container))


def _old(container: Container) -> Path:
    return container.pod.back_of(container.pod.volumes_share) / container.id


def find_sources(container: Container) -> list[MountSource]:
    """Where the guest finds them, and what they are, while they are up. Raises InvalidSpec."""
    uses = {use.mount: use for use in container.record.volumes}
    disks = guest_disks(container)
    host: mountinfo.Trees | None = None  # read once, for all that need it
    found = []
    for number, mount in enumerate(container.record.spec.mounts):
        if number in container.live:
            found.append(container.live[number])
            continue
        if disk := disks.get(mount.host_path):
            found.append(MountSource(path=f"/dev/{disk.name}", is_directory=False))
            continue
        with _source(container, number, mount) as source:
            is_directory = stat.S_ISDIR(os.fstat(source).st_mode)
            huge = find_directory(source, number, mount)
        if huge:
            found.append(MountSource(path=guest_path(huge), is_directory=True))
            continue
        submounts: tuple[str, ...] = ()
        if is_directory and _needs_submounts(mount):
            host = host or mountinfo.Trees(mountinfo.read())
            submounts = tuple(host.beneath(os.path.realpath(mount.host_path)))
        use = uses[number]
        found.append(
            MountSource(
                path=mountinfo.join(guest_place(use), use.path),
                within=guest_place(use),
                is_directory=is_directory,
                submounts=submounts,
                parts=tuple(_parts_below(use)),
            )
        )
    return found


def _parts_below(use: VolumeUse) -> Iterator[str]:
    for part in use.parts:
        path = mountinfo.relative(f"/{part.path}", f"/{use.path}")
        if path and not part.uncached:
            yield path


def _needs_submounts(mount: MountSpec) -> bool:
    """Whether the guest must know what is mounted below the source (see MountSource)."""
    return mount.readonly and not mount.recursive_readonly and not mount.image


# ------------------------------------------------------------------------------------ the guest


async def _mount_in_guest(pod: Pod, made: Iterable[Export]) -> None:
    """Let the agent mount new exports for all containers. A file is not a mount in the guest, and nothing is
    that the guest must not cache."""
    back = pod.back_of(pod.volumes_share)
    exports = [
        pb.Export(
            path=f"{GUEST_VOLUMES}/{export.key}",
            submounts=export.submounts,
            parts=[pb.ExportPart(path=part.path, source=guest_place(part)) for part in export.parts],
        )
        for export in made
        if not export.kind.uncached and (back / export.key).is_dir()
    ]
    if not exports:
        return
    try:
        await link_of(pod).call(pb.Request(mount_exports=pb.MountExports(exports=exports)))
    except GuestError as error:
        # the agent of a pod that an older version of ours started: each container mounts them for itself
        if error.errno != errno.EOPNOTSUPP:
            raise


async def _unmount_in_guest(pod: Pod, kept: Iterable[str]) -> None:
    """Let the agent unmount all exports but these, if it can be reached: with its VM they end anyway."""
    link = link_of(pod)
    if not pod.record.ready or link.client is None:
        return
    keep = pb.KeepExports(share=GUEST_VOLUMES, names=sorted(kept))
    try:
        await link.call(pb.Request(keep_exports=keep), RELEASE_TIMEOUT_S)
    except (GuestError, GuestUnreachable, DeadlineExceeded) as error:
        if not (isinstance(error, GuestError) and error.errno == errno.EOPNOTSUPP):
            log.warning("pod %s: volumes are still mounted in its guest: %s", pod.id, error)


async def release_unused(inventory: Inventory, pod: Pod) -> None:
    """Unmount in the guest what no container of the pod uses, as after a lost connection. Never raises."""
    async with pod.exports_lock:
        containers = list(inventory.containers_of(pod))
        if not any(container.quarantined for container in containers):
            await _unmount_in_guest(pod, names_in_use(containers))


# ------------------------------------------------------------------------------------ attaching


def _attach_all(
    container: Container, others: Sequence[Container], *, uncached: bool | None = None
) -> tuple[Sequence[HugeDirectory], Sequence[Export]] | None:
    """Return what lies on huge pages, and the exports that were made.

    `uncached` says whether there is a share for what must not be cached. With None, nothing is done if one is
    needed, and None is returned.
    """
    pod = container.pod
    back = pod.back_of(pod.volumes_share)
    with contextlib.ExitStack() as held:
        directories, wanted = [], []
        disks, trees = guest_disks(container), mountinfo.Trees(mountinfo.read())
        for number, mount in enumerate(container.record.spec.mounts):
            if number in container.live or mount.host_path in disks:
                continue
            source = held.enter_context(_source(container, number, mount))
            if huge := find_directory(source, number, mount):
                directories.append(huge)
                continue
            what = Path(mount.host_path or mount.image)
            clone = mounts.clone_tree(source, what)
            held.callback(os.close, clone)
            _shift(number, clone, what, mount)
            _shape(clone, what, mount)
            tree, key = trees.find(source), f"{container.id}-{number}"
            if uncached is None and (is_uncached(tree) or (tree and uncached_below(tree))):
                return None
            wanted.append(
                Wanted(number, mount, source, tree, clone, key, bool(uncached) and is_uncached(tree))
            )
        # what may be made, then what was: how many of them are new is known only once they are searched for
        parts = {each.key: _parts_of(each, trees, held) if uncached else {} for each in wanted}
        intended = tuple(
            VolumeUse(
                mount=each.number, export=each.key, uncached=each.uncached, parts=_named(parts[each.key])
            )
            for each in wanted
        )
        container.update(volumes=intended)
        known, uses = known_exports(others), list[VolumeUse]()
        for share in (False, True):
            group = [each for each in wanted if each.uncached is share]
            uses += attach(Exporter(pod, uncached=share), back, group, known)
        for export in known.values():
            if export.made and (below := parts[export.key]):
                export.parts += _named(below)
                # apart from all other exports: they end with the whole
                attach(Exporter(pod, uncached=True), back, below.values(), {})
        if used := _parts_in_use(wanted, parts, uses, known):
            relax(Exporter(pod, uncached=True), used)
        uses = [msgspec.structs.replace(use, parts=known[use.export].parts) for use in uses]
        uses.sort(key=lambda use: use.mount)
        if tuple(uses) != intended:
            container.update(volumes=tuple(uses))
    return directories, [export for export in known.values() if export.made]


def _parts_of(whole: Wanted, trees: mountinfo.Trees, held: contextlib.ExitStack) -> dict[str, Wanted]:
    """Return what the host has mounted beneath a tree that must not be cached, by its path there.

    As in any bind mount, it is read-only with the whole only if the whole is so recursively.
    """
    found: dict[str, Wanted] = {}
    if whole.uncached or whole.tree is None:
        return found
    for path in uncached_below(whole.tree):
        try:
            source = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=whole.source)
        except OSError:  # unmounted by now
            continue
        held.callback(os.close, source)
        tree = trees.find(source)
        if not is_uncached(tree):  # covered by another mount
            continue
        what = Path(mountinfo.join(whole.mount.host_path, path))
        clone = mounts.clone_tree(source, what)
        held.callback(os.close, clone)
        mount = msgspec.structs.replace(whole.mount, readonly=whole.recursive)
        _shape(clone, what, mount)
        key = f"{whole.key}-{len(found)}"
        number = -1 - len(found) - MAX_PARTS * whole.number  # no mount of the specification
        found[path] = Wanted(number, mount, source, tree, clone, key, uncached=True)
    return found


def _parts_in_use(
    wanted: Iterable[Wanted],
    parts: Mapping[str, Mapping[str, Wanted]],
    uses: Iterable[VolumeUse],
    known: Mapping[str, Export],
) -> list[tuple[Wanted, str]]:
    """Return what of the mounts' uncached parts another mount has exported before, with that export's key."""
    use_of = {use.mount: use for use in uses}
    found = []
    for each in wanted:
        use = use_of[each.number]
        exported = {part.path: part.export for part in known[use.export].parts if part.uncached}
        if use.export == each.key:
            continue
        for path, part in parts[each.key].items():
            if key := exported.get(f"{use.path}/{path}".lstrip("/")):
                found.append((part, key))
    return found


def _named(parts: Mapping[str, Wanted]) -> tuple[VolumePart, ...]:
    return tuple(VolumePart(path=path, export=part.key, uncached=True) for path, part in parts.items())


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
    """Out of the source's peer group: the host can unmount what is below it (see `received_mounts`). Set-id
    programs and device nodes are for the guest's kernel, and without effect on the host."""
    mounts.set_tree_attributes(
        tree,
        what,
        propagation=mount_flags.MS_PRIVATE,
        readonly=mount.readonly,
        recursive=mount.recursive_readonly or bool(mount.image),
        inert=True,
    )


@contextlib.contextmanager
def _source(container: Container, number: int, mount: MountSpec) -> Iterator[int]:
    source = open_source(container, number, mount)
    try:
        yield source
    finally:
        os.close(source)
