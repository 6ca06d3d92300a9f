"""Bidirectional mount propagation: repeating on the host what a container mounts on its volumes.

A mount in the guest belongs to another kernel. But where its source is a file of the container's root or of
its volumes, the host has the same file and can mount it at the same path of the volume: then the owner of
the volume, and every other pod that mounts it, sees what the container has mounted. Other filesystems that
a container mounts (tmpfs, FUSE) exist only in the guest's kernel and are ignored.

The container's mount table is read after each ExecSync, before the call returns, and every POLL_S. The
container is not trusted: only paths are taken from the table, and resolved beneath the container's root and
beneath the volume, without following links; the mounts on the host are nosuid and nodev.

Crash story: the path of a mount is saved in the container's record before it is made, and its id afterwards,
which identifies it as ours. The mounts are removed when the container ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from image.rootfs import HostTree
from sandbox.container import Container
from sandbox.errors import SandboxError
from sandbox.guest import guest_pb2 as pb
from sandbox.host import mount_flags, mounts
from sandbox.host.openat import open_beneath
from sandbox.host.tasks import Tasks
from sandbox.records import Propagated
from sandbox.spec import MountSpec, Propagation, Value
from sandbox.vm_pods.link import link_of

log = logging.getLogger(__name__)

POLL_S = 0.5
MAX_MOUNTS = 64  # of one container
_ESCAPE = re.compile(r"\\([0-7]{3})")


class PropagationRequest(Value, frozen=True, kw_only=True):
    """A mount to make: its source is in the container's root (`volume` is None) or in one of its volumes."""

    target_volume: int  # index of the mount in the container's spec
    target: str  # relative to that volume
    volume: int | None
    source: str  # relative to the root or the volume


class PropagationSync:
    """Keeps the mounts on the host in step with those of containers that have a bidirectional volume.

    Other containers cost nothing: they are not polled.
    """

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks

    def watch(self, container: Container) -> None:
        """Poll the container while it runs, then remove its mounts from the host. Idempotent."""
        if is_bidirectional(container) and not container.propagating:
            container.propagating = True
            self._tasks.spawn(self._poll(container), f"mounts of container {container.id[:12]}")

    async def _poll(self, container: Container) -> None:
        while container.running:
            await self.sync(container)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await container.exited.wait()
        container.propagating = False
        await self.release(container)

    async def sync(self, container: Container) -> None:
        """Make and remove mounts on the host as the container's mount table requires. Errors are logged."""
        if not is_bidirectional(container):
            return
        read = pb.ReadCgroup(paths=[f"/proc/{container.pid}/mountinfo"])
        async with container.propagation_lock:
            try:
                reply = await link_of(container.pod).call(pb.Request(read_cgroup=read))
                if container.running and reply.values.values:
                    await apply_table(container, reply.values.values[0].decode(errors="replace"))
            except (SandboxError, OSError) as error:
                log.warning(
                    "container %s: could not propagate its mounts to the host: %s", container.id, error
                )

    async def release(self, container: Container) -> None:
        """Remove the container's mounts from the host, by its record alone. Idempotent. Raises OSError."""
        async with container.propagation_lock:
            for held in reversed(container.record.propagated):
                await release(container, held)


def is_bidirectional(container: Container) -> bool:
    """Return whether the container has a volume with bidirectional propagation."""
    return any(mount.propagation is Propagation.BIDIRECTIONAL for mount in container.record.spec.mounts)


# ---------------------------------------------------------------------------------------- the table


class _Line(Value, frozen=True, kw_only=True):
    device: str
    root: str
    point: str


def _lines(table: str) -> Iterator[_Line]:
    """Parse /proc/PID/mountinfo (proc(5)). Malformed lines are ignored."""
    for text in table.splitlines():
        fields = text.split(" ")
        if len(fields) > 5:
            root, point = (_ESCAPE.sub(lambda found: chr(int(found[1], 8)), each) for each in fields[3:5])
            yield _Line(device=fields[2], root=root, point=point)


def find_requests(table: str, specs: tuple[MountSpec, ...]) -> list[PropagationRequest]:
    """Return the mounts in a container's table that the host can repeat, at most MAX_MOUNTS.

    Those are on its bidirectional volumes, and their source is in its root or in a volume. `specs` are the
    mounts of the container's spec.
    """
    lines = list(_lines(table))
    places = {os.path.normpath(spec.container_path): number for number, spec in enumerate(specs)}
    # filesystems that the host has too, by device, and the directories in them that the container has: root
    # filesystems are directories of a common one, and a volume is all or a part of what the pod shares
    sources: dict[str, list[tuple[int | None, str]]] = {}
    for line in lines:
        if line.point == "/":
            sources.setdefault(line.device, []).append((None, line.root.rstrip("/")))
        elif line.point in places and not specs[places[line.point]].image:
            sources.setdefault(line.device, []).append((places[line.point], line.root.rstrip("/")))
    found: dict[tuple[int, str], PropagationRequest] = {}
    for line in lines:
        number = _volume_above(line.point, places, specs)
        above = [
            (volume, begin)
            for volume, begin in sources.get(line.device, ())
            if f"{line.root}/".startswith(f"{begin}/")
        ]
        if number is None or not above:
            continue
        volume, begin = max(above, key=lambda each: len(each[1]))
        target = os.path.relpath(line.point, specs[number].container_path)
        found[number, target] = PropagationRequest(
            target_volume=number, target=target, volume=volume, source=line.root[len(begin) :] or "/"
        )
    return list(found.values())[:MAX_MOUNTS]


def _volume_above(point: str, places: Mapping[str, int], specs: tuple[MountSpec, ...]) -> int | None:
    """The innermost volume that contains a mount point, if it is bidirectional."""
    inside = [place for place in places if point.startswith(place.rstrip("/") + "/")]
    if not inside or point in places or point != os.path.normpath(point):
        return None
    number = places[max(inside, key=len)]
    return number if specs[number].propagation is Propagation.BIDIRECTIONAL else None


# ----------------------------------------------------------------------------------------- the host


async def apply_table(container: Container, table: str) -> None:
    """Mount on the host what is new in the container's mount table, and unmount what is no longer in it.

    Raises OSError when a mount cannot be removed.
    """
    found = find_requests(table, container.record.spec.mounts)
    requests = {
        _host_path(container, request): request for request in found if not _is_part(container, request)
    }
    for held in container.record.propagated:
        if Path(held.path) not in requests:
            await release(container, held)
    known = {held.path for held in container.record.propagated}
    for path, request in requests.items():
        if str(path) not in known:
            await _mount(container, path, request)


async def release(container: Container, held: Propagated) -> None:
    """Unmount one mount and remove it from the record. Idempotent. Raises OSError."""
    await asyncio.to_thread(_detach, held)
    kept = tuple(each for each in container.record.propagated if each.path != held.path)
    container.update(propagated=kept)


def _detach(held: Propagated) -> None:
    """Unmount only what is ours: the mount with the saved id, or, if the daemon was killed before it saved
    the id, a mount on top of the one that was there before."""
    top = mounts.top_mounts().get(held.path, 0)
    if top and (top == held.mount_id or (not held.mount_id and top != held.below)):
        mounts.detach(Path(held.path))


async def _mount(container: Container, path: Path, request: PropagationRequest) -> None:
    """Save the intent, mount, and save the id. Ignores what cannot be mounted: a source or target that does
    not exist or is a link, a file on a directory. That costs no write, as it is retried at every poll."""
    with contextlib.ExitStack() as opened:
        try:
            source, target = await asyncio.to_thread(_open_both, container, request, opened)
        except OSError:
            return
        others = container.record.propagated
        intent = Propagated(path=str(path), below=mounts.top_mounts().get(str(path), 0))
        container.update(propagated=(*others, intent))
        made = await asyncio.to_thread(_attach, source, target, path)
    if made:
        container.update(propagated=(*others, msgspec.structs.replace(intent, mount_id=made)))
    else:
        container.update(propagated=others)


def _open_both(
    container: Container, request: PropagationRequest, opened: contextlib.ExitStack
) -> tuple[int, int]:
    """Open source and target, which `opened` closes. Raises OSError for those that do not fit together."""
    source = opened.enter_context(_opened(_root_of(container, request.volume), request.source))
    target = opened.enter_context(_opened(_root_of(container, request.target_volume), request.target))
    if stat.S_ISDIR(os.fstat(source).st_mode) != stat.S_ISDIR(os.fstat(target).st_mode):
        raise OSError(errno.ENOTDIR, "one is a directory and the other is not", request.target)
    return source, target


def _attach(source: int, target: int, path: Path) -> int:
    """Return the id of the mount that was made; 0: it could not be made."""
    with contextlib.suppress(OSError):
        tree = mounts.clone_tree(source, path)
        try:
            mounts.set_tree_attributes(tree, path, propagation=mount_flags.MS_PRIVATE, inert=True)
            mounts.attach_tree(tree, target, path)
        finally:
            os.close(tree)
        return mounts.top_mounts().get(str(path), 0)
    return 0


def _root_of(container: Container, volume: int | None) -> Path:
    """Raises OSError for the container's root where the host has no tree of it."""
    if volume is None:
        if not isinstance(container.rootfs, HostTree):
            raise OSError(errno.EOPNOTSUPP, "not a tree of the host", container.rootfs.path)
        return Path(container.rootfs.path)
    return Path(os.path.realpath(container.record.spec.mounts[volume].host_path))


def _is_part(container: Container, request: PropagationRequest) -> bool:
    """Return whether it is not a mount of the container's, but a part of a volume that the guest has mounted
    over its place (see `exports`)."""
    if request.volume is None:
        return False
    source = _root_of(container, request.volume) / request.source.lstrip("/")
    return source == _host_path(container, request)


def _host_path(container: Container, request: PropagationRequest) -> Path:
    return _root_of(container, request.target_volume) / request.target


@contextlib.contextmanager
def _opened(root: Path, name: str) -> Iterator[int]:
    descriptor = open_beneath(root, name.lstrip("/") or ".", os.O_PATH | os.O_NOFOLLOW, links=False)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
