"""Frames: the byte layout of the channel between host and agent (as drawn in `agent/frame.h`). Pure.

A new connection starts with the host's preamble and the guest's echo of its second half:

    host -> guest   | token 16 | nonce 16 |
    guest -> host   (rest of what was queued for an older connection) | nonce 16 |

The token is what the guest read first after boot. Wherever it occurs in the stream, even inside a frame that
a dead daemon left half sent, the guest starts a new connection. The nonce is new for each connection; the
host drops everything before it (`Resync`). From then on both send frames:

    byte  0        4      5          8          12                 12 + length
          | length | kind | 0  0  0  |  stream  |  payload ...     |
            u32 LE   u8     u8 * 3      u32 LE

    kind      stream       payload
    1 HELLO   0            Hello     host to guest, first
    2 WELCOME 0            Welcome   guest to host, first
    3 REQUEST request id   Request   host to guest, id nonzero
    4 REPLY   request id   Reply     guest to host, in any order
    5 EVENT   0            Event     guest to host
    6 DATA    stream       1 to 65536 bytes
    7 WINDOW  stream       u32 LE: this many more bytes may be sent on this stream
    8 CLOSE   stream       empty: the sender has finished
    9 RESET   stream       empty: the receiver has stopped reading

Streams have one direction and are numbered by the host. A sender never sends more than the credit that it
was granted, so a reader that stops blocks its own stream and no other.

Every length and kind is checked before its payload is buffered: the guest is hostile.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from sandbox.errors import ProtocolError

VERSION = 2  # of the protocol: the highest that this daemon speaks
MIN_VERSION = 2  # and the lowest
TOKEN_BYTES = 16
NONCE_BYTES = 16
MAX_PAYLOAD = 4 << 20
MAX_DATA = 64 << 10
MAX_WELCOME = 256 << 10  # above 1,000 containers; parsing 4 MiB would delay the calls of all pods
MAX_EVENT = 4 << 10
MAX_STALE = 64 << 20  # bytes before the nonce; far above what any transport can buffer
BUFFER_BYTES = 128 << 10  # two full DATA frames; also the most that one read returns

_HEADER = struct.Struct("<III")  # length; kind and its three zero bytes in one; stream
HEADER_BYTES = _HEADER.size
_CREDIT = struct.Struct("<I")


class Kind(IntEnum):
    """What a frame carries."""

    HELLO = 1
    WELCOME = 2
    REQUEST = 3
    REPLY = 4
    EVENT = 5
    DATA = 6
    WINDOW = 7
    CLOSE = 8
    RESET = 9


# Bounds of the payload's length by kind; 0 is not a valid kind.
_LEAST = (1, 0, 0, 0, 0, 0, 1, 4, 0, 0)
_MOST = (0, MAX_PAYLOAD, MAX_WELCOME, MAX_PAYLOAD, MAX_PAYLOAD, MAX_EVENT, MAX_DATA, 4, 0, 0)
_KINDS = (Kind.HELLO, *Kind)  # by number: calling the enum for each frame is slow


class Frame(NamedTuple):
    """A whole frame. `stream` is the request's id in REQUEST and REPLY."""

    kind: Kind
    stream: int
    payload: memoryview | bytes


def header(kind: Kind, stream: int, length: int) -> bytes:
    """Return a frame's header. Raises ValueError when the kind does not allow a payload of this length."""
    if not _LEAST[kind] <= length <= _MOST[kind]:
        raise ValueError(f"{kind.name} frame with {length} bytes")
    return _HEADER.pack(length, kind, stream)


def encode(kind: Kind, stream: int = 0, payload: bytes | memoryview = b"") -> bytes:
    """Return a whole frame. For DATA, sending `header` and the payload separately saves a copy."""
    return header(kind, stream, len(payload)) + bytes(payload)


def encode_credit(stream: int, credit: int) -> bytes:
    """Return a WINDOW frame that grants `credit` more bytes."""
    return encode(Kind.WINDOW, stream, _CREDIT.pack(credit))


def decode_credit(payload: memoryview | bytes) -> int:
    """Return the bytes that a WINDOW frame's payload grants."""
    credit: int = _CREDIT.unpack(payload)[0]
    return credit


def preamble(token: bytes, nonce: bytes) -> bytes:
    """Return the first bytes of a connection. Raises ValueError if one is not 16 bytes long."""
    if len(token) != TOKEN_BYTES or len(nonce) != NONCE_BYTES:
        raise ValueError(f"token of {len(token)} and nonce of {len(nonce)} bytes")
    return token + nonce


class FrameParser:
    """Splits a stream of bytes into frames.

    Bytes are read straight into `buffer()`, and payloads are views of it: a payload is valid until `buffer`
    is called again, and must be copied to be kept longer. All frames must be consumed before more bytes are
    added. After a ProtocolError the parser must not be used any more.
    """

    def __init__(self, capacity: int = BUFFER_BYTES) -> None:
        self._capacity = max(capacity, HEADER_BYTES)
        self._space = memoryview(bytearray(self._capacity))
        self._start = 0  # of the first byte that was not yielded yet
        self._end = 0
        self._need = HEADER_BYTES  # length of the incomplete frame, as far as it is known

    @property
    def pending(self) -> int:
        """Bytes of an incomplete frame; 0 between frames."""
        return self._end - self._start

    def buffer(self) -> memoryview:
        """Return space for the next bytes: never empty, and enough for the rest of the incomplete frame."""
        kept = self._end - self._start
        size = max(self._capacity, self._need)
        if kept == 0:
            self._start = self._end = 0
        if len(self._space) != size:  # grows for a large message, and shrinks after it
            self._move(bytearray(size))
        elif self._start + self._need > size:
            self._move(self._space.obj)
        return self._space[self._end :]

    def _move(self, to: object) -> None:
        kept = bytes(self._space[self._start : self._end])  # less than one frame
        assert isinstance(to, bytearray)
        self._space = memoryview(to)
        self._space[: len(kept)] = kept
        self._start, self._end = 0, len(kept)

    def received(self, count: int) -> Iterator[Frame]:
        """Yield the frames that `count` more bytes in the buffer complete. Raises ProtocolError."""
        self._end += count
        space = self._space
        while self._end - self._start >= HEADER_BYTES:
            length, kind, stream = _HEADER.unpack_from(space, self._start)
            if not (0 < kind < 10 and _LEAST[kind] <= length <= _MOST[kind]):
                raise ProtocolError(f"the guest sent a frame of kind {kind:#x} with {length} bytes")
            self._need = HEADER_BYTES + length
            if self._end - self._start < self._need:
                return
            begin = self._start + HEADER_BYTES
            self._start += self._need
            self._need = HEADER_BYTES
            yield Frame(_KINDS[kind], stream, space[begin : begin + length])

    def feed(self, data: bytes | memoryview) -> Iterator[Frame]:
        """Copy bytes into the buffer and yield frames as `received` does. Raises ProtocolError."""
        rest = memoryview(data)
        while rest:
            space = self.buffer()
            count = min(len(space), len(rest))
            space[:count] = rest[:count]
            rest = rest[count:]
            yield from self.received(count)


class Resync:
    """Finds our nonce in what the guest sends, however it is split into pieces."""

    def __init__(self, nonce: bytes) -> None:
        self._nonce = nonce
        self._tail = b""
        self._dropped = 0

    def feed(self, data: bytes | memoryview) -> bytes | None:
        """Return the bytes after the nonce, or None while it has not come.

        Raises ProtocolError after MAX_STALE bytes without it.
        """
        seen = self._tail + bytes(data)
        at = seen.find(self._nonce)
        if at >= 0:
            return seen[at + len(self._nonce) :]
        self._tail = seen[-(len(self._nonce) - 1) :]
        self._dropped += len(data)
        if self._dropped > MAX_STALE:
            raise ProtocolError(f"the guest sent {self._dropped} bytes and no answer to the preamble")
        return None
