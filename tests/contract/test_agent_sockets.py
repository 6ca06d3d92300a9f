"""Sockets of the guest that stand for the host's: what the agent accepts, carries, refuses and closes."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from sandbox.errors import GuestError, StreamReset
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.sockets import SocketConnection
from sandbox.host import syscalls, threads
from sandbox.host.mount_flags import MS_BIND, MS_RDONLY
from tests.kit.agent import Agent, Guest, standard_mounts
from tests.kit.images import helper

SOCKETS = Path("/run/husk/sockets")
Kind = pb.HostSocket
TYPES = {
    Kind.STREAM: socket.SOCK_STREAM,
    Kind.SEQPACKET: socket.SOCK_SEQPACKET,
    Kind.DATAGRAM: socket.SOCK_DGRAM,
}
T = TypeVar("T")


@pytest.fixture(autouse=True)
async def no_sockets(guest: Guest) -> AsyncIterator[None]:
    yield
    await guest.call(keep_sockets=pb.KeepSockets())


def place(agent: Agent, name: str = "s") -> Path:
    """Return where this machine sees a socket of the agent."""
    return Path(f"/proc/{agent.pid}/root{SOCKETS}/{name}")


async def listen(guest: Guest, kind: int = Kind.STREAM, name: str = "s", mode: int = 0o666) -> None:
    wanted = pb.HostSocket(name=name, kind=kind, mode=mode)  # type: ignore[arg-type]
    await guest.call(listen_sockets=pb.ListenSockets(sockets=[wanted]))


def connect(agent: Agent, kind: int = Kind.STREAM, name: str = "s") -> socket.socket:
    client = socket.socket(socket.AF_UNIX, TYPES[kind])  # type: ignore[index]
    client.settimeout(10)
    client.connect(str(place(agent, name)))
    return client


async def pair(guest: Guest, kind: int = Kind.STREAM) -> tuple[socket.socket, SocketConnection]:
    client = connect(guest.agent, kind)
    return client, await asyncio.wait_for(SocketConnection.accept(guest.client), 10)


async def read_all(connection: SocketConnection) -> bytes:
    seen = b""
    async with asyncio.timeout(20):
        while chunk := await connection.reader.read():
            seen += chunk
    return seen


async def in_thread(work: Callable[[], T]) -> T:
    return await asyncio.wait_for(asyncio.to_thread(work), 20)


def message(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


async def test_connection_carries_both_directions_and_half_closes(guest: Guest) -> None:
    await listen(guest)
    client, connection = await pair(guest)
    with client:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert await read_all(connection) == b"question"
        await connection.writer.write(b"answer")
        connection.writer.close()
        assert await in_thread(lambda: client.recv(100)) == b"answer"
        assert await in_thread(lambda: client.recv(100)) == b""


async def test_half_close_by_the_host_leaves_the_other_direction_open(guest: Guest) -> None:
    await listen(guest)
    client, connection = await pair(guest)
    with client:
        connection.writer.close()
        assert await in_thread(lambda: client.recv(1)) == b""
        client.sendall(b"still there")
        client.close()
        assert await read_all(connection) == b"still there"


async def test_client_that_closes_wholly_ends_both_directions(guest: Guest) -> None:
    await listen(guest)
    client, connection = await pair(guest)
    client.close()
    assert await read_all(connection) == b""
    with pytest.raises(StreamReset):
        async with asyncio.timeout(10):
            while True:
                await connection.writer.write(b"x")
                await asyncio.sleep(0.002)


async def test_host_that_stops_reading_makes_writes_fail_and_may_still_send(guest: Guest) -> None:
    await listen(guest)
    client, connection = await pair(guest)
    with client:
        connection.reader.stop()
        with pytest.raises(BrokenPipeError):
            await in_thread(lambda: client.sendall(bytes(1 << 20)))
        await connection.writer.write(b"late")
        assert await in_thread(lambda: client.recv(10)) == b"late"


async def test_connection_that_the_host_closes_delivers_what_it_sent(guest: Guest) -> None:
    await listen(guest)
    client, connection = await pair(guest)
    with client:
        await connection.writer.write(b"x" * 60_000)
        connection.close()
        seen = await in_thread(lambda: client.recv(1 << 20, socket.MSG_WAITALL))
        assert len(seen) == 60_000
        with pytest.raises(BrokenPipeError):
            client.sendall(b"x")


async def test_credentials_are_those_of_the_process_that_connected(guest: Guest) -> None:
    wanted = pb.HostSocket(name="s", mode=0o600, uid=4, gid=9)
    await guest.call(listen_sockets=pb.ListenSockets(sockets=[wanted]))
    info = place(guest.agent).stat()
    assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (4, 9, 0o600)
    file = os.open(place(guest.agent), os.O_PATH)

    def connect_as(uid: int) -> socket.socket:
        syscalls.set_thread_credentials(uid, 5, [7, 8], 0)
        client = socket.socket(socket.AF_UNIX)
        client.connect(f"/proc/self/fd/{file}")
        return client

    with pytest.raises(PermissionError):
        await threads.run(lambda: connect_as(6), "test")
    client = await threads.run(lambda: connect_as(4), "test")
    os.close(file)
    connection = await asyncio.wait_for(SocketConnection.accept(guest.client), 10)
    peer = connection.peer
    assert (peer.name, peer.uid, peer.gid, set(peer.groups)) == ("s", 4, 5, {7, 8})
    connection.close()
    client.close()


async def test_five_hundred_connections_at_once_are_carried(guest: Guest) -> None:
    await listen(guest)
    accepts = [asyncio.ensure_future(SocketConnection.accept(guest.client)) for _ in range(500)]
    clients = await in_thread(lambda: [connect(guest.agent) for _ in range(500)])
    connections = await asyncio.wait_for(asyncio.gather(*accepts), 20)
    for number, client in enumerate(clients):
        client.sendall(b"%d" % number)
        client.shutdown(socket.SHUT_WR)
    seen = await asyncio.gather(*map(read_all, connections))
    assert sorted(map(int, seen)) == list(range(500))
    for connection, text in zip(connections, seen, strict=True):
        await connection.writer.write(text)
        connection.close()
    answers = await in_thread(lambda: [client.recv(10, socket.MSG_WAITALL) for client in clients])
    assert answers == [b"%d" % number for number in range(500)]
    for client in clients:
        client.close()


async def test_connections_wait_until_the_host_accepts_them(guest: Guest) -> None:
    await listen(guest)
    client = connect(guest.agent)
    client.sendall(b"early")
    client.shutdown(socket.SHUT_WR)
    await guest.connect()  # another daemon
    connection = await SocketConnection.accept(guest.client)
    assert await read_all(connection) == b"early"
    client.close()


async def test_accept_is_cancelled_by_the_host(guest: Guest) -> None:
    await listen(guest)
    accept = asyncio.ensure_future(SocketConnection.accept(guest.client))
    await guest.call(ping=pb.Ping())
    accept.cancel()
    await asyncio.wait({accept})
    client, connection = await pair(guest)
    client.sendall(b"for the second")
    client.close()
    assert await read_all(connection) == b"for the second"


async def test_connections_end_with_the_connection_to_the_agent(guest: Guest) -> None:
    await listen(guest)
    client, _ = await pair(guest)
    await guest.connect()
    with client:
        assert await in_thread(lambda: client.recv(1)) == b""


@pytest.mark.parametrize("kind", [Kind.STREAM, Kind.SEQPACKET])
async def test_connection_that_passes_descriptors_is_ended(guest: Guest, kind: int) -> None:
    await listen(guest, kind)
    client, connection = await pair(guest, kind)
    with client:
        socket.send_fds(client, [b"here"], [0])
        assert await read_all(connection) == b""
        assert await in_thread(lambda: client.recv(1)) == b""


async def test_messages_keep_their_boundaries(guest: Guest) -> None:
    await listen(guest, Kind.SEQPACKET)
    client, connection = await pair(guest, Kind.SEQPACKET)
    sent = [b"one", b"", b"x" * 65_536, b"four"]
    with client:
        await in_thread(lambda: [client.send(data) for data in sent])
        client.shutdown(socket.SHUT_WR)
        assert await read_all(connection) == b"".join(map(message, sent))
        await connection.writer.write(b"".join(map(message, sent)))
        connection.writer.close()
        assert [await in_thread(lambda: client.recv(1 << 17)) for _ in sent] == sent
        assert await in_thread(lambda: client.recv(1)) == b""


async def test_many_large_messages_arrive_within_the_credit(guest: Guest) -> None:
    await listen(guest, Kind.SEQPACKET)
    client, connection = await pair(guest, Kind.SEQPACKET)
    sent = [bytes([number]) * (1 + number * 655) for number in range(100)]
    seen: list[bytes] = []

    def echo() -> None:
        for _ in sent:
            client.send(client.recv(1 << 17))

    thread = threading.Thread(target=echo)
    thread.start()
    with client:

        async def write() -> None:
            for data in sent:
                await connection.writer.write(message(data))

        writing = asyncio.create_task(write())
        rest = b""
        async with asyncio.timeout(20):
            while len(seen) < len(sent):
                rest += await connection.reader.read()
                while len(rest) >= 4 and len(rest) >= 4 + int.from_bytes(rest[:4], "little"):
                    end = 4 + int.from_bytes(rest[:4], "little")
                    seen.append(rest[4:end])
                    rest = rest[end:]
        await writing
        assert seen == sent
    thread.join(10)


async def test_message_that_is_too_long_ends_its_connection(guest: Guest) -> None:
    await listen(guest, Kind.SEQPACKET)
    client, connection = await pair(guest, Kind.SEQPACKET)
    with client:
        await in_thread(lambda: client.send(bytes(65_537)))
        assert await read_all(connection) == b""
    client, connection = await pair(guest, Kind.SEQPACKET)
    with client:
        await connection.writer.write((65_537).to_bytes(4, "little"))
        with pytest.raises(StreamReset):
            for _ in range(1000):
                await connection.writer.write(b"x")
                await asyncio.sleep(0.002)


async def test_datagrams_of_each_sender_come_as_one_connection(guest: Guest) -> None:
    await listen(guest, Kind.DATAGRAM)
    client = connect(guest.agent, Kind.DATAGRAM)
    client.settimeout(None)  # poll(2) says that it is not writable while much is in the queue
    for data in (b"one", b"", b"x" * 70_000, b"two"):
        client.send(data)
    connection = await SocketConnection.accept(guest.client)
    assert (connection.peer.uid, connection.peer.gid) == (0, 0)
    expected = message(b"one") + message(b"") + message(b"two")
    seen = b""
    while len(seen) < len(expected):
        seen += await asyncio.wait_for(connection.reader.read(), 10)
    assert seen == expected, "one of 70,000 bytes is dropped"
    ids = (os.getpid(), 3, 4)
    credentials = b"".join(each.to_bytes(4, "little") for each in ids)
    client.sendmsg([b"of another"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)])
    assert await read_all(connection) == b""
    other = await asyncio.wait_for(SocketConnection.accept(guest.client), 10)
    assert (other.peer.uid, other.peer.gid) == (3, 4)
    assert await asyncio.wait_for(other.reader.read(), 10) == message(b"of another")
    client.close()


async def test_socket_is_kept_changed_and_removed_by_name(guest: Guest) -> None:
    for name in ("a", "b"):
        await listen(guest, name=name)
    inode = place(guest.agent, "a").stat().st_ino
    await listen(guest, name="a", mode=0o640)
    info = place(guest.agent, "a").stat()
    assert (info.st_ino, info.st_mode & 0o777) == (inode, 0o640)
    await guest.call(keep_sockets=pb.KeepSockets(names=["a", "absent"]))
    assert [each.name for each in place(guest.agent, "a").parent.iterdir()] == ["a"]
    connect(guest.agent, name="a").close()
    await listen(guest, Kind.SEQPACKET, "a")
    with pytest.raises(OSError) as caught:
        connect(guest.agent, name="a")
    assert caught.value.errno == errno.EPROTOTYPE


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "x" * 200])
async def test_socket_with_an_invalid_name_is_refused(guest: Guest, name: str) -> None:
    with pytest.raises(GuestError, match="socket"):
        await listen(guest, name=name)


async def test_accept_without_streams_is_refused(guest: Guest) -> None:
    with pytest.raises(GuestError) as caught:
        await guest.call(accept_socket=pb.AcceptSocket(from_guest_stream=7))
    assert caught.value.errno == errno.EINVAL


async def test_container_connects_through_its_read_only_bind(agent: Agent, guest: Guest) -> None:
    await listen(guest, mode=0o600)
    bind = pb.Mount(source=f"{SOCKETS}/s", target="/s", flags=MS_BIND | MS_RDONLY, make=pb.Mount.FILE)
    program = agent.directory / "bin"
    program.mkdir()
    (program / "sock").write_bytes(helper("sock"))
    (program / "sock").chmod(0o755)
    tools = pb.Mount(source=str(program), target="/tools", flags=MS_BIND, make=pb.Mount.DIRECTORY)
    script = "stat -c %F:%a /s; echo hello | /tools/sock stream /s"
    answer = asyncio.ensure_future(SocketConnection.accept(guest.client))
    run = asyncio.ensure_future(guest.sh(script, mounts=[*standard_mounts(), bind, tools]))
    connection = await asyncio.wait_for(answer, 20)
    assert await read_all(connection) == b"hello\n"
    await connection.writer.write(b"and back\n")
    connection.close()
    assert await run == (0, ["socket:600", "and back"])
