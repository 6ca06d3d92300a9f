"""Exec and port-forward over WebSocket, and large output over both protocols."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from wsproto.events import CloseConnection

from cri.streaming.session import PortForwardOptions
from tests.contract.streaming.site import (
    EXEC,
    PIPE_MAX,
    TTY,
    V4,
    V5,
    Site,
    echo,
    echo_service,
    exit_code,
    stdin_of,
)
from tests.fakes.streaming import FakeConnection, FakeSession
from tests.kit.streams import NotUpgraded, SpdyClient, WebSocketClient

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy.")


async def test_exec_over_v5_copies_streams_and_half_closes_stdin(site: Site) -> None:
    site.backend.program = echo
    client = await WebSocketClient.dial(site.server.url(EXEC), V5, V4)
    assert client.subprotocol == V5
    await client.until(lambda: client.messages == [b"\1"])
    data = bytes(range(256)) * 4000
    sending = asyncio.ensure_future(_send_all(client, data))
    await client.until(lambda: len(client.channel(1)) == len(data))
    await sending
    assert client.channel(1) == data
    await client.send(b"\xff\x00")
    await client.read_all()
    assert client.channel(2) == b"1024000 bytes"
    assert exit_code(client.channel(3)) == 3
    assert client.closed is not None
    assert client.closed.code == 1000
    await client.close()
    await site.idle()


async def _send_all(client: WebSocketClient, data: bytes) -> None:
    for start in range(0, len(data), 32 << 10):
        await client.send(b"\0" + data[start : start + (32 << 10)])


@pytest.mark.parametrize(
    ("subprotocols", "status"),
    [
        ([V4], True),
        (["channel.k8s.io"], False),
        (["v4.base64.channel.k8s.io"], True),
        (["base64.channel.k8s.io"], False),
        ([], False),
    ],
)
async def test_exec_over_older_subprotocols(site: Site, subprotocols: list[str], status: bool) -> None:
    async def program(session: FakeSession) -> None:
        assert session.stdin is not None
        assert session.stdout is not None
        await session.stdout.write(b"<" + await session.stdin.read() + b">")
        session.finish(5)

    site.backend.program = program
    client = await WebSocketClient.dial(site.server.url(EXEC), *subprotocols)
    assert (client.subprotocol or "") == "".join(subprotocols)
    base64 = "base64" in (client.subprotocol or "")
    await client.send("0d29yZA==" if base64 else b"\0word")
    await client.read_all()
    expected = b'{"metadata"' if status else b"command terminated with exit code 5"
    if base64:
        assert "1PHdvcmQ+" in client.messages
        assert any(each[0] == "3" for each in client.messages if isinstance(each, str))
    else:
        assert client.channel(1) == b"<word>"
        assert client.channel(3).startswith(expected)
    await client.close()


async def test_first_message_is_empty_and_on_the_first_output(site: Site) -> None:
    site.backend.program = echo
    for options, first in (
        (replace(EXEC, stdout=True, stderr=True), b"\1"),
        (replace(EXEC, stdout=False), b"\2"),
        (replace(EXEC, stdout=False, stderr=False), b"\3"),
    ):
        client = await WebSocketClient.dial(site.server.url(options), V5)
        await client.until(lambda: bool(client.messages))  # noqa: B023
        assert client.messages[0] == first
        await client.close()


async def test_resize_ping_and_unknown_channel(site: Site) -> None:
    site.backend.program = echo
    client = await WebSocketClient.dial(site.server.url(TTY), V5)
    await client.send(b'\4{"Width":80,"Height":24}')
    await client.ping()
    await client.until(lambda: client.pongs == 1)
    await client.send(b"\0x")
    await client.until(lambda: client.channel(1) == b"x")
    assert site.backend.sessions[0].sizes == [(24, 80)]
    await client.send(b"\x09unknown")
    await client.send(b"\xff\x00")
    await client.read_all()
    assert exit_code(client.channel(3)) == 3
    await client.close()


async def test_unsupported_subprotocol_is_rejected(site: Site) -> None:
    with pytest.raises(NotUpgraded) as caught:
        await WebSocketClient.dial(site.server.url(EXEC), "v6.channel.k8s.io")
    assert caught.value.answer.code == 403
    with pytest.raises(NotUpgraded) as caught:
        await WebSocketClient.dial(site.server.url(PortForwardOptions("p", (80,))), V5)
    assert caught.value.answer.code == 403


@pytest.mark.parametrize("message", ["text where bytes belong", b"\x05" * 10])
async def test_text_message_ends_a_binary_session_and_unknown_channel_does_not(
    site: Site, message: bytes | str
) -> None:
    """Text ends it, an unknown channel is passed over."""
    site.backend.program = echo
    client = await WebSocketClient.dial(site.server.url(EXEC), V5)
    await client.send(message)
    if isinstance(message, bytes):
        await client.send(b"\xff\x00")
    await client.read_all()
    assert bool(client.channel(3)) == isinstance(message, bytes)
    await client.close()
    await site.idle()


async def test_close_by_the_client_closes_the_session(site: Site) -> None:
    site.backend.program = echo
    client = await WebSocketClient.dial(site.server.url(EXEC), V4)
    await client.until(lambda: bool(client.messages))
    await client.send_event(CloseConnection(code=1000))
    await client.read_all()
    await asyncio.wait_for(site.backend.sessions[0].closed.wait(), 10)
    await client.close()
    await site.idle()


async def test_stdin_that_is_not_read_stops_the_client(site: Site) -> None:
    async def program(session: FakeSession) -> None:
        assert session.stdout is not None
        while True:
            await session.stdout.write(b"tick")
            await asyncio.sleep(0.01)

    site.backend.program = program
    client = await WebSocketClient.dial(site.server.url(EXEC), V5)
    flood = asyncio.ensure_future(_send_all(client, bytes(64 << 20)))
    await client.until(lambda: len(client.channel(1)) > 200)
    assert not flood.done()
    assert stdin_of(site.backend.sessions[0]).most <= PIPE_MAX
    flood.cancel()
    await client.close()


async def test_port_forward_over_channels(site: Site) -> None:
    site.backend.service = echo_service
    site.backend.refused = frozenset({81})
    client = await WebSocketClient.dial(site.server.url(PortForwardOptions("p1", (80, 81))), V4)
    await client.until(lambda: len(client.messages) >= 5)
    assert client.messages[:4] == [b"\0\x50\0", b"\1\x50\0", b"\2\x51\0", b"\3\x51\0"]
    assert b"refused" in client.channel(3)
    await client.send(b"\0question")
    await client.until(lambda: client.channel(0) == b"\x50\0question")
    await client.close()
    await asyncio.wait_for(site.backend.connections[0].closed.wait(), 10)
    await site.idle()


@pytest.mark.parametrize("service_ends", ["wholly", "its output alone"])
async def test_port_forward_closes_when_the_pods_program_closes_first(site: Site, service_ends: str) -> None:
    """A channel cannot be ended towards the client, which would wait for ever."""

    async def service(connection: FakeConnection) -> None:
        await connection.reader.write(b"bye")
        connection.reader.close()
        if service_ends == "wholly":
            connection.writer.stop()

    site.backend.service = service
    client = await WebSocketClient.dial(site.server.url(PortForwardOptions("p1", (80,))), V4)
    await asyncio.wait_for(client.read_all(), 10)
    assert client.channel(0) == b"\x50\0bye"
    assert client.closed is not None
    assert client.closed.code == 1000
    await asyncio.wait_for(site.backend.connections[0].closed.wait(), 10)
    await site.idle()


async def test_port_forward_answers_a_client_that_ends_its_side(site: Site) -> None:
    async def service(connection: FakeConnection) -> None:
        asked = await connection.writer.read_all()
        await connection.reader.write(asked.upper())
        connection.reader.close()

    site.backend.service = service
    client = await WebSocketClient.dial(site.server.url(PortForwardOptions("p1", (80,))), V4)
    await client.send(b"\0question")
    client.end()
    await asyncio.wait_for(client.read_all(), 10)
    assert client.channel(0) == b"\x50\0QUESTION"
    await site.idle()


@pytest.mark.parametrize(("ports", "subprotocol"), [((), V4), ((80,) * 6, "v4.base64.channel.k8s.io")])
async def test_port_forward_with_unsupported_number_of_ports_is_rejected(
    site: Site, ports: tuple[int, ...], subprotocol: str
) -> None:
    with pytest.raises(NotUpgraded) as caught:
        await WebSocketClient.dial(site.server.url(PortForwardOptions("p1", ports)), subprotocol)
    assert caught.value.answer.code == 400


@pytest.mark.parametrize("kind", ["spdy", "websocket"])
async def test_process_that_closes_its_outputs_early_still_gets_stdin(site: Site, kind: str) -> None:
    """Neither side's end ends the other: the exit code comes when the process has ended."""

    async def program(session: FakeSession) -> None:
        assert session.stdin is not None
        assert session.stdout is not None
        assert session.stderr is not None
        await session.stdout.write(b"closing")
        session.stdout.close()
        session.stderr.close()
        session.exit.set_result(len(await session.stdin.read_all()))

    site.backend.program = program
    if kind == "spdy":
        spdy = await SpdyClient.dial(site.server.url(EXEC), V4)
        streams = await spdy.open_command("error", "stdin", "stdout", "stderr")
        assert await spdy.all(streams["stdout"]) == b"closing"
        assert not spdy.streams[streams["error"]].ended.is_set()
        await spdy.send(streams["stdin"], b"12345")
        await spdy.end(streams["stdin"])
        assert exit_code(await spdy.all(streams["error"])) == 5
        await spdy.wait_closed()
    else:
        client = await WebSocketClient.dial(site.server.url(EXEC), V5)
        await client.until(lambda: client.channel(1) == b"closing")
        await client.send(b"\0" + b"12345")
        await client.send(b"\xff\0")
        await client.read_all()
        assert exit_code(client.channel(3)) == 5
        assert client.closed is not None
    await site.idle()


async def test_five_hundred_sessions_at_once_are_served(site: Site) -> None:
    site.backend.program = echo

    async def by_spdy(number: int) -> bytes:
        client = await SpdyClient.dial(site.server.url(EXEC), V4)
        streams = await client.open_command("error", "stdin", "stdout", "stderr")
        await client.send(streams["stdin"], b"%d" % number)
        await client.until(streams["stdout"], lambda seen: bool(seen))
        await everyone.wait()
        await client.end(streams["stdin"])
        return await client.all(streams["stdout"])

    async def by_websocket(number: int) -> bytes:
        client = await WebSocketClient.dial(site.server.url(EXEC), V5)
        await client.send(b"\0%d" % number)
        await client.until(lambda: bool(client.channel(1)))
        await everyone.wait()
        await client.send(b"\xff\0")
        await client.read_all()
        return client.channel(1)

    everyone = asyncio.Barrier(500)
    async with asyncio.timeout(60):
        seen = await asyncio.gather(*((by_spdy, by_websocket)[number % 2](number) for number in range(500)))
    assert seen == [b"%d" % number for number in range(500)]
    await site.idle()


@pytest.mark.parametrize("kind", ["spdy", "websocket"])
async def test_large_output_arrives_with_bounded_buffers(site: Site, kind: str) -> None:
    size = 48 << 20

    async def program(session: FakeSession) -> None:
        assert session.stdout is not None
        piece = bytes(64 << 10)
        for _ in range(size // len(piece)):
            await session.stdout.write(piece)
        session.finish(0)

    site.backend.program = program
    options = replace(EXEC, stdin=False, stderr=False)
    total = 0
    if kind == "spdy":
        spdy = await SpdyClient.dial(site.server.url(options), V4)
        streams = await spdy.open_command("error", "stdout")
        stream = spdy.streams[streams["stdout"]]
        while not stream.ended.is_set():
            await asyncio.sleep(0.001)
            total += len(stream.seen)
            stream.seen.clear()
        total += len(stream.seen)
        assert exit_code(await spdy.all(streams["error"])) == 0
        await spdy.close()
    else:
        client = await WebSocketClient.dial(site.server.url(options), V5)
        last = b""
        while client.closed is None:
            await client.receive()
            total += len(client.channel(1))
            last += client.channel(3)
            client.messages.clear()
        assert exit_code(last) == 0
        await client.close()
    assert total == size
    assert site.backend.sessions[-1].stdout is not None
    assert site.backend.sessions[-1].stdout.most <= 512 << 10
