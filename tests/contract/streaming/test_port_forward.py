"""Port-forward over SPDY."""

from __future__ import annotations

import asyncio

import pytest

from cri.streaming.session import PortForwardOptions
from tests.contract.streaming.site import TUNNEL, Site, echo_service
from tests.fakes.streaming import FakeConnection
from tests.kit.streams import SpdyClient, Stream, Tunnelled, WebSocketClient

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy.")


async def forward(site: Site) -> SpdyClient:
    return await SpdyClient.dial(site.server.url(PortForwardOptions("p1", ())), "portforward.k8s.io")


async def open_pair(client: SpdyClient, port: int, request: str, *, hold: bool = False) -> tuple[int, int]:
    """An old client names no request."""
    error = await client.open(streamtype="error", port=str(port), requestid=request)
    await client.end(error)
    data = await client.open(streamtype="data", port=str(port), requestid=request, hold=hold)
    return data, error


async def test_port_forward_copies_several_connections(site: Site) -> None:
    site.backend.service = echo_service
    client = await forward(site)
    for number, named in enumerate(("0", "1", "")):
        data, error = await open_pair(client, 8000 + number, named)
        body = b"%d" % number * 100_000
        sending = asyncio.ensure_future(client.send(data, body))
        await client.until(data, lambda seen, body=body: seen == body)  # type: ignore[misc]
        await sending
        await client.end(data)
        assert await client.all(data) == body
        assert await client.all(error) == b""
    assert site.backend.dialled == [("p1", 8000), ("p1", 8001), ("p1", 8002)]
    for connection in site.backend.connections:
        await asyncio.wait_for(connection.closed.wait(), 10)
    assert not client.spdy._streams, "all were ended, on both sides"
    await client.close()
    await site.idle()


async def test_refused_port_fails_only_its_connection(site: Site) -> None:
    site.backend.service = echo_service
    site.backend.refused = frozenset({81})
    client = await forward(site)
    good, _ = await open_pair(client, 80, "0")
    bad, error = await open_pair(client, 81, "1")
    assert b"81" in await client.all(error)
    assert b"refused" in bytes(client.streams[error].seen)
    await client.all(bad)
    await client.send(good, b"alive")
    await client.until(good, lambda seen: seen == b"alive")
    await client.close()


async def test_connection_that_is_not_read_stops_only_itself(site: Site) -> None:
    async def service(connection: FakeConnection) -> None:
        await connection.reader.write(bytes(4 << 20))

    site.backend.service = service
    client = await forward(site)
    stopped, _ = await open_pair(client, 80, "0", hold=True)
    await client.until(stopped, lambda seen: len(seen) == 64 << 10)
    site.backend.service = echo_service
    other, _ = await open_pair(client, 80, "1")
    await client.send(other, b"alive" * 100_000)
    await client.until(other, lambda seen: len(seen) == 500_000)
    site.backend.service = None
    unread, _ = await open_pair(client, 80, "2")
    flood = asyncio.ensure_future(client.send(unread, bytes(4 << 20)))
    await client.send(other, b"still")
    await client.until(other, lambda seen: seen.endswith(b"still"))
    assert not flood.done()
    flood.cancel()
    await client.close()
    await site.idle()


async def test_half_close_by_the_pod_keeps_the_other_direction(site: Site) -> None:
    got: list[bytes] = []

    async def service(connection: FakeConnection) -> None:
        await connection.reader.write(b"bye")
        connection.reader.close()
        got.append(await connection.writer.read_all())

    site.backend.service = service
    client = await forward(site)
    data, error = await open_pair(client, 80, "0")
    await client.all(data)
    assert client.streams[data].seen == b"bye"
    await client.send(data, b"heard all the same")
    await client.end(data)
    assert await client.all(error) == b""
    assert got == [b"heard all the same"]
    await client.close()


async def answer_at_the_end(connection: FakeConnection) -> None:
    """A service that answers once it has seen the end of what was asked."""
    asked = await connection.writer.read_all()
    await connection.reader.write(asked.upper())
    connection.reader.close()


@pytest.mark.parametrize("way", ["stream", "connection", "at once"])
async def test_half_close_by_the_client_is_answered(site: Site, way: str) -> None:
    """The client ends its stream, or its side of the whole connection, or all before the pod is dialled."""
    site.backend.service = answer_at_the_end
    client = await forward(site)
    if way == "at once":
        error = client.spdy.open({"streamtype": "error", "port": "80", "requestid": "0"})
        data = client.spdy.open({"streamtype": "data", "port": "80", "requestid": "0"})
        client.streams |= {error: Stream(), data: Stream()}
        client.spdy.send(data, b"question")
        client.spdy.end(data)
    else:
        data, error = await open_pair(client, 80, "0")
        await client.send(data, b"question")
    if way == "stream":
        await client.end(data)
    else:
        await client.flush()
    if way == "connection":
        client.writer.write_eof()
    assert await client.all(data) == b"QUESTION"
    assert await client.all(error) == b""
    await client.close()
    await site.idle()


async def test_half_close_of_the_connection_without_an_answer_ends_it(site: Site) -> None:
    client = await forward(site)
    data, _ = await open_pair(client, 80, "0")
    await client.send(data, b"question")
    client.writer.write_eof()
    await client.wait_closed(10)
    await asyncio.wait_for(site.backend.connections[0].closed.wait(), 10)


@pytest.mark.parametrize("count", [500])
async def test_many_connections_at_once_are_forwarded(site: Site, count: int) -> None:
    site.backend.service = answer_at_the_end
    client = await forward(site)
    pairs = [await open_pair(client, 80, str(number)) for number in range(count)]
    for number, (data, _) in enumerate(pairs):
        await client.send(data, b"q%d" % number)
        await client.end(data)
    for number, (data, error) in enumerate(pairs):
        assert await client.all(data) == b"Q%d" % number
        assert await client.all(error) == b""
    await client.close()
    await site.idle()


async def test_reset_by_the_client_closes_the_connection_in_the_pod(site: Site) -> None:
    site.backend.service = echo_service
    client = await forward(site)
    data, error = await open_pair(client, 80, "0")
    await client.send(data, b"x")
    await client.until(data, lambda seen: seen == b"x")
    client.spdy.reset(data)
    await client.flush()
    await asyncio.wait_for(site.backend.connections[0].closed.wait(), 10)
    await client.all(error)
    await client.close()


@pytest.mark.parametrize("port", ["", "0", "65536", "x", "-1", "\u0663"])
async def test_stream_with_invalid_port_is_reset(site: Site, port: str) -> None:
    client = await forward(site)
    id = await client.open(streamtype="data", port=port, requestid="0")
    await client.all(id)
    assert client.streams[id].broken
    await client.close()


async def test_data_stream_without_error_stream_is_reset_after_a_timeout(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cri.streaming.port_forward.PAIR_TIMEOUT_S", 0.1)
    client = await forward(site)
    id = await client.open(streamtype="data", port="80", requestid="0")
    await client.all(id)
    assert client.streams[id].broken
    assert not site.backend.dialled
    await client.close()


async def test_client_that_disconnects_closes_every_connection(site: Site) -> None:
    site.backend.service = echo_service
    client = await forward(site)
    for number in range(5):
        data, _ = await open_pair(client, 80, str(number))
        await client.send(data, b"x")
        await client.until(data, lambda seen: seen == b"x")
    await client.close()
    for connection in site.backend.connections:
        await asyncio.wait_for(connection.closed.wait(), 10)
    await site.idle()


async def test_port_forward_over_a_spdy_tunnel(site: Site) -> None:
    """SPDY in the messages of a WebSocket, as client-go and critest forward ports."""
    site.backend.service = echo_service
    socket = await WebSocketClient.dial(site.server.url(PortForwardOptions("p1", (80,))), TUNNEL)
    assert socket.subprotocol == TUNNEL
    pipe = Tunnelled(socket)
    client = SpdyClient(pipe, pipe)  # type: ignore[arg-type]
    client.begin()
    data, error = await open_pair(client, 80, "0")
    body = bytes(range(256)) * 2000
    sending = asyncio.ensure_future(client.send(data, body))
    await client.until(data, lambda seen: len(seen) == len(body))
    await sending
    await client.end(data)
    assert await client.all(data) == body
    assert await client.all(error) == b""
    await client.close()
    await site.idle()
