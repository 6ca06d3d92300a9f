"""SPDY and the WebSocket channels against anything that a client may send."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from wsproto.events import BytesMessage, TextMessage

from cri.streaming import spdy_frames as frames
from cri.streaming.channels import ConnectionLost
from cri.streaming.server import StreamingOptions, StreamingServer
from cri.streaming.session import ExecOptions, PortForwardOptions
from cri.streaming.spdy import DataReceived, FinReceived, SpdyProtocol
from cri.streaming.spdy_frames import Kind, SpdyError, Status
from cri.streaming.websocket_messages import (
    COMMAND_SUBPROTOCOLS,
    ChannelData,
    Decoder,
    Subprotocol,
    SubprotocolError,
)
from tests.fakes.streaming import FakeBackend
from tests.kit.eventually import eventually
from tests.kit.streams import connect, spdy_headers

_ID = st.integers(0, 9) | st.integers(0, 2**31 - 1)
_TEXT = st.text(max_size=20)
_HEADERS = st.dictionaries(
    st.sampled_from(["streamtype", "port", "requestid"]) | _TEXT,
    st.sampled_from(["error", "stdin", "stdout", "stderr", "data", "80"]) | _TEXT,
    max_size=4,
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    borders = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(borders)]


class _Encoder:
    """Encodes drawn frames in order, as header blocks depend on the ones before."""

    def __init__(self) -> None:
        self.compressor = frames.HeaderCompressor()

    def bytes(self, plan: tuple[Any, ...]) -> bytes:
        match plan:
            case ("syn", id, headers, fin):
                return frames.syn_stream(id, self.compressor.compress(headers), fin)
            case ("headers", id, headers):
                return frames.control(
                    Kind.HEADERS, id.to_bytes(4, "big") + self.compressor.compress(headers), 1
                )
            case ("raw", data):
                return bytes(data)
        raise AssertionError(plan)


plans = st.one_of(
    st.tuples(st.just("syn"), _ID, _HEADERS, st.booleans()),
    st.tuples(st.just("headers"), _ID, _HEADERS),
    st.tuples(
        st.just("raw"),
        st.one_of(
            st.builds(frames.data, _ID, st.binary(max_size=2000), st.booleans()),
            st.builds(frames.rst_stream, _ID, st.sampled_from(Status)),
            st.builds(frames.ping, _ID),
            st.builds(frames.window_update, _ID, st.integers(0, 2**31 - 1)),
            st.builds(
                frames.settings, st.dictionaries(st.integers(0, 9), st.integers(0, 2**32 - 1), max_size=3)
            ),
            st.builds(frames.control, st.sampled_from(Kind), st.binary(max_size=40), st.integers(0, 255)),
            st.binary(max_size=40),
        ),
    ),
)


@given(st.lists(plans, max_size=20), st.lists(st.integers(0), max_size=20))
@settings(max_examples=400, deadline=None)
def test_arbitrary_spdy_bytes_are_parsed_or_refused(plan: list[tuple[Any, ...]], cuts: list[int]) -> None:
    """The result does not depend on how the bytes are split; only SpdyError is raised; replies are SPDY."""
    encoder = _Encoder()
    data = b"".join(encoder.bytes(each) for each in plan)

    def run(parts: list[bytes]) -> tuple[dict[int, bytes], bool]:
        server, seen = SpdyProtocol(), dict[int, bytes]()
        answers = frames.Parser()
        try:
            for part in parts:
                for event in server.receive(part):
                    if isinstance(event, DataReceived):
                        seen[event.stream] = seen.get(event.stream, b"") + event.data
                        server.consumed(event.stream, len(event.data))
                    if isinstance(event, FinReceived):
                        server.end(event.stream)
                list(answers.feed(server.output()))
        except SpdyError:
            return seen, False
        return seen, True

    assert run([data]) == run(pieces(data, cuts))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=3000)), max_size=15), st.lists(st.integers(0))
)
@settings(deadline=None)
def test_spdy_data_arrives_unchanged(writes: list[tuple[int, bytes]], cuts: list[int]) -> None:
    client, server = SpdyProtocol(client=True), SpdyProtocol()
    ids = [client.open({"n": str(number)}) for number in range(4)]
    wanted = dict.fromkeys(ids, b"")
    for number, data in writes:
        client.send(ids[number], data)
        wanted[ids[number]] += data
    for id in ids:
        client.end(id)
    got = dict.fromkeys(ids, b"")
    ended = []
    for part in pieces(client.output(), cuts):
        for event in server.receive(part):
            if isinstance(event, DataReceived):
                got[event.stream] += event.data
            if isinstance(event, FinReceived):
                ended.append(event.stream)
    assert got == wanted
    assert ended == ids


messages = st.one_of(
    st.builds(BytesMessage, data=st.binary(max_size=50), message_finished=st.booleans()),
    st.builds(
        TextMessage,
        data=st.text(max_size=20) | st.text("0123456789=ABCabc+/", max_size=20),
        message_finished=st.booleans(),
    ),
)


@given(st.sampled_from(sorted(COMMAND_SUBPROTOCOLS)), st.lists(messages, max_size=20))
def test_arbitrary_websocket_messages_are_decoded_or_refused(name: str, sent: list[Any]) -> None:
    subprotocol: Subprotocol = COMMAND_SUBPROTOCOLS[name]
    decoder = Decoder(subprotocol)
    total = 0
    try:
        for message in sent:
            for event in decoder.feed(message):
                assert 0 <= event.channel <= 255
                if isinstance(event, ChannelData):
                    total += len(event.data)
    except SubprotocolError:
        pass
    assert total <= sum(len(each.data) for each in sent)


@given(st.lists(plans, max_size=12), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_server_survives_arbitrary_client(plan: list[tuple[Any, ...]], forwards: bool, greets: bool) -> None:
    """After the handshake or in place of it: no session is left."""

    async def attack() -> None:
        backend = FakeBackend()
        server = StreamingServer(backend, StreamingOptions("127.0.0.1", 0, 60))
        await server.start()
        options = (
            PortForwardOptions("p", (80,)) if forwards else ExecOptions("c", ("x",), False, True, True, True)
        )
        encoder = _Encoder()
        reader, writer = await connect(server.url(options))
        protocol = "portforward.k8s.io" if forwards else "v4.channel.k8s.io"
        if greets:
            path = server.url(options).split("/", 3)[3]
            head = "".join(f"{name}: {value}\r\n" for name, value in spdy_headers(protocol))
            writer.write(f"GET /{path} HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode())
        writer.write(b"".join(encoder.bytes(each) for each in plan))
        await writer.drain()
        writer.write_eof()
        await asyncio.wait_for(_read_to_end(reader), 20)
        writer.close()
        await eventually(lambda: len(server) == 0)
        assert all(session.closed.is_set() for session in backend.sessions)
        assert all(connection.closed.is_set() for connection in backend.connections)
        await server.stop()

    asyncio.run(attack())


async def _read_to_end(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(1 << 16):
            pass
    except (ConnectionError, ConnectionLost):
        pass
