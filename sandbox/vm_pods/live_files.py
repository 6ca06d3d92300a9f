"""Live files: read-only mounts of configuration, of which the guest has a copy that follows the host's files.

virtio-fs does not report what the host changes: content may be a second old, and inotify is silent.
So a mount whose source matches a pattern (the kubelet's ConfigMap, Secret, projected and downwardAPI volumes,
its hosts file) is not exported. The agent keeps a copy on a tmpfs, one for each source and pod, which the
pod's containers bind. The daemon watches the source with inotify(7), compares it with what the guest has
whenever an event came, and sends the differences in the order of the writer (`live_tree.diff`). What was read
counts only if no event came meanwhile, so the guest never gets a state that the host did not have.

A mount is exported as any other where the copy is not possible: it is writable, receives mounts, is an image
or too large, holds sockets or other file systems, or the agent is older. A subPath does not match a pattern.
If the host has no inotify watches left, new mounts are exported, and the copies that exist are compared every
POLL_S until there are watches again.

Crash story: nothing is saved but the plans of containers, which name the copies. After a restart, or a
connection to the agent that was lost, the whole tree is sent, of which the agent leaves alone what it
has, and then what is no longer there is removed, as are the copies that no container has. A source whose
path names another inode by then keeps its copy as it is, like a bind mount.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fnmatch
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from sandbox.container import Container
from sandbox.errors import GuestError, PlanUnreadable, SandboxError
from sandbox.guest import guest_pb2 as pb
from sandbox.host.inotify import Watcher, Watching
from sandbox.host.tasks import Tasks
from sandbox.inventory import Inventory
from sandbox.plan import MountSource
from sandbox.pod import Pod
from sandbox.spec import ContainerId, MountSpec, Propagation
from sandbox.vm_pods.link import link_of
from sandbox.vm_pods.live_scan import Limits, Moved, RootGone, Source, Unsuitable, find_source, scan
from sandbox.vm_pods.live_tree import ROOT, Change, Entry, FileKind, Tree, batches, diff

log = logging.getLogger(__name__)

GUEST_LIVE = "/run/husk/live"
PATTERNS = (
    "*/pods/*/volumes/kubernetes.io~configmap/*",
    "*/pods/*/volumes/kubernetes.io~secret/*",
    "*/pods/*/volumes/kubernetes.io~projected/*",
    "*/pods/*/volumes/kubernetes.io~downward-api/*",
    "*/pods/*/etc-hosts",
)
POD_BYTES = 16 << 20  # the agent's tmpfs has three times as much: an update needs its size twice
FILE_BYTES = 2 << 20  # an object of Kubernetes has at most 1 MiB, and a frame to the agent 4 MiB
ENTRIES = 4096
SETTLE_S = 0.004  # a writer makes several changes at once
RETRY_S = 0.05
POLL_S = 1.0
TRIES = 20  # to read a tree while it does not change
_KINDS = {
    FileKind.DIRECTORY: pb.FileChange.DIRECTORY,
    FileKind.FILE: pb.FileChange.FILE,
    FileKind.LINK: pb.FileChange.LINK,
}


@dataclass(eq=False)
class _Copy:
    """A source and what the guest has of it. `known` None: not known, as after a lost connection."""

    pod: Pod
    source: Source
    known: Mapping[str, Entry] | None = None
    size: int = 0
    changes: int = 0  # counts events
    read: int = -1  # of these, when the source was read last
    followed: bool = False  # it has been copied
    problem: str = ""  # that was logged last
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    task: asyncio.Task[None] | None = None
    blind: bool = False  # the host has no watches left
    gone: bool = False  # its path names another inode


@dataclass
class _PodCopies:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    copies: dict[str, _Copy] = field(default_factory=dict)  # by key
    used: dict[ContainerId, frozenset[str]] = field(default_factory=dict)  # keys, of frozen copies too
    leftover: bool = False  # the guest may have copies that no container uses


class LiveFiles:
    """The live files of all pods in VMs. All methods must be called in the event loop's thread."""

    def __init__(self, tasks: Tasks, inventory: Inventory, patterns: Sequence[str] = ()) -> None:
        self._tasks = tasks
        self._inventory = inventory
        self._patterns = (*PATTERNS, *patterns)
        self._watching = Watching(tasks, "live files", self._changed)
        self._pods: WeakKeyDictionary[Pod, _PodCopies] = WeakKeyDictionary()

    # --------------------------------------------------------------------------- containers

    async def attach(self, container: Container) -> Mapping[int, MountSource]:
        """Copy the container's live mounts to the guest; return where they are there, by index.

        Mounts that cannot be copied are missing in the result. Raises GuestUnreachable, DeadlineExceeded.
        """
        found: dict[int, MountSource] = {}
        for number, mount in enumerate(container.record.spec.mounts):
            if not self._matches(mount):
                continue
            try:
                source = await asyncio.to_thread(find_source, mount.host_path, mount.ids)
                await self._acquire(container, source)
            except (Unsuitable, RootGone, Moved, GuestError, OSError) as error:
                log.warning("container %s: %s is exported: %s", container.id, mount.host_path, error)
                continue
            path = f"{GUEST_LIVE}/{source.key}/{ROOT}"
            found[number] = MountSource(path=path, is_directory=source.is_directory)
        return found

    def _matches(self, mount: MountSpec) -> bool:
        if mount.image or not mount.readonly or mount.propagation is not Propagation.PRIVATE:
            return False
        path = os.path.normpath(mount.host_path)
        return any(fits(path, pattern) for pattern in self._patterns)

    async def _acquire(self, container: Container, source: Source) -> None:
        """Raises Unsuitable, RootGone, Moved, GuestError, GuestUnreachable, DeadlineExceeded, OSError."""
        pod = self._of(container.pod)
        async with pod.lock:
            key = source.key
            copy = pod.copies.get(key)
            if copy is not None and not copy.gone:
                await self._sync(copy, 2 * POD_BYTES)
            else:
                copy = _Copy(container.pod, source)
                held = sum(each.size for each in pod.copies.values())
                try:
                    await self._sync(copy, POD_BYTES - held, must_watch=True)
                except BaseException:
                    self._forget(copy)
                    raise
                pod.copies[key] = copy
                copy.followed = True
                if copy.read != copy.changes:
                    self._schedule(copy)
            pod.used[container.id] = pod.used.get(container.id, frozenset()) | {key}

    async def release(self, container: Container) -> None:
        """Remove the copies that no other container has, from the guest if it can be reached. Idempotent."""
        pod = self._of(container.pod)
        async with pod.lock:
            # one that is not known may have been copied before the daemon's end cut its creation short
            may_have = any(self._matches(mount) for mount in container.record.spec.mounts)
            if not pod.used.pop(container.id, None) and not may_have:
                return
            kept = self._drop_unused(pod)
            broken = any(each.quarantined for each in self._inventory.containers_of(container.pod))
            if not container.pod.record.ready or broken:
                return
            if link_of(container.pod).client is None:
                pod.leftover = True
            else:
                await self._keep(container.pod, kept)

    def _drop_unused(self, pod: _PodCopies) -> frozenset[str]:
        kept: frozenset[str] = frozenset().union(*pod.used.values())
        for key in pod.copies.keys() - kept:
            self._forget(pod.copies.pop(key))
        return kept

    async def _keep(self, pod: Pod, kept: frozenset[str]) -> None:
        try:
            await link_of(pod).call(pb.Request(keep_trees=pb.KeepTrees(trees=sorted(kept))))
        except SandboxError as error:
            if not (isinstance(error, GuestError) and error.errno == errno.EOPNOTSUPP):
                log.warning("pod %s: unused live files stay in its guest: %s", pod.id, error)

    def _forget(self, copy: _Copy) -> None:
        copy.gone = True
        self._watching.forget(copy)
        if copy.task is not None:
            copy.task.cancel()

    def _of(self, pod: Pod) -> _PodCopies:
        return self._pods.setdefault(pod, _PodCopies())

    # ----------------------------------------------------------------------------- recovery

    async def recover(self, pod: Pod) -> None:
        """Bring all copies of a pod up to date, after a new connection to its agent was made.

        Failures are logged.
        """
        state = self._of(pod)
        async with state.lock:
            containers = list(self._inventory.containers_of(pod))
            try:
                used = {each.id: _keys_of(each) for each in containers if not each.quarantined}
            except PlanUnreadable as error:
                log.error("pod %s: its live files are not updated: %s", pod.id, error)
                return
            # containers that are being created have no plan yet
            state.used = {id: keys | state.used.get(id, frozenset()) for id, keys in used.items()}
            kept = self._drop_unused(state)
            if not kept and not state.copies and not state.leftover:
                return
            for container in containers:
                if not container.quarantined:
                    await self._find_again(container, state)
            for copy in state.copies.values():
                copy.known, copy.followed = None, True
                self._schedule(copy)
            if not any(each.quarantined for each in containers):
                await self._keep(pod, kept)
                state.leftover = False

    async def _find_again(self, container: Container, state: _PodCopies) -> None:
        for mount in container.record.spec.mounts:
            if not self._matches(mount):
                continue
            with contextlib.suppress(OSError):
                source = await asyncio.to_thread(find_source, mount.host_path, mount.ids)
                if source.key in state.used[container.id] and source.key not in state.copies:
                    state.copies[source.key] = _Copy(container.pod, source)

    # ------------------------------------------------------------------------------ changes

    def _changed(self, copy: _Copy) -> None:
        copy.changes += 1
        self._schedule(copy)

    def _schedule(self, copy: _Copy) -> None:
        """Compare the copy soon. One task at a time does it, until nothing has changed meanwhile."""
        if not copy.followed or copy.gone or (copy.task is not None and not copy.task.done()):
            return
        name = f"live files of pod {copy.pod.id[:12]}"
        copy.task = self._tasks.spawn(self._follow(copy), name)

    async def _follow(self, copy: _Copy) -> None:
        """Bring a copy up to date; while the host has no watches left, again and again."""
        wait_s = SETTLE_S
        while not copy.gone and (copy.read != copy.changes or copy.known is None or copy.blind):
            await asyncio.sleep(wait_s)
            wait_s = POLL_S if copy.blind else SETTLE_S
            try:
                await self._sync(copy, 2 * POD_BYTES)
                copy.problem = ""
            except RootGone:
                log.debug("pod %s: %s is no longer what was mounted", copy.pod.id, copy.source.path)
                self._freeze(copy)
            except Unsuitable as error:
                self._report(copy, error)
                return  # until it changes again
            except (SandboxError, Moved, OSError) as error:
                if not copy.pod.record.ready or link_of(copy.pod).client is None:
                    return  # `recover` goes on
                self._report(copy, error)
                wait_s = POLL_S

    def _report(self, copy: _Copy, problem: Exception) -> None:
        """Log a problem once, as it is met again with each attempt."""
        if copy.problem != str(problem):
            copy.problem = str(problem)
            log.error("pod %s: its copy of %s is stale: %s", copy.pod.id, copy.source.path, problem)

    def _freeze(self, copy: _Copy) -> None:
        copy.gone = True
        self._watching.forget(copy)

    async def _sync(self, copy: _Copy, limit: int, *, must_watch: bool = False) -> None:
        """Read the source and send what differs.

        Raises Unsuitable, RootGone, Moved, OSError, and as a call of the agent. With `must_watch` also where
        the host has no watches left.
        """
        async with copy.lock:
            known = copy.known
            limits = Limits(total_bytes=limit, file_bytes=FILE_BYTES, entries=ENTRIES)
            tree = await self._read(copy, known or {}, limits, must_watch)
            changes = diff(known or {}, tree)
            if changes or known is None:
                copy.known = None  # until all of it has arrived
                for batch in batches(changes):
                    await self._send(copy, pb.ChangeFiles(changes=[_encode(change) for change in batch]))
            if known is None:
                await self._send(copy, pb.ChangeFiles(prune=True, keep=list(tree.entries)))
            copy.known, copy.size = tree.entries, tree.size

    async def _read(self, copy: _Copy, known: Mapping[str, Entry], limits: Limits, must_watch: bool) -> Tree:
        """Read until no event came while the tree was read; after TRIES times any state will do."""
        for number in range(TRIES):
            with contextlib.suppress(Moved):
                tree = await self._read_once(copy, known, limits, must_watch)
                if copy.read == copy.changes:
                    return tree
            await asyncio.sleep(min(SETTLE_S * 2**number, RETRY_S))
        return await self._read_once(copy, known, limits, must_watch)

    async def _read_once(
        self, copy: _Copy, known: Mapping[str, Entry], limits: Limits, must_watch: bool
    ) -> Tree:
        copy.read = copy.changes
        watches: set[int] = set()
        failures: list[OSError] = []
        try:
            watcher: Watcher[_Copy] | None = self._watching.open()
        except OSError as error:
            watcher = None
            failures.append(error)

        def watch(file: int, path: str) -> None:
            if watcher is None:
                return
            try:
                watches.add(watcher.add(copy, file, path))
            except OSError as error:
                failures.append(error)

        tree = await asyncio.to_thread(scan, copy.source, known, limits, watch)
        if failures and must_watch:
            raise failures[0]
        if watcher is not None:
            watcher.keep(copy, watches)
        if failures and not copy.blind:
            problem = "pod %s: %s cannot be watched, so it is compared every second: %s"
            log.error(problem, copy.pod.id, copy.source.path, failures[0])
        copy.blind = bool(failures)
        self._watching.read()
        return tree

    async def _send(self, copy: _Copy, request: pb.ChangeFiles) -> None:
        request.tree = copy.source.key
        await link_of(copy.pod).call(pb.Request(change_files=request))


def fits(path: str, pattern: str) -> bool:
    """Return whether the pattern fits the end of a path, name by name; a leading `*` is any directories."""
    names, parts = path.split("/"), pattern.split("/")
    if parts[0] == "*":
        parts = parts[1:]
        names = names[-len(parts) :]
    return len(names) == len(parts) and all(map(fnmatch.fnmatchcase, names, parts))


def _keys_of(container: Container) -> frozenset[str]:
    """The copies that a container's plan names. Raises PlanUnreadable."""
    if not container.record.spec.mounts or not container.plan_path.exists():
        return frozenset()
    begin = f"{GUEST_LIVE}/"
    sources = (mount.source for mount in container.plan.mounts)
    return frozenset(source.split("/")[4] for source in sources if source.startswith(begin))


def _encode(change: Change) -> pb.FileChange:
    entry = change.entry
    if entry is None:
        return pb.FileChange(kind=pb.FileChange.REMOVE, path=change.path)
    return pb.FileChange(
        kind=_KINDS[entry.kind],
        path=change.path,
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        content=change.content,
        target=entry.target,
        replace=change.replace,
        mtime_ns=max(0, entry.mtime_ns),
    )
