"""The host's frame parser against arbitrary bytes of a guest."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.errors import ProtocolError
from sandbox.guest.frames import MAX_PAYLOAD, FrameParser, Kind, Resync, encode

_CONTROL = st.sampled_from([Kind.HELLO, Kind.WELCOME, Kind.REQUEST, Kind.REPLY, Kind.EVENT])
_STREAM = st.integers(0, 2**32 - 1)
frames = st.one_of(
    st.tuples(_CONTROL, _STREAM, st.binary(max_size=3000)),
    st.tuples(st.just(Kind.DATA), _STREAM, st.binary(min_size=1, max_size=3000)),
    st.tuples(st.just(Kind.WINDOW), _STREAM, st.binary(min_size=4, max_size=4)),
    st.tuples(st.sampled_from([Kind.CLOSE, Kind.RESET]), _STREAM, st.just(b"")),
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Split `data` at these offsets, modulo its length."""
    borders = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(borders)]


@given(st.lists(frames, max_size=12), st.lists(st.integers(0), max_size=30), st.integers(12, 4096))
def test_any_frames_split_anywhere_are_parsed(
    wanted: list[tuple[Kind, int, bytes]], cuts: list[int], capacity: int
) -> None:
    parser = FrameParser(capacity)
    got = []
    for piece in pieces(b"".join(encode(*frame) for frame in wanted), cuts):
        for kind, stream, payload in parser.feed(piece):
            got.append((kind, stream, bytes(payload)))
    assert got == wanted
    assert parser.pending == 0


@settings(max_examples=300)
@given(st.lists(frames, max_size=3), st.binary(max_size=200), st.lists(st.integers(0), max_size=8))
def test_random_bytes_are_refused_or_buffered_within_bounds(
    good: list[tuple[Kind, int, bytes]], garbage: bytes, cuts: list[int]
) -> None:
    parser = FrameParser()
    seen = 0
    try:
        for piece in pieces(b"".join(encode(*frame) for frame in good) + garbage, cuts):
            for frame in parser.feed(piece):
                assert len(frame.payload) <= MAX_PAYLOAD
                seen += 1
    except ProtocolError:
        pass
    else:
        assert 0 < len(parser.buffer()) <= MAX_PAYLOAD + 12
    assert seen >= len(good)


@given(
    st.binary(min_size=16, max_size=16),
    st.binary(max_size=100),
    st.binary(max_size=50),
    st.lists(st.integers(0)),
)
def test_first_nonce_split_anywhere_is_found(
    nonce: bytes, stale: bytes, after: bytes, cuts: list[int]
) -> None:
    stream = stale + nonce + after
    expected = stream[stream.find(nonce) + 16 :]
    resync = Resync(nonce)
    rest = None
    for piece in pieces(stream, cuts):
        if rest is None:
            rest = resync.feed(piece)
        else:
            rest += piece
    assert rest == expected
