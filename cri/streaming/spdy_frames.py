"""Frames of SPDY/3.1: parsing and encoding. Pure.

    control   |1|  version 3  |     type     |     data      |0|       stream id            |
              | flags |        length         |    | flags |        length                  |
              | payload ...                        | payload ...

Control frames are small and are parsed once they are complete. The payload of a DATA frame is passed on
as it arrives, so that no frame makes us buffer its 16 MiB. The header blocks of one direction are one zlib
stream for the whole connection, with the dictionary of the SPDY/3 specification.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum

CONTROL_MAX = 64 << 10  # bytes of a control frame's payload; ours and those of all clients are far smaller
HEADERS_MAX = 4 << 10  # bytes of a header block, decompressed; those of clients have about 100
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
    """The peer violated SPDY/3.1; the connection cannot continue."""


class Kind(IntEnum):
    """Types of control frames."""

    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    HEADERS = 8
    WINDOW_UPDATE = 9


_KINDS = frozenset(Kind)


class Status(IntEnum):
    """Status codes of RST_STREAM."""

    PROTOCOL_ERROR = 1
    INVALID_STREAM = 2
    REFUSED_STREAM = 3
    CANCEL = 5
    FLOW_CONTROL_ERROR = 7
    STREAM_IN_USE = 8


Headers = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Control:
    """A complete control frame."""

    kind: int  # the value of a Kind, as the parser skips other types
    flags: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Data:
    """Part of a DATA frame; `fin` is set on its last part if the frame has FLAG_FIN."""

    stream: int
    payload: bytes
    fin: bool


class Parser:
    """Splits received bytes into frames. Unusable after a SpdyError."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._stream = 0  # of the DATA frame whose payload is being received
        self._fin = False
        self._left = 0  # bytes of its payload

    def feed(self, data: bytes) -> Iterator[Control | Data]:
        """Yield the frames that these bytes complete, and the parts of DATA frames in them.

        Control frames of an unknown type are skipped, as the specification requires. Raises SpdyError.
        """
        self._buffer += data
        while True:
            frame = self._data_part() if self._left else self._frame()
            if frame is None:
                return
            if isinstance(frame, Data) or frame.kind in _KINDS:
                yield frame

    def _data_part(self) -> Data | None:
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
            raise SpdyError(f"control frame of SPDY version {version}, expected {VERSION}")
        if length > CONTROL_MAX:
            raise SpdyError(f"control frame of {length} bytes, at most {CONTROL_MAX} are accepted")
        if len(self._buffer) < HEADER_BYTES + length:
            return None
        payload = bytes(self._buffer[HEADER_BYTES : HEADER_BYTES + length])
        del self._buffer[: HEADER_BYTES + length]
        return Control(kind, flags, payload)

    def _begin_data(self, stream: int, flags: int, length: int) -> Data | None:
        del self._buffer[:HEADER_BYTES]
        self._stream, self._fin, self._left = stream, bool(flags & FIN), length
        return Data(stream, b"", self._fin) if length == 0 else self._data_part()


class HeaderCompressor:
    """Compresses the header blocks of one direction. Blocks must be sent in the order of the calls."""

    def __init__(self) -> None:
        self._zlib = zlib.compressobj(zdict=DICTIONARY)

    def compress(self, headers: Headers) -> bytes:
        """Encode names (in lower case) and values as the next header block."""
        block = bytearray(struct.pack(">I", len(headers)))
        for name, value in headers.items():
            for text in (name.lower(), value):
                encoded = text.encode()
                block += struct.pack(">I", len(encoded)) + encoded
        return self._zlib.compress(bytes(block)) + self._zlib.flush(zlib.Z_SYNC_FLUSH)


class HeaderDecompressor:
    """Decompresses the header blocks of one direction, each of them and in order."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(zdict=DICTIONARY)

    def decompress(self, block: bytes) -> Headers:
        """Return the headers with names in lower case, and of several values the first. Raises SpdyError."""
        try:
            plain = self._zlib.decompress(block, HEADERS_MAX)
        except zlib.error as cause:
            raise SpdyError(f"header block cannot be decompressed: {cause}") from cause
        if self._zlib.unconsumed_tail:
            raise SpdyError(f"header block is larger than {HEADERS_MAX} bytes")
        return _parse_headers(plain)


def _parse_headers(plain: bytes) -> Headers:
    headers: dict[str, str] = {}
    try:
        (count,) = struct.unpack_from(">I", plain)
        at = 4
        for _ in range(count):
            name, at = _text(plain, at)
            value, at = _text(plain, at)
            headers.setdefault(name.lower(), value.split("\0", 1)[0])
    except (struct.error, UnicodeDecodeError) as cause:
        raise SpdyError(f"malformed header block: {cause}") from cause
    return headers


def _text(plain: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from(">I", plain, at)
    end = at + 4 + length
    if end > len(plain):
        raise SpdyError("header block ends within a header")
    return plain[at + 4 : end].decode(), end


# ----------------------------------------------------------------------------------- encoding


def control(kind: Kind, payload: bytes, flags: int = 0) -> bytes:
    """Encode a control frame."""
    return struct.pack(">HHI", 0x8000 | VERSION, kind, flags << 24 | len(payload)) + payload


def data(stream: int, payload: bytes | memoryview, fin: bool = False) -> bytes:
    """Encode a DATA frame; the payload has at most DATA_MAX bytes."""
    return struct.pack(">II", stream, (FIN if fin else 0) << 24 | len(payload)) + payload


def syn_stream(stream: int, block: bytes, fin: bool = False) -> bytes:
    """Encode SYN_STREAM without an associated stream and with priority 0."""
    return control(Kind.SYN_STREAM, struct.pack(">IIBB", stream, 0, 0, 0) + block, FIN if fin else 0)


def syn_reply(stream: int, block: bytes, fin: bool = False) -> bytes:
    """Encode SYN_REPLY with a compressed header block."""
    return control(Kind.SYN_REPLY, struct.pack(">I", stream) + block, FIN if fin else 0)


def rst_stream(stream: int, status: Status) -> bytes:
    """Encode RST_STREAM."""
    return control(Kind.RST_STREAM, struct.pack(">II", stream, status))


def ping(id: int) -> bytes:
    """Encode PING."""
    return control(Kind.PING, struct.pack(">I", id))


def go_away(last_stream: int) -> bytes:
    """Encode GOAWAY with status OK; `last_stream` is the last one of the peer that was accepted."""
    return control(Kind.GOAWAY, struct.pack(">II", last_stream, 0))


def window_update(stream: int, delta: int) -> bytes:
    """Encode WINDOW_UPDATE; stream 0 is the connection."""
    return control(Kind.WINDOW_UPDATE, struct.pack(">II", stream, delta))


def settings(values: Mapping[int, int]) -> bytes:
    """Encode SETTINGS with these values by id."""
    entries = b"".join(struct.pack(">II", id, value) for id, value in values.items())
    return control(Kind.SETTINGS, struct.pack(">I", len(values)) + entries)


def uint32s(payload: bytes, count: int) -> tuple[int, ...]:
    """Return the first `count` 32-bit numbers of a control frame's payload. Raises SpdyError."""
    if len(payload) < 4 * count:
        raise SpdyError(f"control frame of {len(payload)} bytes, at least {4 * count} are needed")
    return struct.unpack_from(f">{count}I", payload)
