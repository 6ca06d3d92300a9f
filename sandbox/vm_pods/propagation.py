"""What a container mounts on a volume with bidirectional propagation, shown on the host.

A mount in the guest is another kernel's. But where its source is a file of the container's root or of
its volumes, the host has that very file, and can mount it at the same place of the volume: then the
volume's owner, and whoever has it as a volume too, sees what the container has mounted. Other file
systems that it mounts (tmpfs, FUSE) are in the guest's kernel alone and are left out.

Looked at after each ExecSync of such a container, before that is answered, and every POLL_S. The
container is not trusted: its table of mounts is only read for paths, which are then resolved beneath
the container's own root, and beneath the volume, without links; and set-id programs and devices do
nothing in these mounts.

Crash story: a mount's path is in the container's record before it is made, and afterwards its id, by
which it is known as ours; they go when the container ends.
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
from sandbox.host import mounts, syscalls
from sandbox.host.openat import open_beneath
from sandbox.host.tasks import Tasks
from sandbox.records import Propagated
from sandbox.spec import MountSpec, Propagation, Value

log = logging.getLogger(__name__)

POLL_S = 0.5
MAX_MOUNTS = 64  # of one container
_ESCAPE = re.compile(r"\\([0-7]{3})")


class PropagationRequest(Value, frozen=True, kw_only=True):
    """To be mounted: a path of the container's root (`volume` is None) or of one of its volumes."""

    target_volume: int
    target: str  # relative to that volume
    volume: int | None
    source: str


class PropagationSync:
    """Keeps the host's side of containers with a bidirectional volume like theirs; others cost nothing."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks

    def watch(self, container: Container) -> None:
        """While it runs; then its mounts go. For one that is watched already, nothing."""
        if bidirectional(container) and not container.mirrored:
            container.mirrored = True
            self._tasks.spawn(self._keep_looking(container), f"mounts of container {container.id[:12]}")

    async def _keep_looking(self, container: Container) -> None:
        while container.running:
            await self.look(container)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await container.exited.wait()
        container.mirrored = False
        await self.release(container)

    async def look(self, container: Container) -> None:
        """Show what it has mounted by now. What cannot be asked or shown is told in the log."""
        if not bidirectional(container):
            return
        read = pb.ReadCgroup(paths=[f"/proc/{container.pid}/mountinfo"])
        async with container.mirror:
            try:
                reply = await container.pod.call(pb.Request(read_cgroup=read))
                if container.running and reply.values.values:
                    await synchronize(container, reply.values.values[0].decode(errors="replace"))
            except (SandboxError, OSError) as error:
                log.warning("container %s: its mounts cannot be shown on the host: %s", container.id, error)

    async def release(self, container: Container) -> None:
        """Idempotent; needs the record alone. Raises OSError."""
        async with container.mirror:
            for held in reversed(container.record.propagated):
                await release(container, held)


def bidirectional(container: Container) -> bool:
    return any(mount.propagation is Propagation.BIDIRECTIONAL for mount in container.record.spec.mounts)


# ---------------------------------------------------------------------------------------- the table


class _Line(Value, frozen=True, kw_only=True):
    device: str
    root: str
    point: str


def _lines(table: str) -> Iterator[_Line]:
    """Of /proc/PID/mountinfo (proc(5)); what is malformed is left out."""
    for text in table.splitlines():
        fields = text.split(" ")
        if len(fields) > 5:
            root, point = (_ESCAPE.sub(lambda found: chr(int(found[1], 8)), each) for each in fields[3:5])
            yield _Line(device=fields[2], root=root, point=point)


def find_wishes(table: str, specs: tuple[MountSpec, ...]) -> list[PropagationRequest]:
    """What the container has mounted on its bidirectional volumes, out of its root and volumes."""
    lines = list(_lines(table))
    places = {os.path.normpath(spec.container_path): number for number, spec in enumerate(specs)}
    # file systems that the host has, by device, and where in them the container's part begins: a volume is
    # one of its own, and root filesystems are directories of one
    sources: dict[str, tuple[int | None, str]] = {}
    for line in lines:
        if line.point == "/":
            sources[line.device] = None, line.root.rstrip("/")
        elif line.point in places and line.root == "/" and not specs[places[line.point]].image:
            sources.setdefault(line.device, (places[line.point], ""))
    found: dict[tuple[int, str], PropagationRequest] = {}
    for line in lines:
        number = _volume_above(line.point, places, specs)
        if number is None or line.device not in sources:
            continue
        volume, begin = sources[line.device]
        if not f"{line.root}/".startswith(f"{begin}/"):
            continue
        target = os.path.relpath(line.point, specs[number].container_path)
        found[number, target] = PropagationRequest(
            target_volume=number, target=target, volume=volume, source=line.root[len(begin) :] or "/"
        )
    return list(found.values())[:MAX_MOUNTS]


def _volume_above(point: str, places: Mapping[str, int], specs: tuple[MountSpec, ...]) -> int | None:
    """The bidirectional volume that a mount point lies in: the innermost volume counts."""
    inside = [place for place in places if point.startswith(place.rstrip("/") + "/")]
    if not inside or point in places or point != os.path.normpath(point):
        return None
    number = places[max(inside, key=len)]
    return number if specs[number].propagation is Propagation.BIDIRECTIONAL else None


# ----------------------------------------------------------------------------------------- the host


async def synchronize(container: Container, table: str) -> None:
    """Mount on the host what is new in the container's table, and unmount what is gone."""
    wishes = {_host_path(container, wish): wish for wish in find_wishes(table, container.record.spec.mounts)}
    for held in container.record.propagated:
        if Path(held.path) not in wishes:
            await release(container, held)
    known = {held.path for held in container.record.propagated}
    for path, wish in wishes.items():
        if str(path) not in known:
            await _show(container, path, wish)


async def release(container: Container, held: Propagated) -> None:
    await asyncio.to_thread(_detach, held)
    kept = tuple(each for each in container.record.propagated if each.path != held.path)
    container.update(propagated=kept)


def _detach(held: Propagated) -> None:
    """Only what is known as ours; a daemon that was killed before it knew the id finds what came on top of
    what was there before."""
    top = mounts.top_mounts().get(held.path, 0)
    if top and (top == held.mount_id or (not held.mount_id and top != held.below)):
        mounts.detach(Path(held.path))


async def _show(container: Container, path: Path, wish: PropagationRequest) -> None:
    """What cannot be shown (a source or target that is gone, a link, of another kind) is left out."""
    others = container.record.propagated
    intent = Propagated(path=str(path), below=mounts.top_mounts().get(str(path), 0))
    container.update(propagated=(*others, intent))
    made = await asyncio.to_thread(_attach, container, path, wish)
    if made:
        container.update(propagated=(*others, msgspec.structs.replace(intent, mount_id=made)))
    else:
        container.update(propagated=others)


def _attach(container: Container, path: Path, wish: PropagationRequest) -> int:
    """The id of the mount that was made; 0 where none could be."""
    with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
        source = opened.enter_context(_opened(_root_of(container, wish.volume), wish.source))
        target = opened.enter_context(_opened(_root_of(container, wish.target_volume), wish.target))
        if stat.S_ISDIR(os.fstat(source).st_mode) != stat.S_ISDIR(os.fstat(target).st_mode):
            return 0
        tree = mounts.clone_tree(source, path)
        opened.callback(os.close, tree)
        mounts.set_tree_attributes(tree, path, propagation=syscalls.MS_PRIVATE, inert=True)
        mounts.attach_tree(tree, target, path)
        return mounts.top_mounts().get(str(path), 0)
    return 0


def _root_of(container: Container, volume: int | None) -> Path:
    """Raises OSError for the container's root where the host has no tree of it."""
    if volume is None:
        if not isinstance(container.rootfs, HostTree):
            raise OSError(errno.EOPNOTSUPP, "not a tree of the host", container.rootfs.path)
        return Path(container.rootfs.path)
    return Path(os.path.realpath(container.record.spec.mounts[volume].host_path))


def _host_path(container: Container, wish: PropagationRequest) -> Path:
    return _root_of(container, wish.target_volume) / wish.target


@contextlib.contextmanager
def _opened(root: Path, name: str) -> Iterator[int]:
    descriptor = open_beneath(root, name.lstrip("/") or ".", os.O_PATH | os.O_NOFOLLOW, links=False)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
