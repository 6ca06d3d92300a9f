"""Sockets of the host: mounts whose source is a Unix socket, as those of CSI drivers, SPIRE or a log daemon.

A program in a guest cannot connect to a socket that is bound in the host's kernel. So such a mount is not
exported: the agent makes a socket of the same kind, mode and owner, which the container binds, and the daemon
carries each connection to the host's socket.

    program ─ connect ─► /run/husk/sockets/NAME ─ AcceptSocket ─► daemon ─ connect, as its user ─► server
                         (agent's, in the guest)    two streams

A guest reaches what its containers mount and nothing else: it names a socket by a name that the daemon has
given, and the path behind it is in the container's record. That path has no links in it, so another container
that can write to its directory cannot make it lead elsewhere. A connection goes to the socket that the path
names at that time: a server may start again and make its socket again, where a bind mount would show the old
one for ever.

Bounds: a guest has POD_CONNECTIONS connections at most, all guests together a part of the daemon's
descriptors; others wait in the guest, in the queue of its kernel. WAITING requests to accept one are under
way for a pod.

Crash story: the record of a container names its sockets before they are made in the guest. Connections end
with the daemon. After a restart, or a connection to the agent that was lost, the agent is sent the sockets
that are left.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from weakref import WeakKeyDictionary

from sandbox import capabilities
from sandbox.container import Container
from sandbox.errors import DeadlineExceeded, GuestError, GuestUnreachable, PlanUnreadable, SandboxError
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.guest.sockets import SocketConnection
from sandbox.host import socket_files
from sandbox.host.inotify import Watching
from sandbox.host.limiter import Limiter
from sandbox.host.socket_files import Identity, SocketKind
from sandbox.host.tasks import Tasks, end
from sandbox.inventory import Inventory
from sandbox.plan import MountSource
from sandbox.pod import Pod
from sandbox.records import SocketUse
from sandbox.spec import MountSpec
from sandbox.vm_pods.link import link_of
from sandbox.vm_pods.socket_identity import find_identity, may_write, shifted
from sandbox.vm_pods.socket_relay import relay

log = logging.getLogger(__name__)

GUEST_SOCKETS = "/run/husk/sockets"
POD_CONNECTIONS = 1024
WAITING = 16
PAUSE_S = 0.016  # after each, so that a guest makes the daemon connect at most 1,000 times a second
CONNECT_TIMEOUT_S = 30.0
RELEASE_TIMEOUT_S = 5.0
POLL_S = 1.0  # while a directory cannot be watched
SETTLE_S = 0.05
BUSY_S = 0.02  # between attempts while a server's queue is full
REFUSALS = 100  # different ones that are logged of a pod
_OVERRIDE = capabilities.mask_of(["DAC_OVERRIDE"])
_KINDS = {
    SocketKind.STREAM: pb.HostSocket.STREAM,
    SocketKind.SEQPACKET: pb.HostSocket.SEQPACKET,
    SocketKind.DATAGRAM: pb.HostSocket.DATAGRAM,
}


@dataclass(eq=False)
class _Socket:
    """A socket that a container mounts."""

    container: Container
    use: SocketUse
    shown: tuple[int, int, int] = (0, 0, 0)  # mode, uid and gid that the guest has
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None  # follows changes

    @property
    def name(self) -> str:
        """Its name in the guest."""
        return name_of(self.container, self.use)

    @property
    def mount(self) -> MountSpec:
        """The mount of the specification."""
        return self.container.record.spec.mounts[self.use.mount]


@dataclass
class _PodSockets:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    sockets: dict[str, _Socket] = field(default_factory=dict)  # by name
    places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(POD_CONNECTIONS))
    client: GuestClient | None = None  # whose connections are being accepted
    accepting: list[asyncio.Task[None]] = field(default_factory=list)
    refusals: set[str] = field(default_factory=set)  # that were logged


def name_of(container: Container, use: SocketUse) -> str:
    """Return the name that a container's socket has in the guest."""
    return f"{container.id}-{use.mount}"


def _all_connections() -> int:
    """Half of what the daemon may have open is for the rest of it."""
    return max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 64)


class HostSockets:
    """The sockets of all pods in VMs. All methods must be called in the event loop's thread."""

    def __init__(self, tasks: Tasks, inventory: Inventory) -> None:
        self._tasks = tasks
        self._inventory = inventory
        self._pods: WeakKeyDictionary[Pod, _PodSockets] = WeakKeyDictionary()
        self._connections = Limiter("socket_connections", _all_connections())
        self._watching = Watching[_Socket](tasks, "sockets of the host", lambda each: each.changed.set())

    def _of(self, pod: Pod) -> _PodSockets:
        return self._pods.setdefault(pod, _PodSockets())

    # --------------------------------------------------------------------------- containers

    async def attach(self, container: Container) -> Mapping[int, MountSource]:
        """Make the sockets that the container mounts in the guest; return where they are there, by index.

        Raises GuestError, GuestUnreachable, DeadlineExceeded, OSError.
        """
        uses = await asyncio.to_thread(_find_uses, container)
        if not uses:
            return {}
        state = self._of(container.pod)
        async with state.lock:
            container.update(sockets=uses)
            found = [_Socket(container, use) for use in uses]
            try:
                await self._show(container.pod, found)
            except GuestError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                # the agent of a pod that an older version of ours started: the file is visible alone
                log.warning("container %s: its sockets of the host are not carried: %s", container.id, error)
                container.update(sockets=())
                return {}
            for each in found:
                state.sockets[each.name] = each
                self._follow(each)
            self._accept(container.pod, state)
        return {
            use.mount: MountSource(path=f"{GUEST_SOCKETS}/{name_of(container, use)}", is_directory=False)
            for use in uses
        }

    async def release(self, container: Container) -> None:
        """Remove the container's sockets, from the guest if it can be reached. Idempotent."""
        if not container.record.sockets:
            return
        pod, state = container.pod, self._of(container.pod)
        async with state.lock:
            for use in container.record.sockets:
                if gone := state.sockets.pop(name_of(container, use), None):
                    self._forget(gone)
            others = [each for each in self._inventory.containers_of(pod) if each.id != container.id]
            if not any(each.quarantined for each in others):
                await self._keep(pod, others)
            if not state.sockets:
                await _stop_accepting(state)
            container.update_anyway(sockets=())

    async def recover(self, pod: Pod) -> None:
        """Make all sockets of a pod again, after a new connection to its agent. Failures are logged."""
        state = self._of(pod)
        containers = [each for each in self._inventory.containers_of(pod) if not each.quarantined]
        if not any(each.record.sockets for each in containers):
            return
        async with state.lock:
            for container in containers:
                for use in container.record.sockets:
                    state.sockets.setdefault(name_of(container, use), _Socket(container, use))
            try:
                await self._show(pod, state.sockets.values())
            except SandboxError as error:
                log.error("pod %s: its sockets of the host are not carried: %s", pod.id, error)
                return
            if len(containers) == len(list(self._inventory.containers_of(pod))):
                await self._keep(pod, containers)
            for each in state.sockets.values():
                self._follow(each)
            self._accept(pod, state)

    async def _show(self, pod: Pod, sockets: Iterable[_Socket]) -> None:
        """Give the guest kind, mode and owner. One that does not exist any more keeps what it has."""
        wanted = []
        for each in sockets:
            shown = await asyncio.to_thread(_attributes, each)
            each.shown = each.shown if shown is None else shown
            mode, uid, gid = each.shown
            kind = _KINDS[SocketKind(each.use.kind)]
            wanted.append(pb.HostSocket(name=each.name, kind=kind, mode=mode, uid=uid, gid=gid))
        await link_of(pod).call(pb.Request(listen_sockets=pb.ListenSockets(sockets=wanted)))

    async def _keep(self, pod: Pod, containers: Iterable[Container]) -> None:
        link = link_of(pod)
        if not pod.record.ready or link.client is None:
            return
        names = [name_of(each, use) for each in containers for use in each.record.sockets]
        try:
            keep = pb.Request(keep_sockets=pb.KeepSockets(names=sorted(names)))
            await link.call(keep, RELEASE_TIMEOUT_S)
        except (GuestError, GuestUnreachable, DeadlineExceeded) as error:
            log.warning("pod %s: unused sockets stay in its guest: %s", pod.id, error)

    # ------------------------------------------------------------------------------ changes

    def _follow(self, each: _Socket) -> None:
        if each.task is None or each.task.done():
            each.task = self._tasks.spawn(self._keep_up(each), f"socket of {each.container.id[:12]}")

    def _forget(self, each: _Socket) -> None:
        if each.task is not None:
            each.task.cancel()
        self._watching.forget(each)

    async def _keep_up(self, each: _Socket) -> None:
        """Give the guest the socket's mode and owner whenever they change: a server may set them late."""
        while True:
            watched = self._watch(each)
            now = await asyncio.to_thread(_attributes, each)
            if now is not None and now != each.shown:
                with contextlib.suppress(SandboxError):  # `recover` goes on
                    await self._show(each.container.pod, [each])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if watched else POLL_S):
                    await each.changed.wait()
            await asyncio.sleep(SETTLE_S)
            each.changed.clear()

    def _watch(self, each: _Socket) -> bool:
        """Watch the directory, which another one may have replaced. Returns whether that can be done."""
        try:
            watcher = self._watching.open()
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            directory = os.open(Path(each.use.path).parent, flags)
            try:
                watcher.keep(each, {watcher.add(each, directory, each.use.path)})
            finally:
                os.close(directory)
        except OSError:
            return False
        return True

    # ------------------------------------------------------------------------------ connections

    def _accept(self, pod: Pod, state: _PodSockets) -> None:
        """Accept what programs of the pod connect to, until the connection to the agent is lost."""
        client = link_of(pod).client
        if client is None or (client is state.client and state.accepting):
            return
        state.client = client
        for task in state.accepting:
            task.cancel()
        name = f"sockets of pod {pod.id[:12]}"
        state.accepting = [
            self._tasks.spawn(self._accept_each(pod, state, client), name) for _ in range(WAITING)
        ]

    async def _accept_each(self, pod: Pod, state: _PodSockets, client: GuestClient) -> None:
        while True:
            await state.places.acquire()
            try:
                connection = await SocketConnection.accept(client)
            except BaseException as error:
                state.places.release()
                if isinstance(error, (GuestUnreachable, GuestError)):
                    log.debug("pod %s: no connections to sockets are accepted: %s", pod.id, error)
                    return
                raise
            work = self._tasks.spawn(self._carry(pod, state, connection), "connection to a socket")
            work.add_done_callback(lambda _: state.places.release())
            await asyncio.sleep(PAUSE_S)

    async def _carry(self, pod: Pod, state: _PodSockets, connection: SocketConnection) -> None:
        peer = connection.peer
        each = state.sockets.get(peer.name)
        problem = ""
        try:
            if each is None:
                problem = f"the guest connects to {peer.name[:100]!r}, which no container mounts"
                return
            async with self._connections.slot():
                identity = _find_identity(each, connection)
                kind = SocketKind(each.use.kind)
                await relay(connection, kind, identity, lambda: _connect(each, identity))
        except GuestUnreachable as error:
            log.debug("pod %s: a connection to a socket broke: %s", pod.id, error)
        except (OSError, PlanUnreadable) as error:
            place = each.use.path if each else ""
            problem = f"a connection of user {peer.uid} to {place} is ended: {error}"
        finally:
            connection.close()
            if problem and problem not in state.refusals and len(state.refusals) < REFUSALS:
                state.refusals.add(problem)
                log.warning("pod %s: %s", pod.id, problem)


async def _stop_accepting(state: _PodSockets) -> None:
    accepting, state.accepting, state.client = state.accepting, [], None
    if accepting:
        await end(*accepting)


# ------------------------------------------------------------------------------------ the host


def _find_uses(container: Container) -> tuple[SocketUse, ...]:
    """Return the container's mounts that are sockets. A missing source is left to other steps. Blocks."""
    found = []
    for number, mount in enumerate(container.record.spec.mounts):
        if mount.image or number in container.live:
            continue
        path = os.path.realpath(mount.host_path)
        try:
            with socket_files.opened(path) as file:
                kind = socket_files.find_kind(file) or SocketKind.STREAM
        except OSError:
            continue
        found.append(SocketUse(mount=number, path=path, kind=kind))
    return tuple(found)


def _attributes(each: _Socket) -> tuple[int, int, int] | None:
    """Return mode, uid and gid as the guest is to see them; None: there is no socket now. Blocks."""
    try:
        with socket_files.opened(each.use.path) as file:
            info = os.fstat(file)
    except OSError:
        return None
    return (stat.S_IMODE(info.st_mode), *shifted(info, each.mount.ids))


def _find_identity(each: _Socket, connection: SocketConnection) -> Identity:
    """Raises PermissionError, PlanUnreadable."""
    identity = find_identity(each.container.plan.process, connection.peer)
    if identity is None:
        raise PermissionError(errno.EPERM, "no process of its container can be that user")
    return identity


async def _connect(each: _Socket, identity: Identity) -> socket.socket:
    """Connect to what the path names now; waits while the server's queue is full. Raises OSError."""
    path, ids, user = each.use.path, each.mount.ids, identity
    if ids is not None:
        identity = replace(identity, capabilities=_OVERRIDE)

    def may(file: int) -> bool:
        if ids is None:
            return True
        return may_write(os.fstat(file), user, ids, listed=socket_files.has_access_list(file))

    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            return await socket_files.connect_as(path, SocketKind(each.use.kind), identity, may)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(BUSY_S)
