"""Frames: the encoder writes the layout of frames.py, and the parser accepts nothing else."""

from __future__ import annotations

import struct

import pytest

from sandbox.errors import ProtocolError
from sandbox.guest.frames import (
    BUFFER_BYTES,
    MAX_DATA,
    MAX_EVENT,
    MAX_PAYLOAD,
    MAX_STALE,
    MAX_WELCOME,
    Frame,
    FrameParser,
    Kind,
    Resync,
    decode_credit,
    encode,
    encode_credit,
    header,
    preamble,
)


def parse(parser: FrameParser, data: bytes) -> list[tuple[Kind, int, bytes]]:
    """Feed bytes; return the frames with copies of their payloads."""
    return [(kind, stream, bytes(payload)) for kind, stream, payload in parser.feed(data)]


def test_encoded_frames_have_the_documented_layout() -> None:
    assert encode(Kind.DATA, 0x01020304, b"ab") == bytes.fromhex("02000000 06 000000 04030201 6162")
    assert encode(Kind.CLOSE, 7) == bytes.fromhex("00000000 08 000000 07000000")
    assert encode_credit(7, 258) == bytes.fromhex("04000000 07 000000 07000000 02010000")
    assert decode_credit(memoryview(b"\x02\x01\0\0")) == 258


def test_preamble_is_token_then_nonce() -> None:
    assert preamble(b"t" * 16, b"n" * 16) == b"t" * 16 + b"n" * 16
    with pytest.raises(ValueError, match="token of 3"):
        preamble(b"ttt", b"n" * 16)


def test_frames_split_at_any_size_are_parsed() -> None:
    frames = [(Kind.REPLY, 1, b"x" * 300), (Kind.CLOSE, 2, b""), (Kind.DATA, 3, b"y")]
    stream = b"".join(encode(*frame) for frame in frames)
    for size in (1, 2, 11, 12, 13, 300, len(stream)):
        parser = FrameParser()
        got = []
        for at in range(0, len(stream), size):
            got += parse(parser, stream[at : at + size])
        assert got == frames
        assert parser.pending == 0


def test_largest_frame_is_parsed_and_the_buffer_shrinks_again() -> None:
    parser = FrameParser()
    big = encode(Kind.REPLY, 1, bytes(MAX_PAYLOAD))
    assert [len(payload) for _, _, payload in parse(parser, big)] == [MAX_PAYLOAD]
    assert parse(parser, big[:100]) == []
    assert len(parse(parser, big[100:] + encode(Kind.CLOSE, 1) + big[:5])) == 2
    assert parse(parser, big[5:] + encode(Kind.CLOSE, 9))[-1] == (Kind.CLOSE, 9, b"")
    assert len(parser.buffer()) == BUFFER_BYTES


def test_payload_is_a_view_of_the_buffer() -> None:
    parser = FrameParser()
    data = encode(Kind.DATA, 1, b"abc")
    space = parser.buffer()
    space[: len(data)] = data
    (frame,) = parser.received(len(data))
    assert isinstance(frame.payload, memoryview)
    assert frame.payload.obj is space.obj


@pytest.mark.parametrize(
    ("length", "kind"),
    [
        (0, 0),
        (0, 10),
        (0, 255),
        (0, 0x0106),  # a byte that must be zero
        (MAX_PAYLOAD + 1, Kind.REPLY),
        (0xFFFFFFFF, Kind.EVENT),
        (MAX_WELCOME + 1, Kind.WELCOME),
        (MAX_EVENT + 1, Kind.EVENT),
        (MAX_DATA + 1, Kind.DATA),
        (0, Kind.DATA),
        (3, Kind.WINDOW),
        (5, Kind.WINDOW),
        (1, Kind.CLOSE),
        (1, Kind.RESET),
    ],
)
def test_invalid_header_is_refused_before_its_payload(length: int, kind: int) -> None:
    parser = FrameParser()
    good: list[Frame] = []
    with pytest.raises(ProtocolError, match=f"kind {kind:#x} with {length} bytes"):
        good.extend(parser.feed(encode(Kind.CLOSE, 1) + struct.pack("<III", length, kind, 1)))
    assert [frame.stream for frame in good] == [1]


def test_header_with_an_invalid_length_is_refused() -> None:
    for kind, length in ((Kind.DATA, MAX_DATA + 1), (Kind.DATA, 0), (Kind.REQUEST, MAX_PAYLOAD + 1)):
        with pytest.raises(ValueError, match=kind.name):
            header(kind, 1, length)


def test_nonce_split_at_any_size_is_found() -> None:
    nonce = bytes(range(16))
    stale = b"old bytes" + nonce[:9] + nonce[:15]
    stream = stale + nonce + b"frames"
    for size in range(1, len(stream) + 1):
        resync = Resync(nonce)
        for at in range(0, len(stream), size):
            rest = resync.feed(memoryview(stream)[at : at + size])
            if rest is not None:
                assert rest + stream[at + size :] == b"frames"
                break
        else:
            pytest.fail(f"nonce not found in pieces of {size}")


def test_endless_bytes_without_the_nonce_are_refused() -> None:
    resync = Resync(bytes(16))
    piece = b"x" * (1 << 20)
    with pytest.raises(ProtocolError, match="no answer to the preamble"):
        for _ in range((MAX_STALE >> 20) + 1):
            assert resync.feed(piece) is None
