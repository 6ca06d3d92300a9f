"""Sockets of the host over a real agent: what is carried and refused; restarts, and a hostile guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

from sandbox.container import Container
from sandbox.errors import GuestError
from sandbox.guest import guest_pb2 as pb
from sandbox.host import socket_files, syscalls, threads
from sandbox.host.ids import IdRange
from sandbox.host.tasks import Tasks
from sandbox.inventory import Inventory
from sandbox.plan.values import ContainerPlan, ProcessPlan
from sandbox.pod import Pod
from sandbox.records import ContainerRecord, PodRecord, PodState, VmRuntime
from sandbox.spec import ContainerId, ContainerSpec, ImageDefaults, MountSpec, PodId, PodSpec, UserNamespace
from sandbox.vm_pods import host_sockets
from sandbox.vm_pods.guest_mounts import GuestMounts
from sandbox.vm_pods.host_sockets import HostSockets
from sandbox.vm_pods.link import link_of
from tests.fakes.inventory import make_inventory
from tests.kit.agent import Agent, Guest
from tests.kit.eventually import eventually
from tests.kit.unix_server import UnixServer

T = TypeVar("T")
ROOT = ProcessPlan(cap_bounding=(1 << 41) - 1)
USER = ProcessPlan(uid=1000, gid=1000, groups=(2000,), no_new_privs=True)


@dataclass
class Site:
    root: Path
    agent: Agent
    guest: Guest
    inventory: Inventory
    pod: Pod
    tasks: Tasks = field(default_factory=Tasks)
    clients: list[socket.socket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sockets = HostSockets(self.tasks, self.inventory)

    @property
    def directory(self) -> Path:
        return Path(f"/proc/{self.agent.pid}/root/run/husk/sockets")

    @property
    def names(self) -> list[str]:
        """The sockets that the guest has."""
        return sorted(each.name for each in self.directory.iterdir()) if self.directory.exists() else []

    async def create(
        self, name: str, *paths: Path, process: ProcessPlan = ROOT, ids: UserNamespace | None = None
    ) -> Container:
        mounts = tuple(MountSpec(container_path="/x", host_path=str(path), ids=ids) for path in paths)
        record = ContainerRecord(
            id=ContainerId(name),
            pod_id=self.pod.id,
            spec=ContainerSpec(name=name, image="i", mounts=mounts),
            created_at_ns=1,
            image_id="i",
            image_ref="i",
            defaults=ImageDefaults(),
        )
        container = self.inventory.make_container(record, self.pod)
        self.inventory.add_container(container)
        await GuestMounts((self.sockets,)).up(container)
        container.save_plan(ContainerPlan(id=name, rootfs="/", process=process))
        return container

    def connect(self, name: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, kind)
        client.settimeout(10)
        client.connect(str(self.directory / name))
        self.clients.append(client)
        return client

    async def connect_as(self, name: str, uid: int, gid: int, groups: tuple[int, ...] = ()) -> socket.socket:
        """As a process in the guest."""
        file = os.open(self.directory / name, os.O_PATH)

        def work() -> socket.socket:
            syscalls.set_thread_credentials(uid, gid, groups, 2)  # CAP_DAC_OVERRIDE
            return socket_files._connect(file, socket_files.SocketKind.STREAM)

        client = await threads.run(work, "client")
        os.close(file)
        client.settimeout(10)
        self.clients.append(client)
        return client

    async def restart(self) -> None:
        """Replace the daemon's part: its tasks end, nothing else."""
        await self.tasks.close()
        await self.guest.client.close()
        self.tasks = Tasks()
        self.sockets = HostSockets(self.tasks, self.inventory)
        await self.reconnect()

    async def reconnect(self) -> None:
        await self.guest.connect()
        link_of(self.pod).client = self.guest.client
        link_of(self.pod).connected.set()
        await self.sockets.recover(self.pod)


@pytest.fixture
async def site(agent: Agent, tmp_path: Path) -> AsyncIterator[Site]:
    guest = Guest(agent)
    await guest.connect()
    inventory = make_inventory(tmp_path / "state")
    record = PodRecord(
        id=PodId("p"),
        spec=PodSpec(name="p", namespace="n", uid="u"),
        created_at_ns=1,
        state=PodState.READY,
        runtime=VmRuntime(),
    )
    pod = inventory.make_pod(record)
    link_of(pod).client = guest.client
    link_of(pod).connected.set()
    site = Site(tmp_path, agent, guest, inventory, pod)
    yield site
    for client in site.clients:
        client.close()
    await site.tasks.close()
    if guest.client.lost:
        await guest.connect()
    await guest.call(keep_sockets=pb.KeepSockets())
    await guest.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[UnixServer]:
    server = UnixServer(tmp_path / "server.sock")
    yield server
    server.stop()


async def in_thread(work: Callable[[], T]) -> T:
    return await asyncio.wait_for(asyncio.to_thread(work), 30)


async def pair(site: Site, server: UnixServer, name: str = "c-0") -> tuple[socket.socket, socket.socket]:
    """Return a client in the guest and what its server has."""
    client = site.connect(name, server.kind)
    return client, await in_thread(server.accept)


async def ends(client: socket.socket) -> None:
    """Wait until the other end is closed."""
    with contextlib.suppress(ConnectionResetError):
        assert await in_thread(lambda: client.recv(1)) == b""


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
async def test_connection_is_carried_with_half_close_in_both_directions(site: Site, kind: int) -> None:
    server = UnixServer(site.root / "s.sock", kind)
    container = await site.create("c", server.path)
    assert container.live[0].path == "/run/husk/sockets/c-0"
    if kind == socket.SOCK_SEQPACKET:
        (await in_thread(server.accept)).close()  # of `find_kind`
    client, peer = await pair(site, server)
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    assert await in_thread(lambda: peer.recv(100)) == b"question"
    assert await in_thread(lambda: peer.recv(100)) == b""
    peer.sendall(b"answer")
    assert await in_thread(lambda: client.recv(100)) == b"answer"
    peer.close()
    await ends(client)
    client, peer = await pair(site, server)
    peer.shutdown(socket.SHUT_WR)
    assert await in_thread(lambda: client.recv(100)) == b""
    client.sendall(b"still there")
    assert await in_thread(lambda: peer.recv(100)) == b"still there"
    client.close()
    await ends(peer)
    server.stop()


async def test_server_that_closes_wholly_ends_the_clients_writes(site: Site, server: UnixServer) -> None:
    await site.create("c", server.path)
    client, peer = await pair(site, server)
    peer.sendall(b"last words")
    peer.close()
    assert await in_thread(lambda: client.recv(100)) == b"last words"
    await ends(client)

    def write_on() -> None:
        while True:
            client.sendall(bytes(1 << 16))

    with pytest.raises(BrokenPipeError):
        await in_thread(write_on)


async def test_client_that_closes_wholly_is_seen_by_a_server_that_only_writes(
    site: Site, server: UnixServer
) -> None:
    await site.create("c", server.path)
    client, peer = await pair(site, server)
    client.close()

    def write_on() -> None:
        while True:
            peer.sendall(bytes(1 << 16))

    with pytest.raises(OSError, match=r"pipe|reset"):
        await in_thread(write_on)


async def test_megabytes_are_carried_in_both_directions_at_once(site: Site, server: UnixServer) -> None:
    await site.create("c", server.path)
    client, peer = await pair(site, server)
    data = os.urandom(8 << 20)

    def read_all(end: socket.socket) -> bytes:
        seen = bytearray()
        while chunk := end.recv(1 << 16):
            seen += chunk
        return bytes(seen)

    def write(end: socket.socket) -> None:
        end.sendall(data)
        end.shutdown(socket.SHUT_WR)

    for end in (client, peer):
        threading.Thread(target=write, args=(end,), daemon=True).start()
    seen = await asyncio.gather(in_thread(lambda: read_all(client)), in_thread(lambda: read_all(peer)))
    assert [each == data for each in seen] == [True, True]


async def test_reader_that_stopped_blocks_only_its_connection(site: Site, server: UnixServer) -> None:
    await site.create("c", server.path)
    stuck, stuck_peer = await pair(site, server)
    other, peer = await pair(site, server)

    async def flood(end: socket.socket) -> int:
        end.settimeout(0.5)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 64 << 20:
                sent += await in_thread(lambda: end.send(bytes(1 << 16)))
        return sent

    assert await flood(stuck) < 4 << 20, "what is buffered is bounded"
    assert await flood(stuck_peer) < 4 << 20
    other.sendall(b"quick")
    assert await in_thread(lambda: peer.recv(5)) == b"quick"
    peer.sendall(b"answer")
    assert await in_thread(lambda: other.recv(6)) == b"answer"


async def test_five_hundred_connections_are_carried_at_once(site: Site, server: UnixServer) -> None:
    await site.create("c", server.path)

    def serve() -> None:
        for _ in range(500):
            server.accept()
        for peer in server.open:
            peer.sendall(peer.recv(10))

    serving = asyncio.ensure_future(in_thread(serve))
    clients = await in_thread(lambda: [site.connect("c-0") for _ in range(500)])
    for number, client in enumerate(clients):
        client.sendall(b"%3d" % number)
    await serving
    answers = await in_thread(lambda: [client.recv(3, socket.MSG_WAITALL) for client in clients])
    assert answers == [b"%3d" % number for number in range(500)]


async def test_connections_beyond_the_bound_wait(
    site: Site, server: UnixServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_sockets, "POD_CONNECTIONS", 3)
    await site.create("c", server.path)
    clients = [site.connect("c-0") for _ in range(5)]
    for _ in range(3):
        await in_thread(server.accept)
    server.listener.settimeout(0.3)
    with pytest.raises(TimeoutError):
        await in_thread(server.listener.accept)
    for client in clients:
        client.close()
    for peer in server.open[:]:
        peer.close()
        await in_thread(server.accept)
        if len(server.seen) == 5:
            break


async def test_server_sees_the_user_that_connected(site: Site, server: UnixServer) -> None:
    server.path.chmod(0o660)
    os.chown(server.path, 0, 77)
    await site.create("c", server.path)
    await site.connect_as("c-0", 44, 55, (66, 77))
    await in_thread(server.accept)
    site.connect("c-0")
    await in_thread(server.accept)
    assert server.seen[0] == (44, 55, {66, 77})
    assert server.seen[1][:2] == (0, 0)


async def test_messages_carry_the_user_that_connected(site: Site, server: UnixServer) -> None:
    """A server may ask for the sender of each message; the kernel would name the daemon's user."""
    await site.create("c", server.path)
    client = await site.connect_as("c-0", 44, 55)
    peer = await in_thread(server.accept)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    client.sendall(b"who am I")
    _, [(_, kind, data)], _, _ = await in_thread(lambda: peer.recvmsg(10, 64))
    assert kind == socket.SCM_CREDENTIALS
    assert [int.from_bytes(data[at : at + 4], "little") for at in (4, 8)] == [44, 55]


async def test_host_refuses_what_the_files_mode_forbids_though_the_guest_allowed_it(
    site: Site, server: UnixServer
) -> None:
    """The guest's check is for its own processes; one that broke out into it must gain nothing by that."""
    server.path.chmod(0o600)
    await site.create("c", server.path)
    await ends(await site.connect_as("c-0", 1000, 1000))
    assert server.seen == []


@pytest.mark.parametrize("user", [(0, 0, ()), (1000, 0, ()), (1000, 1000, (0,)), (1001, 1000, ())])
async def test_guest_cannot_be_another_user_than_its_container(
    site: Site, server: UnixServer, user: tuple[int, int, tuple[int, ...]]
) -> None:
    await site.create("c", server.path, process=USER)
    await ends(await site.connect_as("c-0", *user))
    await site.connect_as("c-0", 1000, 2000, (1000,))
    await in_thread(server.accept)
    assert server.seen == [(1000, 2000, {1000})]


async def test_root_without_dac_override_is_refused_by_another_users_socket(
    site: Site, server: UnixServer
) -> None:
    server.path.chmod(0o600)
    os.chown(server.path, 1000, 1000)
    await site.create("c", server.path, process=ProcessPlan())
    await ends(site.connect("c-0"))
    await site.create("d", server.path)
    site.connect("d-0")
    await in_thread(server.accept)
    assert [each[0] for each in server.seen] == [0]


# u::rw- u:1:--- g::rw- m::rw- o::rw- (linux/posix_acl_xattr.h)
ACL = bytes.fromhex(
    "02000000 01000600ffffffff 0200000001000000 04000600ffffffff 10000600ffffffff 20000600ffffffff"
)


async def test_mount_that_shifts_owners_is_checked_by_the_shifted_owner(
    site: Site, server: UnixServer
) -> None:
    ranges = (IdRange(inside=0, outside=100_000, length=65_536),)
    process = ProcessPlan(uid_ranges=ranges, gid_ranges=ranges, cap_bounding=(1 << 41) - 1)
    server.path.chmod(0o600)
    await site.create("c", server.path, process=process, ids=UserNamespace(uids=ranges, gids=ranges))
    info = (site.directory / "c-0").stat()
    assert (info.st_uid, info.st_gid) == (100_000, 100_000)
    await ends(await site.connect_as("c-0", 100_001, 100_001))
    await ends(await site.connect_as("c-0", 0, 0))
    os.setxattr(server.path, "system.posix_acl_access", ACL)  # an entry may deny what the mode allows
    await ends(await site.connect_as("c-0", 100_001, 100_001))
    await site.connect_as("c-0", 100_000, 100_000)
    await in_thread(server.accept)
    assert [each[:2] for each in server.seen] == [(100_000, 100_000)]


async def test_socket_is_checked_that_is_connected_to(tmp_path: Path) -> None:
    """Its path may name another one by then: of a server that starts, or by who may write the directory."""
    good, other = UnixServer(tmp_path / "s.sock"), UnixServer(tmp_path / "other.sock")
    user = socket_files.Identity(uid=0, gid=0, groups=(), capabilities=0)

    def replace_after(file: int) -> bool:
        other.path.rename(good.path)
        return os.fstat(file).st_mode & 0o777 == 0o600

    try:
        good.path.chmod(0o600)
        client = await socket_files.connect_as(
            str(good.path), socket_files.SocketKind.STREAM, user, replace_after
        )
        await in_thread(good.accept)
        client.close()
        with pytest.raises(PermissionError):
            await socket_files.connect_as(
                str(good.path), socket_files.SocketKind.STREAM, user, lambda file: False
            )
        assert (len(good.seen), len(other.seen)) == (1, 0)
    finally:
        good.stop()
        other.stop()


async def test_connection_to_a_server_that_started_again_reaches_the_new_one(
    site: Site, server: UnixServer
) -> None:
    await site.create("c", server.path)
    client, _ = await pair(site, server)
    server.stop()
    await ends(client)
    await ends(site.connect("c-0"))
    server.mode = 0o640
    server.start()
    client, peer = await pair(site, server)
    client.sendall(b"again")
    assert await in_thread(lambda: peer.recv(5)) == b"again"
    await eventually(lambda: stat.S_IMODE((site.directory / "c-0").stat().st_mode), until=0o640.__eq__)


async def test_mode_and_owner_follow_the_file_also_in_a_new_directory(site: Site) -> None:
    server = UnixServer(site.root / "s.sock")
    directory = site.root / "d"
    directory.mkdir()
    server.path = directory / "s.sock"
    server.stop()
    server.start()
    await site.create("c", server.path)

    def shown() -> tuple[int, int, int]:
        info = (site.directory / "c-0").stat()
        return stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid

    assert shown() == (0o666, 0, 0)
    server.path.chmod(0o600)
    os.chown(server.path, 3, 4)
    await eventually(shown, until=(0o600, 3, 4).__eq__)
    server.stop()
    server.path.unlink()
    directory.rmdir()
    directory.mkdir()
    server.mode = 0o620
    server.start()
    await eventually(shown, until=(0o620, 0, 0).__eq__)
    server.stop()


async def test_server_that_starts_after_the_container_is_reached(site: Site) -> None:
    server = UnixServer(site.root / "late.sock")
    server.stop()
    await site.create("c", server.path)
    await ends(site.connect("c-0"))
    server.start()
    await pair(site, server)
    server.stop()


async def test_server_of_another_kind_than_at_creation_is_not_connected(
    site: Site, server: UnixServer, caplog: pytest.LogCaptureFixture
) -> None:
    await site.create("c", server.path)
    server.stop()
    server.kind = socket.SOCK_SEQPACKET
    server.start()
    await ends(site.connect("c-0"))
    assert "wrong type" in caplog.text


async def test_guest_that_connects_in_a_loop_is_slowed_down(
    site: Site, server: UnixServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_sockets, "WAITING", 2)
    monkeypatch.setattr(host_sockets, "PAUSE_S", 0.1)
    await site.create("c", server.path)
    begin = asyncio.get_running_loop().time()
    for _ in range(8):
        await pair(site, server)
    assert asyncio.get_running_loop().time() - begin > 0.25


async def test_path_that_became_a_link_or_a_file_is_not_followed(
    site: Site, server: UnixServer, tmp_path: Path
) -> None:
    secret = UnixServer(tmp_path / "secret.sock")
    await site.create("c", server.path)
    server.path.unlink()
    server.path.symlink_to(secret.path)
    await ends(site.connect("c-0"))
    server.path.unlink()
    (tmp_path / "real").mkdir()
    server.path.write_text("")
    await ends(site.connect("c-0"))
    assert secret.seen == []
    secret.stop()


async def test_name_that_was_not_given_leads_nowhere(
    site: Site, server: UnixServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A hostile guest may name anything."""
    await site.create("c", server.path)
    wanted = [pb.HostSocket(name=name, mode=0o666) for name in ("c-1", "d-0", "etc")]
    await site.guest.call(listen_sockets=pb.ListenSockets(sockets=wanted))
    for each in wanted:
        await ends(site.connect(each.name))
    assert server.seen == []
    assert "which no container mounts" in caplog.text


async def test_server_that_passes_descriptors_loses_the_connection(site: Site, server: UnixServer) -> None:
    await site.create("c", server.path)
    client, peer = await pair(site, server)
    socket.send_fds(peer, [b"x"], [0])
    await ends(client)
    await ends(peer)


async def test_datagrams_reach_a_server_that_starts_again_in_between(site: Site) -> None:
    server = UnixServer(site.root / "log.sock", socket.SOCK_DGRAM)
    await site.create("c", server.path)
    client = site.connect("c-0", socket.SOCK_DGRAM)
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    server.listener.settimeout(10)
    client.send(b"<6>one")
    client.send(b"<6>two")
    data, [(_, _, ids)], _, _ = await in_thread(lambda: server.listener.recvmsg(100, 64))
    assert (data, ids[4:]) == (b"<6>one", bytes(8))
    assert await in_thread(lambda: server.listener.recv(100)) == b"<6>two"
    server.stop()
    server.start()
    server.listener.settimeout(10)
    client.send(b"<6>three")
    assert await in_thread(lambda: server.listener.recv(100)) == b"<6>three"
    server.stop()


async def test_sockets_end_with_their_container_and_connections_go_on(site: Site, server: UnixServer) -> None:
    first = await site.create("c", server.path)
    second = await site.create("d", server.path, site.root)
    client, peer = await pair(site, server)
    assert site.names == ["c-0", "d-0"]
    for _ in range(2):
        await GuestMounts((site.sockets,)).down(first)
    assert site.names == ["d-0"]
    client.sendall(b"still")
    assert await in_thread(lambda: peer.recv(5)) == b"still"
    await pair(site, server, "d-0")
    await GuestMounts((site.sockets,)).down(second)
    assert site.names == []
    await site.create("e", server.path)
    await pair(site, server, "e-0")


async def test_restart_of_the_daemon_ends_connections_and_keeps_the_sockets(
    site: Site, server: UnixServer
) -> None:
    await site.create("c", server.path)
    client, peer = await pair(site, server)
    inode = (site.directory / "c-0").stat().st_ino
    await site.tasks.close()
    waiting = site.connect("c-0")
    waiting.sendall(b"waiting")
    await site.restart()
    await ends(client)
    await ends(peer)
    assert (site.directory / "c-0").stat().st_ino == inode
    peer = await in_thread(server.accept)
    assert await in_thread(lambda: peer.recv(10)) == b"waiting"


async def test_creation_cut_short_leaves_no_socket_after_the_restart(site: Site, server: UnixServer) -> None:
    await site.create("c", server.path)
    cut = await site.create("d", server.path)
    await site.tasks.close()
    site.inventory.containers.pop(cut.id)
    await site.restart()
    assert site.names == ["c-0"]


async def test_agent_without_sockets_gets_the_mount_exported(
    site: Site, server: UnixServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(request: pb.Request, timeout_s: float = 0) -> pb.Reply:
        raise GuestError("request", 95, "body 23 is unknown to this agent")

    monkeypatch.setattr(link_of(site.pod), "call", refuse)
    container = await site.create("c", server.path)
    assert container.live == {}
    assert container.record.sockets == ()
