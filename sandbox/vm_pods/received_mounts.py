"""Mounts of the host that appear below a volume with HostToContainer or Bidirectional propagation.

The kernel could propagate them to virtiofsd's mount namespace by itself. But there the guest's cache keeps
them busy: virtiofsd holds a descriptor for each inode that the guest knows, and a mount cannot be unmounted
while a mount that was propagated from it is in use. So an export is private. The daemon watches its own mount
table, repeats what appears below such a volume in virtiofsd's namespace, as a separate mount, and detaches
it there when the host has unmounted it. The host's mount is never busy for what a pod has read.

What is detached lives on while it is in use, as after `umount -l`: by files that a container has open, and by
the guest's cache until the container's names are looked up again (`RefreshNames`), which is done at once.

Crash story: nothing is saved. The mounts end with virtiofsd, and the next daemon compares the tables.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.container import Container
from sandbox.errors import GuestError, SandboxError
from sandbox.guest import guest_pb2 as pb
from sandbox.host import mount_flags, mountinfo, mounts
from sandbox.host.mount_watch import MountWatch
from sandbox.host.mountinfo import Mounted
from sandbox.host.openat import open_beneath
from sandbox.host.tasks import Tasks
from sandbox.inventory import Inventory
from sandbox.pod import Pod
from sandbox.records import VolumeUse
from sandbox.spec import MountSpec, Propagation, Value
from sandbox.vm_pods.exports import Exporter
from sandbox.vm_pods.link import link_of

log = logging.getLogger(__name__)

SETTLE_S = 0.02  # several mounts are made at once
NAMES_S = 1.1  # for longer the guest believes no name that it has cached (virtiofsd, cache=auto)
OPEN = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Difference(Value, frozen=True, kw_only=True):
    """What has to be done for a tree to have the mounts that another one has; paths relative to both."""

    detach: tuple[str, ...]  # with everything beneath
    attach: tuple[Mounted, ...]  # by `point`, the outer ones first


def compare(wanted: Mapping[str, Mounted], actual: Mapping[str, Mounted]) -> Difference:
    """Compare the mounts below two trees, by relative paths. Pure."""
    stale: list[str] = []
    for path in sorted(actual, key=_depth):
        beneath = any(mountinfo.relative(f"/{path}", f"/{above}") is not None for above in stale)
        if not beneath and (path not in wanted or not _same(wanted[path], actual[path])):
            stale.append(path)
    left = {
        path for path in actual if all(mountinfo.relative(f"/{path}", f"/{above}") is None for above in stale)
    }
    return Difference(
        detach=tuple(stale),
        attach=tuple(wanted[path] for path in sorted(wanted, key=_depth) if path not in left),
    )


def _depth(path: str) -> tuple[int, str]:
    return path.count("/"), path


def _same(one: Mounted, other: Mounted) -> bool:
    return (one.device, one.root, one.readonly) == (other.device, other.root, other.readonly)


@dataclass(frozen=True, slots=True)
class Use:
    """A container's mount that receives: the host's path, and its place in the share."""

    container: Container
    mount: MountSpec
    place: str
    uncached: bool = False  # the share

    @property
    def key(self) -> tuple[str, str]:
        return self.container.id, self.place

    @property
    def source(self) -> str:
        return os.path.realpath(self.mount.host_path)


Known = dict[tuple[str, str], frozenset[str]]  # relative paths of mounts, by use


def receives(mount: MountSpec) -> bool:
    """Return whether later mounts of the host appear below this one."""
    return not mount.image and mount.propagation is not Propagation.PRIVATE


@dataclass(slots=True)
class _Followed:
    """A pod's containers whose mounts receive."""

    containers: dict[str, Container] = field(default_factory=dict)  # by id
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    known: Known = field(default_factory=dict)


class ReceivedMounts:
    """Keeps the exports of all pods in step with the host's mounts. Without a volume that receives, nothing
    is watched. All methods must be called in the event loop's thread."""

    def __init__(self, tasks: Tasks, inventory: Inventory) -> None:
        self._tasks = tasks
        self._inventory = inventory
        self._wake: asyncio.Event | None = None  # while the host's mounts are watched
        self._followed: dict[Pod, _Followed] = {}

    def follow(self, container: Container) -> None:
        """Bring the container's exports up to date now and after each change, until it is released.

        Idempotent. To be called when exports were made, or were left by an earlier daemon. Raises OSError.
        """
        if not any(uses(container)):
            return
        pod = container.pod
        if self._wake is None:
            watch, self._wake = MountWatch(), asyncio.Event()
            self._tasks.spawn(self._hold(watch, self._wake), "the host's mounts")
        if pod not in self._followed:
            self._followed[pod] = _Followed()
            self._tasks.spawn(self._follow(pod), f"received mounts of pod {pod.id[:12]}")
        self._followed[pod].containers[container.id] = container
        self._followed[pod].changed.set()

    def release(self, container: Container) -> None:
        """Leave the container's exports as they are from now on. Idempotent."""
        if followed := self._followed.get(container.pod):
            followed.containers.pop(container.id, None)
            followed.changed.set()

    @property
    def followed(self) -> Collection[Pod]:
        """Return the pods whose exports are kept up to date."""
        return self._followed.keys()

    async def recover(self, pod: Pod) -> None:
        """Bring the pod's exports up to date, as changes may have been missed."""
        for container in self._inventory.containers_of(pod):
            if not container.quarantined:
                self.follow(container)

    async def _hold(self, watch: MountWatch, wake: asyncio.Event) -> None:
        """Own the watch until no pod is followed, or the daemon ends."""
        loop = asyncio.get_running_loop()

        def report() -> None:
            watch.clear()
            wake.set()

        loop.add_reader(watch.descriptor, report)
        try:
            await asyncio.sleep(SETTLE_S)
            wake.set()  # a change before the loop waits for the descriptor is not reported
            while self._followed:
                await wake.wait()
                wake.clear()
                for followed in self._followed.values():
                    followed.changed.set()
        finally:
            loop.remove_reader(watch.descriptor)
            watch.close()
            self._wake = None

    async def _follow(self, pod: Pod) -> None:
        followed = self._followed[pod]
        try:
            while followed.containers and pod.record.ready:
                await followed.changed.wait()
                followed.changed.clear()
                async with pod.exports_lock:
                    changed = await self._update(pod, followed)
                for use, paths in changed:
                    await _refresh(use, paths)
                if changed:
                    self._tasks.spawn(_refresh_later(changed), f"received mounts of pod {pod.id[:12]}")
                await asyncio.sleep(SETTLE_S)
        finally:
            del self._followed[pod]
            if not self._followed and self._wake is not None:
                self._wake.set()

    async def _update(self, pod: Pod, followed: _Followed) -> list[tuple[Use, list[str]]]:
        own = {held.path for each in self._inventory.containers_of(pod) for held in each.record.propagated}
        receiving = [use for container in followed.containers.values() for use in uses(container)]
        if not receiving:
            return []
        try:
            return await asyncio.to_thread(_update_all, pod, receiving, own, followed.known)
        except (SandboxError, OSError) as error:
            if pod.record.ready:
                log.error("pod %s: mounts of the host below its volumes are missing: %s", pod.id, error)
            return []


def uses(container: Container) -> Iterator[Use]:
    """Return the container's mounts that receive, while they are exported."""
    for use in container.record.volumes:
        mount = container.record.spec.mounts[use.mount]
        if receives(mount):
            yield Use(container, mount, _place(use), use.uncached)


def _place(use: VolumeUse) -> str:
    return f"{use.export}/{use.path}" if use.path else use.export


# ------------------------------------------------------------------------------------ the host


def _update_all(
    pod: Pod, uses: Sequence[Use], own: Collection[str], known: Known
) -> list[tuple[Use, list[str]]]:
    changed = []
    for uncached in (False, True):
        if found := [use for use in uses if use.uncached is uncached]:
            changed += update(Exporter(pod, uncached=uncached), found, own, known)
    return changed


def update(
    exporter: Exporter, uses: Iterable[Use], own: Collection[str], known: Known
) -> list[tuple[Use, list[str]]]:
    """Repeat the host's mounts in the exports, and return what changed since the last time, by use.

    `own` are mount points that the pod's containers caused: they have these mounts in the guest. `known` is
    what each use had the last time, and is brought up to date: a mount point that the host removes takes its
    mounts with it in all namespaces. Blocking. Raises OSError, VmmGone.
    """
    host = mountinfo.Trees(mountinfo.read())
    changed = []
    with exporter.opened():
        for use in uses:
            actual = exporter.table()
            wanted = _wanted(use, host, actual, own)
            paths = _apply(exporter, use, compare(wanted, _beneath(use.place, actual)))
            paths += [path for path in known.get(use.key, ()) if path not in wanted]
            known[use.key] = frozenset(wanted)
            if paths:
                changed.append((use, list(dict.fromkeys(paths))))
    return changed


def _beneath(place: str, table: Iterable[Mounted]) -> dict[str, Mounted]:
    """The mounts beneath a path by their relative paths; later ones are mounted over earlier ones."""
    found = ((mountinfo.relative(f"/{line.point}", f"/{place}"), line) for line in table)
    return {path: _moved(line, path) for path, line in found if path}


def _moved(line: Mounted, point: str) -> Mounted:
    return Mounted(line.id, line.device, line.root, point, line.readonly, line.kind)


def _wanted(
    use: Use, host: mountinfo.Trees, actual: list[Mounted], own: Collection[str]
) -> dict[str, Mounted]:
    """What the host has below the use's source; nothing if that is no longer the tree that is exported."""
    try:
        descriptor = os.open(use.source, OPEN)
    except OSError:
        return {}
    try:
        tree = host.find(descriptor)
    finally:
        os.close(descriptor)
    if tree is None or tree.path is None or (tree.device, tree.path) != _tree_at(use.place, actual):
        return {}
    return {
        path: _moved(line, path)
        for path, line in tree.submounts.items()
        if mountinfo.join(use.source, path) not in own
    }


def _tree_at(place: str, table: Iterable[Mounted]) -> tuple[str, str] | None:
    """Device and path of what lies at a place of the share."""
    found = None
    for line in table:
        beneath = mountinfo.relative(f"/{place}", f"/{line.point}")
        if beneath is not None and (found is None or len(line.point) >= len(found[0].point)):
            found = line, beneath
    return (found[0].device, mountinfo.join(found[0].root, found[1])) if found else None


def _apply(exporter: Exporter, use: Use, difference: Difference) -> list[str]:
    with contextlib.ExitStack() as held:
        clones = [
            (line.point, clone)
            for line in difference.attach
            if (clone := _clone(use, line, held)) is not None
        ]
        if not clones and not difference.detach:
            return []
        return exporter.run(lambda: _change(exporter.root, use.place, difference.detach, clones))


def _clone(use: Use, line: Mounted, held: contextlib.ExitStack) -> int | None:
    """Copy a mount of the host, unless another one is at its path by now, or covers it.

    The host cannot unmount it while its source is open, so that is closed at once.
    """
    what = Path(mountinfo.join(use.source, line.point))
    try:
        source = os.open(what, OPEN)
    except OSError:
        return None
    try:
        if mountinfo.mount_id(source) != line.id:
            return None
        clone = mounts.clone_tree(source, what, recursive=False)
    except OSError as error:
        if error.errno == errno.ENOENT:  # unmounted meanwhile
            return None
        raise
    finally:
        os.close(source)
    held.callback(os.close, clone)
    mounts.set_tree_attributes(clone, what, propagation=mount_flags.MS_PRIVATE, inert=True)
    return clone


def _change(root: Path, place: str, detach: Iterable[str], clones: Iterable[tuple[str, int]]) -> list[str]:
    """In virtiofsd's namespace. Containers can change the volume's names meanwhile, also into links."""
    key, _, inside = place.partition("/")
    changed = []
    for path in detach:
        with contextlib.suppress(FileNotFoundError):
            mounts.detach(root / place / path)
        changed.append(path)
    for path, clone in clones:
        try:
            target = open_beneath(root / key, mountinfo.join(inside, path).lstrip("/"), OPEN, links=False)
        except OSError as error:
            log.debug("%s is not mounted in %s: %s", path, place, error)
            continue
        try:
            mounts.attach_tree(clone, target, root / place / path)
        finally:
            os.close(target)
        changed.append(path)
    return changed


# ------------------------------------------------------------------------------------ the guest


async def _refresh(use: Use, paths: Iterable[str]) -> None:
    """Have the guest look these names up again: it drops what it has mounted there before."""
    container = use.container
    if not container.running or not container.pod.record.ready or link_of(container.pod).client is None:
        return
    names = [mountinfo.join(use.mount.container_path, path) for path in paths]
    request = pb.Request(refresh_names=pb.RefreshNames(container_id=container.id, paths=names))
    try:
        await link_of(container.pod).call(request)
    except SandboxError as error:
        # without it, the guest looks them up when it needs them next
        level = logging.DEBUG if isinstance(error, GuestError) else logging.WARNING
        log.log(level, "container %s: its guest did not get the names to refresh: %s", container.id, error)


async def _refresh_later(changed: Iterable[tuple[Use, list[str]]]) -> None:
    """Once more when no name is believed any longer, as a long directory is not listed in one piece."""
    await asyncio.sleep(NAMES_S)
    for use, paths in changed:
        await _refresh(use, paths)
