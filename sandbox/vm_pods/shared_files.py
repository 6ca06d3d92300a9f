"""Single files that a container may write and the kubelet writes too: its hosts file, the termination log.

Such a file is exported like any other volume, so what the container writes is in the host's file at once.
What the host writes, the guest would see up to a second later, and its inotify not at all. So the daemon
watches the file, and when its content has changed, has the agent read it again (`RefreshFile`).

The host does not know who wrote: a write of a container causes the events of its watchers once more.

Crash story: nothing is saved. After a restart, or a lost connection, each file is read again once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sandbox.container import Container
from sandbox.errors import GuestError, SandboxError
from sandbox.guest import guest_pb2 as pb
from sandbox.host.inotify import Watcher, Watching
from sandbox.host.tasks import Tasks
from sandbox.inventory import Inventory
from sandbox.pod import Pod
from sandbox.vm_pods.exports import guest_place
from sandbox.vm_pods.link import link_of
from sandbox.vm_pods.live_files import fits
from sandbox.vm_pods.received_mounts import ReceivedMounts

log = logging.getLogger(__name__)

PATTERNS = ("*/pods/*/etc-hosts", "*/pods/*/containers/*/*")
SETTLE_S = 0.004  # a writer makes several changes at once
PAUSE_S = 0.04  # between reports, of a file that is written all the time
READ_BYTES = 1 << 20  # of longer files, the rest is not compared
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(eq=False)
class _File:
    container: Container
    source: str
    path: str  # in the guest
    known: bytes = b""  # digest of what the guest has read last
    changes: int = 0
    seen: int = -1  # of these, when it was read last
    task: asyncio.Task[None] | None = None
    gone: bool = False


class SharedFiles:
    """The shared files of all pods in VMs. All methods must be called in the event loop's thread."""

    def __init__(self, tasks: Tasks, inventory: Inventory, patterns: Sequence[str] = ()) -> None:
        self._tasks = tasks
        self._inventory = inventory
        self._patterns = (*PATTERNS, *patterns)
        self._watching = Watching(tasks, "shared files", self._changed)
        self._files: dict[Container, list[_File]] = {}

    async def follow(self, container: Container) -> None:
        """Report changes of the container's shared files from now on. Idempotent; failures are logged."""
        for file in self._files.setdefault(container, list(self._find(container))):
            try:
                await asyncio.to_thread(_watch, self._watching.open(), file)
            except OSError as error:
                log.warning("container %s: %s is not watched: %s", container.id, file.source, error)

    async def recover(self, pod: Pod) -> None:
        """Have the guest read the pod's shared files again, as a change may have been missed."""
        for container in self._inventory.containers_of(pod):
            if container.quarantined:
                continue
            await self.follow(container)
            for file in self._files.get(container, ()):
                file.known = b""
                self._changed(file)

    def release(self, container: Container) -> None:
        """Forget a container's shared files. Idempotent."""
        for file in self._files.pop(container, ()):
            file.gone = True
            self._watching.forget(file)
            if file.task is not None:
                file.task.cancel()

    @property
    def files(self) -> list[_File]:
        """Return the files that are followed."""
        return [file for files in self._files.values() for file in files]

    def _find(self, container: Container) -> Iterator[_File]:
        for use in container.record.volumes:
            mount = container.record.spec.mounts[use.mount]
            path = os.path.normpath(mount.host_path)
            # one that lies in a directory that is exported could be replaced in the guest
            if (
                mount.image
                or mount.readonly
                or use.path
                or not any(fits(path, each) for each in self._patterns)
            ):
                continue
            source = os.path.realpath(path)
            with contextlib.suppress(OSError):
                if stat.S_ISREG(os.lstat(source).st_mode):
                    yield _File(container, source, guest_place(use))

    def _changed(self, file: _File) -> None:
        file.changes += 1
        if not file.gone and (file.task is None or file.task.done()):
            file.task = self._tasks.spawn(self._report(file), f"shared file {file.source}")

    async def _report(self, file: _File) -> None:
        """Have the guest read a changed file, until it has not changed meanwhile."""
        wait_s = SETTLE_S
        while not file.gone and file.seen != file.changes and file.container.pod.record.ready:
            await asyncio.sleep(wait_s)
            wait_s = PAUSE_S
            file.seen = file.changes
            try:
                content = await asyncio.to_thread(_read, file.source)
            except OSError:
                continue  # as with a bind mount: the container keeps the file that was there
            if content == file.known or link_of(file.container.pod).client is None:
                continue
            try:
                await link_of(file.container.pod).call(
                    pb.Request(refresh_file=pb.RefreshFile(path=file.path))
                )
                file.known = content
            except SandboxError as error:
                if not (isinstance(error, GuestError) and error.errno == errno.EOPNOTSUPP):
                    log.warning("container %s: %s is stale: %s", file.container.id, file.source, error)


def _watch(watcher: Watcher[_File], file: _File) -> None:
    """Blocking. Raises OSError."""
    descriptor = os.open(file.source, READ)
    try:
        watcher.add(file, descriptor, file.source)
        file.known = file.known or _digest(descriptor)
    finally:
        os.close(descriptor)


def _read(path: str) -> bytes:
    """Raises OSError."""
    descriptor = os.open(path, READ)
    try:
        return _digest(descriptor)
    finally:
        os.close(descriptor)


def _digest(descriptor: int) -> bytes:
    content = os.pread(descriptor, READ_BYTES, 0)
    return hashlib.sha256(b"%d %b" % (os.fstat(descriptor).st_size, content)).digest()


@dataclass(frozen=True, slots=True)
class HostChanges:
    """The step in which the daemon begins to follow what the host does to a container's volumes."""

    received: ReceivedMounts
    shared: SharedFiles
    name = "host-changes"

    async def up(self, container: Container) -> None:
        """Begin to follow the host. Failures are logged."""
        if container.record.volumes:
            self.received.follow(container)
            await self.shared.follow(container)

    async def down(self, container: Container) -> None:
        """Forget the container. Idempotent."""
        self.received.release(container)
        self.shared.release(container)
