"""The bytes of SPDY/3.1, both ways. Pure.

    control   |1|  version 3  |     type     |     data      |0|       stream id            |
              | flags |        length         |    | flags |        length                  |
              | payload ...                        | payload ...

Control frames are small and are parsed once they are whole; the payload of a data frame is handed on
as it comes, so that no frame makes us keep 16 MiB. Header blocks are zlib streams that last as long as
the connection, primed with the dictionary of the SPDY/3 specification.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum

CONTROL_MAX = 64 << 10  # of a control frame's payload; ours stay far below, as do all clients'
HEADERS_MAX = 64 << 10  # of a header block, inflated
DATA_MAX = (1 << 24) - 1
FIN = 0x01
HEADER_BYTES = 8
VERSION = 3
SETTING_INITIAL_WINDOW = 7

_WORDS = (
    "options,head,post,put,delete,trace,accept,accept-charset,accept-encoding,accept-language,accept-ranges,"
    "age,allow,authorization,cache-control,connection,content-base,content-encoding,content-language,"
    "content-length,content-location,content-md5,content-range,content-type,date,etag,expect,expires,from,"
    "host,if-match,if-modified-since,if-none-match,if-range,if-unmodified-since,last-modified,location,"
    "max-forwards,pragma,proxy-authenticate,proxy-authorization,range,referer,retry-after,server,te,trailer,"
    "transfer-encoding,upgrade,user-agent,vary,via,warning,www-authenticate,method,get,status,200 OK,version,"
    "HTTP/1.1,url,public,set-cookie,keep-alive,origin"
)
_REST = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized"
    "403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,"
    "text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)
# Part of the wire format: SPDY/3, "Name/Value Header Block Format".
DICTIONARY = (
    b"".join(struct.pack(">I", len(word)) + word.encode() for word in _WORDS.split(",")) + _REST.encode()
)


class SpdyError(Exception):
    """The peer sent bytes that are no SPDY/3.1; the connection cannot go on."""


class Kind(IntEnum):
    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    HEADERS = 8
    WINDOW_UPDATE = 9


_KINDS = frozenset(Kind)


class Reset(IntEnum):
    PROTOCOL_ERROR = 1
    INVALID_STREAM = 2
    REFUSED_STREAM = 3
    CANCEL = 5
    FLOW_CONTROL_ERROR = 7
    STREAM_IN_USE = 8


Headers = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Control:
    kind: int  # a Kind, of those that are handed on
    flags: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Data:
    """A piece of a data frame; `fin` with the last piece."""

    stream: int
    payload: bytes
    fin: bool


class Parser:
    """Cuts what comes into frames. After a SpdyError it is of no more use."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._stream = 0  # of the data frame under way
        self._fin = False
        self._left = 0  # of its payload

    def feed(self, data: bytes) -> Iterator[Control | Data]:
        """Raises SpdyError. Control frames of an unknown type are skipped, as SPDY wants it."""
        self._buffer += data
        while True:
            frame = self._piece() if self._left else self._frame()
            if frame is None:
                return
            if isinstance(frame, Data) or frame.kind in _KINDS:
                yield frame

    def _piece(self) -> Data | None:
        if not self._buffer:
            return None
        payload = bytes(self._buffer[: self._left])
        del self._buffer[: self._left]
        self._left -= len(payload)
        return Data(self._stream, payload, self._fin and not self._left)

    def _frame(self) -> Control | Data | None:
        if len(self._buffer) < HEADER_BYTES:
            return None
        first, second = struct.unpack_from(">II", self._buffer)
        flags, length = second >> 24, second & 0xFFFFFF
        if not first >> 31:
            return self._begin_data(first, flags, length)
        version, kind = first >> 16 & 0x7FFF, first & 0xFFFF
        if version != VERSION:
            raise SpdyError(f"a frame of version {version}")
        if length > CONTROL_MAX:
            raise SpdyError(f"a control frame of {length} bytes")
        if len(self._buffer) < HEADER_BYTES + length:
            return None
        payload = bytes(self._buffer[HEADER_BYTES : HEADER_BYTES + length])
        del self._buffer[: HEADER_BYTES + length]
        return Control(kind, flags, payload)

    def _begin_data(self, stream: int, flags: int, length: int) -> Data | None:
        del self._buffer[:HEADER_BYTES]
        self._stream, self._fin, self._left = stream, bool(flags & FIN), length
        return Data(stream, b"", self._fin) if length == 0 else self._piece()


class Deflater:
    """Header blocks of one direction, in order."""

    def __init__(self) -> None:
        self._zlib = zlib.compressobj(zdict=DICTIONARY)

    def pack(self, headers: Headers) -> bytes:
        block = bytearray(struct.pack(">I", len(headers)))
        for name, value in headers.items():
            for text in (name.lower(), value):
                encoded = text.encode()
                block += struct.pack(">I", len(encoded)) + encoded
        return self._zlib.compress(bytes(block)) + self._zlib.flush(zlib.Z_SYNC_FLUSH)


class Inflater:
    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(zdict=DICTIONARY)

    def unpack(self, block: bytes) -> Headers:
        """Names in lower case; of several values the first. Raises SpdyError."""
        try:
            plain = self._zlib.decompress(block, HEADERS_MAX)
        except zlib.error as cause:
            raise SpdyError(f"a header block that cannot be inflated: {cause}") from cause
        if self._zlib.unconsumed_tail:
            raise SpdyError(f"a header block of more than {HEADERS_MAX} bytes")
        return _unpack(plain)


def _unpack(plain: bytes) -> Headers:
    headers: dict[str, str] = {}
    try:
        (count,) = struct.unpack_from(">I", plain)
        at = 4
        for _ in range(count):
            name, at = _text(plain, at)
            value, at = _text(plain, at)
            headers.setdefault(name.lower(), value.split("\0", 1)[0])
    except (struct.error, UnicodeDecodeError) as cause:
        raise SpdyError(f"a broken header block: {cause}") from cause
    return headers


def _text(plain: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from(">I", plain, at)
    end = at + 4 + length
    if end > len(plain):
        raise SpdyError("a header block that ends within a header")
    return plain[at + 4 : end].decode(), end


# -------------------------------------------------------------------------------- as written


def control(kind: Kind, payload: bytes, flags: int = 0) -> bytes:
    return struct.pack(">HHI", 0x8000 | VERSION, kind, flags << 24 | len(payload)) + payload


def data(stream: int, payload: bytes | memoryview, fin: bool = False) -> bytes:
    return struct.pack(">II", stream, (FIN if fin else 0) << 24 | len(payload)) + payload


def syn_stream(stream: int, block: bytes, fin: bool = False) -> bytes:
    return control(Kind.SYN_STREAM, struct.pack(">IIBB", stream, 0, 0, 0) + block, FIN if fin else 0)


def syn_reply(stream: int, block: bytes, fin: bool = False) -> bytes:
    return control(Kind.SYN_REPLY, struct.pack(">I", stream) + block, FIN if fin else 0)


def rst_stream(stream: int, status: Reset) -> bytes:
    return control(Kind.RST_STREAM, struct.pack(">II", stream, status))


def ping(id: int) -> bytes:
    return control(Kind.PING, struct.pack(">I", id))


def go_away(last_stream: int) -> bytes:
    return control(Kind.GOAWAY, struct.pack(">II", last_stream, 0))


def window_update(stream: int, delta: int) -> bytes:
    return control(Kind.WINDOW_UPDATE, struct.pack(">II", stream, delta))


def settings(values: Mapping[int, int]) -> bytes:
    entries = b"".join(struct.pack(">II", id, value) for id, value in values.items())
    return control(Kind.SETTINGS, struct.pack(">I", len(values)) + entries)


def words(payload: bytes, count: int) -> tuple[int, ...]:
    """The first `count` 32-bit numbers of a control frame. Raises SpdyError."""
    if len(payload) < 4 * count:
        raise SpdyError(f"a control frame of only {len(payload)} bytes")
    return struct.unpack_from(f">{count}I", payload)
