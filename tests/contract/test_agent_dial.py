"""Connections that the agent makes to ports in its network."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest

from sandbox.errors import DeadlineExceeded, GuestError, StreamReset
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.sessions import GuestPortConnection
from tests.kit.agent import Agent, Guest
from tests.kit.namespace import enter_network

REFUSED = 111


def listen_inside(agent: Agent, family: int, address: str, backlog: int = 128) -> socket.socket:
    """Return a socket that listens in the agent's network namespace; it stays there wherever it is used."""
    made: list[socket.socket] = []

    def make() -> None:
        enter_network(agent.pid)
        listener = socket.socket(family)
        listener.bind((address, 0))
        listener.listen(backlog)
        listener.setblocking(False)
        made.append(listener)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


@pytest.fixture
def listener(agent: Agent) -> Iterator[socket.socket]:
    agent.run_inside("ip", "link", "set", "lo", "up")
    with listen_inside(agent, socket.AF_INET, "127.0.0.1") as made:
        yield made


async def pair(guest: Guest, listener: socket.socket) -> tuple[GuestPortConnection, socket.socket]:
    """Return both ends of a dialled connection."""
    connection = await GuestPortConnection.dial(guest.client, listener.getsockname()[1], 10)
    peer, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(listener), 10)
    return connection, peer


async def receive(sock: socket.socket, count: int) -> bytes:
    seen = b""
    while len(seen) < count:
        data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1 << 16), 10)
        if not data:
            break
        seen += data
    return seen


async def read_all(connection: GuestPortConnection) -> bytes:
    seen = bytearray()
    async with asyncio.timeout(20):
        while chunk := await connection.reader.read():
            seen += chunk
    return bytes(seen)


async def test_dialled_connection_carries_both_directions_and_half_closes(
    guest: Guest, listener: socket.socket
) -> None:
    connection, peer = await pair(guest, listener)
    loop = asyncio.get_running_loop()
    with peer:
        await connection.writer.write(b"question")
        connection.writer.close()
        assert await receive(peer, 100) == b"question", "and then end of file"
        await loop.sock_sendall(peer, b"answer")
        assert await connection.reader.read() == b"answer"
        await loop.sock_sendall(peer, b"more")
        peer.shutdown(socket.SHUT_WR)
        assert await read_all(connection) == b"more"
    connection.close()


async def test_half_close_by_the_peer_leaves_the_other_direction_open(
    guest: Guest, listener: socket.socket
) -> None:
    connection, peer = await pair(guest, listener)
    with peer:
        peer.shutdown(socket.SHUT_WR)
        assert await read_all(connection) == b""
        await connection.writer.write(b"still there")
        assert await receive(peer, 11) == b"still there"
        connection.writer.close()
        assert await receive(peer, 1) == b""


async def test_five_megabytes_are_echoed(guest: Guest, listener: socket.socket) -> None:
    connection, peer = await pair(guest, listener)
    data = bytes(range(256)) * 20000

    async def send() -> None:
        await connection.writer.write(data)
        connection.writer.close()

    async def echo() -> None:
        loop = asyncio.get_running_loop()
        while chunk := await loop.sock_recv(peer, 1 << 16):
            await loop.sock_sendall(peer, chunk)
        peer.close()

    _, _, back = await asyncio.gather(send(), echo(), read_all(connection))
    assert back == data


async def test_stopped_reader_blocks_only_its_connection(guest: Guest, listener: socket.socket) -> None:
    stopped, flooding = await pair(guest, listener)
    other, peer = await pair(guest, listener)
    loop = asyncio.get_running_loop()
    flood = asyncio.ensure_future(loop.sock_sendall(flooding, bytes(64 << 20)))
    done, _ = await asyncio.wait({flood}, timeout=0.2)
    assert not done
    await loop.sock_sendall(peer, b"quick")
    assert await asyncio.wait_for(other.reader.read(), 5) == b"quick"
    stopped.close()
    with pytest.raises(OSError, match=r"reset|Broken"):
        await asyncio.wait_for(flood, 10)
    flooding.close()
    peer.close()
    assert await read_all(other) == b""
    other.close()


async def test_dial_of_a_listener_on_ipv6_only_succeeds(
    agent: Agent, guest: Guest, listener: socket.socket
) -> None:
    with listen_inside(agent, socket.AF_INET6, "::1") as six:
        connection, peer = await pair(guest, six)
        with peer:
            await connection.writer.write(b"six")
            assert await receive(peer, 3) == b"six"
        connection.close()


async def test_dial_of_a_closed_port_is_refused_with_its_number(
    guest: Guest, listener: socket.socket
) -> None:
    port = listener.getsockname()[1]
    listener.close()
    with pytest.raises(GuestError) as caught:
        await GuestPortConnection.dial(guest.client, port, 10)
    assert caught.value.errno == REFUSED
    assert str(port) in caught.value.step


@pytest.mark.parametrize("port", [0, 65536, 1 << 31])
async def test_dial_of_an_invalid_port_fails(guest: Guest, port: int) -> None:
    with pytest.raises(GuestError) as caught:
        await GuestPortConnection.dial(guest.client, port, 10)
    assert caught.value.errno == 22


async def test_reset_by_the_peer_ends_both_directions(guest: Guest, listener: socket.socket) -> None:
    connection, peer = await pair(guest, listener)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()
    assert await read_all(connection) == b""
    with pytest.raises(StreamReset):
        for _ in range(100):
            await connection.writer.write(b"x")
            await asyncio.sleep(0.002)
    connection.close()


async def test_dial_that_gets_no_answer_times_out(
    agent: Agent, guest: Guest, listener: socket.socket
) -> None:
    """With a full backlog the kernel answers nothing; the caller's timeout ends the wait."""
    with listen_inside(agent, socket.AF_INET, "127.0.0.1", backlog=0) as full:
        port = full.getsockname()[1]
        first = await GuestPortConnection.dial(guest.client, port, 10)
        with pytest.raises(DeadlineExceeded):
            await GuestPortConnection.dial(guest.client, port, 0.2)
        first.close()


async def test_dial_beyond_1024_connections_fails(guest: Guest, listener: socket.socket) -> None:
    made = []
    with pytest.raises(GuestError) as caught:
        for _ in range(1100):
            made.append(await pair(guest, listener))  # noqa: PERF401
    assert caught.value.errno == 24
    assert len(made) == 1024
    for connection, peer in made:
        peer.close()
        connection.close()
    await guest.call(ping=pb.Ping())
    connection, peer = await pair(guest, listener)
    peer.close()
    connection.close()


async def test_dialled_connection_ends_with_the_connection_to_the_agent(
    guest: Guest, listener: socket.socket
) -> None:
    _, peer = await pair(guest, listener)
    with peer:
        await guest.connect()
        assert await receive(peer, 1) == b""
