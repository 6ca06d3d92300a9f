"""The bytes between host and agent (`agent/frame.h` draws the same). Pure.

A new connection begins with a preamble of the host and the guest's echo of its second half:

    host -> guest   | token 16 | nonce 16 |
    guest -> host   (whatever it still owed to an older connection) | nonce 16 |

The token is what the guest read first after boot. Wherever it turns up in the stream, even inside
a frame that a dead daemon left half sent, the guest starts afresh. The nonce is new for each
connection; the host drops everything in front of it (`Resync`). From then on both send frames:

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
    7 WINDOW  stream       u32 LE: so many bytes more may be sent on this stream
    8 CLOSE   stream       empty: the sender has no more
    9 RESET   stream       empty: the receiver wants no more

Streams have one direction and are numbered by the host. A sender never sends more than the credit
that it was given, so a reader that stopped blocks its own stream and nothing else.

Every length and kind is checked before a byte of the payload is waited for: the guest is hostile.
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
MAX_STALE = 64 << 20  # bytes in front of the nonce; far above what any transport can hold back
BUFFER_BYTES = 128 << 10  # two full DATA frames; also what one read may bring to the event loop

_HEADER = struct.Struct("<III")  # length; kind and its three zero bytes in one; stream
HEADER_BYTES = _HEADER.size
_CREDIT = struct.Struct("<I")


class Kind(IntEnum):
    HELLO = 1
    WELCOME = 2
    REQUEST = 3
    REPLY = 4
    EVENT = 5
    DATA = 6
    WINDOW = 7
    CLOSE = 8
    RESET = 9


# Bounds of the payload by kind; index 0 is no kind at all.
_LEAST = (1, 0, 0, 0, 0, 0, 1, 4, 0, 0)
_MOST = (0, *[MAX_PAYLOAD] * 5, MAX_DATA, 4, 0, 0)
_KINDS = (Kind.HELLO, *Kind)  # by number, without the cost of calling the enum for each frame


class Frame(NamedTuple):
    kind: Kind
    stream: int
    payload: memoryview | bytes


def header(kind: Kind, stream: int, length: int) -> bytes:
    """Raises ValueError when a payload of this length must not be sent in such a frame."""
    if not _LEAST[kind] <= length <= _MOST[kind]:
        raise ValueError(f"{kind.name} frame with {length} bytes")
    return _HEADER.pack(length, kind, stream)


def encode(kind: Kind, stream: int = 0, payload: bytes | memoryview = b"") -> bytes:
    """One whole frame. For DATA, `header` and the payload side by side save a copy."""
    return header(kind, stream, len(payload)) + bytes(payload)


def encode_credit(stream: int, credit: int) -> bytes:
    return encode(Kind.WINDOW, stream, _CREDIT.pack(credit))


def decode_credit(payload: memoryview | bytes) -> int:
    credit: int = _CREDIT.unpack(payload)[0]
    return credit


def preamble(token: bytes, nonce: bytes) -> bytes:
    if len(token) != TOKEN_BYTES or len(nonce) != NONCE_BYTES:
        raise ValueError(f"token of {len(token)} and nonce of {len(nonce)} bytes")
    return token + nonce


class FrameParser:
    """Cuts a stream of bytes into frames.

    Bytes are read straight into `buffer()`, and payloads are views of it: a payload is good until
    `buffer` is called again, whoever keeps it longer copies it. Frames must be taken to the end
    before more bytes are brought. After a ProtocolError the parser is of no more use.
    """

    def __init__(self, capacity: int = BUFFER_BYTES) -> None:
        self._capacity = max(capacity, HEADER_BYTES)
        self._space = memoryview(bytearray(self._capacity))
        self._start = 0  # of the first byte not yet handed out
        self._end = 0
        self._need = HEADER_BYTES  # length of the frame under way, as far as it is known

    @property
    def pending(self) -> int:
        """Bytes of a frame that is not whole yet; 0 at a frame's border."""
        return self._end - self._start

    def buffer(self) -> memoryview:
        """Room for the next bytes, never empty, enough for the rest of the frame under way."""
        kept = self._end - self._start
        size = max(self._capacity, self._need)
        if kept == 0:
            self._start = self._end = 0
        if len(self._space) != size:  # a large message comes, or has passed
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
        """The frames that became whole by `count` more bytes in the buffer. Raises ProtocolError."""
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
        """As `received`, for bytes that are already elsewhere. Raises ProtocolError."""
        rest = memoryview(data)
        while rest:
            room = self.buffer()
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            rest = rest[count:]
            yield from self.received(count)


class Resync:
    """Finds our nonce in what the guest sends, wherever the pieces are cut."""

    def __init__(self, nonce: bytes) -> None:
        self._nonce = nonce
        self._tail = b""
        self._dropped = 0

    def feed(self, data: bytes | memoryview) -> bytes | None:
        """What follows the nonce, or None while it was not seen.

        Raises ProtocolError when more came in front of it than any old connection can have owed.
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
