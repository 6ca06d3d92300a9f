"""Decompressing layers: every format, and streams that want too much memory or never end."""

from __future__ import annotations

import gzip
import io
import os
import threading
import time

import pytest
import zstandard

from image.budget import Limits, Stopped, Watch
from image.compression import SMALL_WINDOW, Inflated, LargeWindows
from image.errors import LayerRejected

DATA = os.urandom(100_000) + bytes(300_000)
SKIPPABLE = b"\x50\x2a\x4d\x18\x08\x00\x00\x00" + b"metadata"


def frame(data: bytes, window_log: int = 20) -> bytes:
    """Return a zstd frame with this window, which does not say how long its content is."""
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


def inflated(data: bytes, limits: Limits | None = None, large: LargeWindows | None = None) -> bytes:
    """Decompress as a layer."""
    stream = Inflated(io.BytesIO(data), limits, large=large)
    try:
        return b"".join(stream)
    finally:
        stream.close()


@pytest.mark.parametrize(
    "packed",
    [
        DATA,
        gzip.compress(DATA),
        gzip.compress(DATA[:1000]) + gzip.compress(DATA[1000:]),
        frame(DATA),
        frame(DATA[:1000]) + SKIPPABLE + frame(DATA[1000:]),
        SKIPPABLE + frame(DATA) + SKIPPABLE,
        frame(DATA, 25),
        frame(DATA[:1000]) + frame(DATA[1000:5000], 25) + frame(DATA[5000:]),
    ],
    ids=[
        "plain",
        "gzip",
        "members",
        "zstd",
        "chunked",
        "skippable first",
        "large window",
        "large window later",
    ],
)
def test_every_format_is_decompressed(packed: bytes) -> None:
    assert inflated(packed) == DATA


def test_zstd_window_above_the_limit_is_rejected_with_its_value() -> None:
    with pytest.raises(LayerRejected, match="window bytes: 67108864 is above the limit of 33554432"):
        inflated(frame(DATA, 26))
    assert inflated(frame(DATA, 26), Limits(window_bytes=64 << 20)) == DATA


def test_zstd_window_above_the_limit_in_a_later_frame_is_rejected() -> None:
    with pytest.raises(LayerRejected, match="broken"):
        inflated(frame(DATA) + frame(DATA, 27))


def test_large_window_waits_until_another_one_is_done() -> None:
    large = LargeWindows()
    seen: list[bytes] = []
    thread = threading.Thread(target=lambda: seen.append(inflated(frame(DATA, 25), large=large)))
    with large.hold(lambda: None):
        thread.start()
        assert inflated(frame(DATA, SMALL_WINDOW.bit_length() - 1), large=large) == DATA
        assert seen == []
    thread.join(10)
    assert seen == [DATA]


def test_wait_for_a_large_window_ends_when_it_is_cancelled() -> None:
    large = LargeWindows()
    with large.hold(lambda: None):
        stream = Inflated(io.BytesIO(frame(DATA, 25)), large=large)
        stream.close()


class Endless(io.RawIOBase):
    """A file in which one part is repeated for ever."""

    def __init__(self, part: bytes) -> None:
        self._part = part
        self._at = 0

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        begin = self._at % len(self._part)
        content = self._part * (len(buffer) // len(self._part) + 2)
        buffer[:] = content[begin : begin + len(buffer)]
        self._at += len(buffer)
        return len(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset if whence == os.SEEK_SET else self._at + offset
        return self._at


@pytest.fixture(params=[gzip.compress(b""), SKIPPABLE], ids=["gzip members", "zstd frames"])
def silent(request: pytest.FixtureRequest) -> Endless:
    """A stream that never decompresses to anything."""
    return Endless(request.param)


def test_stream_without_output_ends_when_stop_is_set(silent: Endless) -> None:
    stop = threading.Event()
    stream = Inflated(silent, watch=Watch(Limits(), "unpack_s", stop).check)  # type: ignore[arg-type]
    threading.Timer(0.2, stop.set).start()
    try:
        with pytest.raises(Stopped):
            list(stream)
    finally:
        stream.close()


def test_stream_without_output_ends_at_the_limit_of_time(silent: Endless) -> None:
    begun = time.monotonic()
    stream = Inflated(silent, watch=Watch(Limits(unpack_s=1), "unpack_s").check)  # type: ignore[arg-type]
    try:
        with pytest.raises(LayerRejected, match="unpack seconds: 2 is above the limit of 1"):
            list(stream)
    finally:
        stream.close()
    assert time.monotonic() - begun < 10
