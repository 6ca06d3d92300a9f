"""SPDY/3.1 without a socket: frames, and two ends of a connection."""

from __future__ import annotations

import hashlib
import struct
import zlib

import pytest

from cri.streaming import spdy_frames as frames
from cri.streaming.spdy import (
    STREAMS_MAX,
    WINDOW,
    DataReceived,
    Event,
    FinReceived,
    GoAway,
    RstStream,
    SpdyProtocol,
    SynStream,
    WindowUpdate,
)
from cri.streaming.spdy_frames import Kind, SpdyError, Status


class Both:
    """A client and a server, and the events of each."""

    def __init__(self) -> None:
        self.client, self.server = SpdyProtocol(client=True), SpdyProtocol()
        self.client_saw: list[Event] = []
        self.server_saw: list[Event] = []

    def exchange(self) -> None:
        """Pass output on until neither end has any."""
        while True:
            to_server, to_client = self.client.output(), self.server.output()
            if not to_server and not to_client:
                return
            self.server_saw += self.server.receive(to_server)
            self.client_saw += self.client.receive(to_client)

    def events(self) -> list[Event]:
        self.exchange()
        seen, self.server_saw = self.server_saw, []
        return seen


@pytest.fixture
def both() -> Both:
    return Both()


# ------------------------------------------------------------------------------------- frames


def test_dictionary_is_the_specifications() -> None:
    """Its length and check sum as every implementation has them; zlib sends the latter on the wire."""
    assert len(frames.DICTIONARY) == 1423
    assert zlib.adler32(frames.DICTIONARY) == 0xE3C6A7C2
    assert frames.DICTIONARY.startswith(b"\0\0\0\x07options\0\0\0\x04head")
    assert hashlib.sha256(frames.DICTIONARY).hexdigest()[:8] == "51d27341"


@pytest.mark.parametrize(
    ("frame", "bytes"),
    [
        (frames.data(1, b"ab"), "00000001 00000002 6162"),
        (frames.data(5, b"", fin=True), "00000005 01000000"),
        (frames.syn_stream(1, b"BLOCK", fin=True), "80030001 0100000f 00000001 00000000 0000 424c4f434b"),
        (frames.syn_reply(1, b"BLOCK"), "80030002 00000009 00000001 424c4f434b"),
        (frames.rst_stream(3, Status.CANCEL), "80030003 00000008 00000003 00000005"),
        (frames.settings({7: 65536}), "80030004 0000000c 00000001 00000007 00010000"),
        (frames.ping(9), "80030006 00000004 00000009"),
        (frames.go_away(7), "80030007 00000008 00000007 00000000"),
        (frames.window_update(1, 4096), "80030009 00000008 00000001 00001000"),
    ],
)
def test_frames_have_the_bytes_of_the_specification(frame: bytes, bytes: str) -> None:
    assert frame.hex() == bytes.replace(" ", "")


def test_header_blocks_share_one_compression_state() -> None:
    deflater, inflater = frames.HeaderCompressor(), frames.HeaderDecompressor()
    first = deflater.compress({"StreamType": "error", "empty": ""})
    second = deflater.compress({"StreamType": "error", "empty": ""})
    assert len(second) < len(first)
    for block in (first, second):
        assert inflater.decompress(block) == {"streamtype": "error", "empty": ""}


def block_of(plain: bytes) -> bytes:
    deflater = zlib.compressobj(zdict=frames.DICTIONARY)
    return deflater.compress(plain) + deflater.flush(zlib.Z_SYNC_FLUSH)


def test_header_with_several_values_has_the_first() -> None:
    plain = struct.pack(">II1sI3s", 1, 1, b"a", 3, b"x\0y")
    assert frames.HeaderDecompressor().decompress(block_of(plain)) == {"a": "x"}


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"no zlib at all",
        block_of(b""),
        block_of(b"\0\0\0\x01"),
        block_of(struct.pack(">II", 1, 100) + b"short"),
        block_of(struct.pack(">II1sI", 0xFFFFFFFF, 1, b"a", 0xFFFFFFFF)),
        block_of(struct.pack(">II1sI1s", 1, 1, b"\xff", 1, b"a")),
        block_of(bytes(frames.HEADERS_MAX + 1)),
        block_of(bytes(64 << 20)),
    ],
)
def test_malformed_header_block_is_an_error(block: bytes) -> None:
    with pytest.raises(SpdyError):
        frames.HeaderDecompressor().decompress(block)


@pytest.mark.parametrize(
    "bytes",
    [
        frames.control(Kind.PING, b"\0\0\0"),
        frames.control(Kind.RST_STREAM, b""),
        frames.control(Kind.WINDOW_UPDATE, b"\0\0\0\1"),
        frames.control(Kind.SETTINGS, b"\0\0\0\2" + b"\0" * 8),
        frames.control(Kind.SETTINGS, b"\xff\xff\xff\xff"),
        frames.control(Kind.SYN_STREAM, b"\0\0\0\1"),
        b"\x80\x02\x00\x06\x00\x00\x00\x04\x00\x00\x00\x01",
        b"\x80\x03\x00\x06\x00\xff\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
        frames.data(3, b"on no stream"),
    ],
)
def test_malformed_frame_is_an_error(bytes: bytes) -> None:
    with pytest.raises(SpdyError):
        list(SpdyProtocol().receive(bytes))


def test_unknown_control_frame_is_skipped(both: Both) -> None:
    unknown = frames.control(Kind.PING, b"whatever").replace(b"\x80\x03\x00\x06", b"\x80\x03\x00\x0a")
    credential = frames.control(Kind.PING, bytes(10)).replace(b"\x80\x03\x00\x06", b"\x80\x03\x00\x05")
    assert list(both.server.receive(unknown + credential)) == []
    both.client.open({"a": "b"})
    assert both.events() == [SynStream(1, {"a": "b"})]


# ------------------------------------------------------------------------------------ streams


def test_stream_from_syn_stream_to_fin_of_both_ends(both: Both) -> None:
    id = both.client.open({"streamType": "stdin"})
    assert both.events() == [SynStream(1, {"streamtype": "stdin"})]
    both.server.reply(id)
    both.client.send(id, b"question")
    both.client.end(id)
    assert both.events() == [DataReceived(1, b"question"), FinReceived(1)]
    both.server.send(id, b"answer")
    both.server.end(id)
    both.server.end(id)
    both.exchange()
    assert both.client_saw == [DataReceived(1, b"answer"), FinReceived(1)]
    assert not both.server._streams
    assert not both.client._streams
    assert not both.server.is_open(id)


def test_syn_stream_with_fin_opens_and_ends(both: Both) -> None:
    both.client.open({}, fin=True)
    assert both.events() == [SynStream(1, {}), FinReceived(1)]


def test_parts_of_a_data_frame_are_delivered_as_they_arrive(both: Both) -> None:
    both.client.open({})
    both.events()
    frame = frames.data(1, b"abcdef", fin=True)
    seen = [event for at in range(len(frame)) for event in both.server.receive(frame[at : at + 1])]
    assert seen == [*(DataReceived(1, b"%c" % byte) for byte in b"abcdef"), FinReceived(1)]


def test_rst_stream_closes_a_stream_once(both: Both) -> None:
    both.client.open({})
    both.client.open({})
    both.events()
    both.client.reset(1)
    both.server.reset(3)
    assert both.events() == [RstStream(1)]
    assert both.client_saw == [RstStream(3)]
    both.server.reset(3)
    assert both.server.output() == b"", "once is enough"


def test_data_after_rst_stream_is_dropped(both: Both) -> None:
    id = both.client.open({})
    both.events()
    both.server.reset(id)
    both.client.send(id, b"crossing")
    assert both.events() == []


def test_ping_of_the_peer_is_answered_and_a_reply_is_not(both: Both) -> None:
    both.client.ping(1)
    assert list(both.server.receive(both.client.output())) == []
    assert both.server.output() == frames.ping(1)
    assert list(both.server.receive(frames.ping(2))) == []
    assert both.server.output() == b"", "that is the answer to one of ours"


def test_stream_ids_out_of_order_are_accepted(both: Both) -> None:
    """Kubernetes's library numbers them before it queues them."""
    deflater = frames.HeaderCompressor()
    blocks = [frames.syn_stream(id, deflater.compress({"n": str(id)})) for id in (3, 1)]
    assert list(both.server.receive(b"".join(blocks))) == [SynStream(3, {"n": "3"}), SynStream(1, {"n": "1"})]


def test_syn_stream_for_an_open_stream_resets_it(both: Both) -> None:
    deflater = frames.HeaderCompressor()
    twice = b"".join(frames.syn_stream(1, deflater.compress({})) for _ in range(2))
    assert list(both.server.receive(twice)) == [SynStream(1, {}), RstStream(1)]
    assert both.server.output() == frames.rst_stream(1, Status.PROTOCOL_ERROR)


@pytest.mark.parametrize("id", [0, 2])
def test_syn_stream_with_an_id_of_the_server_is_an_error(both: Both, id: int) -> None:
    with pytest.raises(SpdyError):
        list(both.server.receive(frames.syn_stream(id, frames.HeaderCompressor().compress({}))))


def test_streams_beyond_the_limit_are_refused(both: Both) -> None:
    for _ in range(STREAMS_MAX):
        both.client.open({})
    assert len(both.events()) == STREAMS_MAX
    id = both.client.open({"one": "more"})
    assert both.events() == []
    assert both.client_saw == [RstStream(id)]
    both.client.reset(1)
    both.client.open({"again": "other"})
    assert both.events() == [RstStream(1), SynStream(id + 2, {"again": "other"})]


def test_go_away_refuses_later_streams_only(both: Both) -> None:
    id = both.client.open({})
    both.exchange()
    both.server.go_away()
    both.server.go_away()
    both.exchange()
    assert both.client_saw == [GoAway()]
    late = both.client.open({})
    both.client.send(id, b"still heard")
    assert DataReceived(id, b"still heard") in both.events()
    assert both.client_saw == [GoAway(), RstStream(late)]


# -------------------------------------------------------------------------------------- windows


def test_peer_without_flow_control_is_not_limited(both: Both) -> None:
    both.client.open({})
    both.events()
    for _ in range(10):
        both.server.send(1, bytes(both.server.send_capacity(1)))
    assert both.server.send_capacity(1) > 0


@pytest.mark.parametrize("early", [True, False])
def test_peer_with_flow_control_is_limited_by_its_windows(both: Both, early: bool) -> None:
    if early:
        both.client.send_settings()
    both.client.open({})
    both.client.open({})
    both.events()
    if not early:
        assert list(both.server.receive(frames.window_update(0, 1))) == [WindowUpdate()]
    capacity = both.server.send_capacity(1)
    assert capacity == WINDOW
    both.server.send(1, bytes(capacity))
    assert both.server.send_capacity(1) == 0
    assert both.server.send_capacity(3) == (0 if early else 1), "the connection has a window too"
    both.exchange()
    assert both.server.send_capacity(3) == WINDOW, "which is given back at once"
    assert both.server.send_capacity(1) == 0, "and that of a stream by its reader"
    both.client.consumed(1, WINDOW // 2 - 1)
    both.exchange()
    assert both.server.send_capacity(1) == 0, "in large pieces"
    both.client.consumed(1, 1)
    both.exchange()
    assert both.server.send_capacity(1) == WINDOW // 2


def test_data_beyond_the_window_resets_the_stream(both: Both) -> None:
    both.client.send_settings()
    both.client.open({})
    both.client.open({})
    both.events()
    both.client.send(1, bytes(WINDOW))
    both.client.send(1, b"x")
    both.client.send(3, b"alive")
    seen = both.events()
    assert seen[-2:] == [RstStream(1), DataReceived(3, b"alive")]
    assert both.client_saw[-1] == RstStream(1)


def test_settings_change_the_windows_of_open_streams(both: Both) -> None:
    both.client.open({})
    both.events()
    list(both.server.receive(frames.settings({7: 1000})))
    assert both.server.send_capacity(1) == 1000
    both.server.send(1, bytes(900))
    list(both.server.receive(frames.settings({7: 10})))
    assert both.server.send_capacity(1) == 0, "less than was sent already"
    list(both.server.receive(frames.settings({4: 5, 7: 2000})))
    assert both.server.send_capacity(1) == 1100
    both.client.open({})
    both.exchange()
    assert both.server.send_capacity(3) == 2000


def test_window_beyond_its_maximum_is_an_error(both: Both) -> None:
    both.client.open({})
    both.events()
    most = (1 << 31) - 1
    assert RstStream(1) in list(both.server.receive(frames.window_update(1, most)))
    with pytest.raises(SpdyError):
        list(both.server.receive(frames.window_update(0, most)))
    with pytest.raises(SpdyError):
        list(both.server.receive(frames.settings({7: 1 << 31})))


def test_window_update_of_a_closed_stream_is_ignored(both: Both) -> None:
    assert list(both.server.receive(frames.window_update(5, 100))) == [WindowUpdate()]
    both.server.consumed(5, WINDOW)
    assert both.server.output() == b""
