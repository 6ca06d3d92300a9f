"""One end of a SPDY/3.1 connection: streams, their credit, and the answers that the protocol itself
asks for. Pure: bytes come by `receive`, and what is to be sent is fetched by `output`.

Credit. Each stream has a window of its own towards us, given back as its reader takes bytes; the
window of the whole connection is given back at once, so that a stopped reader stops its own stream
only. Towards the peer we keep to its windows if it has any: the library behind kubelet, kubectl and
crictl neither sends WINDOW_UPDATE nor minds ours, and would stall for ever at 64 KiB. A peer that
counts says so, with SETTINGS in front of its first stream or with its first WINDOW_UPDATE; for the
others the connection's own back-pressure is all there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cri.streaming import spdy_frames as frames
from cri.streaming.spdy_frames import Control, Data, Headers, Kind, Reset, SpdyError

WINDOW = 64 << 10  # the protocol's own, of a stream and of the connection
WINDOW_MAX = (1 << 31) - 1
STREAMS_MAX = 2048
_UPDATE_AT = WINDOW // 2
_ANY = 64 << 10  # what may be sent at once to a peer without windows


@dataclass(frozen=True, slots=True)
class Opened:
    stream: int
    headers: Headers


@dataclass(frozen=True, slots=True)
class Received:
    stream: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """The peer has no more on this stream."""

    stream: int


@dataclass(frozen=True, slots=True)
class Broken:
    """The stream is gone, in both directions."""

    stream: int


@dataclass(frozen=True, slots=True)
class Widened:
    """Some stream may send more than before."""


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer opens no more streams."""


Event = Opened | Received | Ended | Broken | Widened | GoneAway


@dataclass(slots=True)
class _Stream:
    send_window: int
    receive_window: int = WINDOW
    owed: int = 0  # taken by the reader, and not given back yet
    sent_fin: bool = False
    got_fin: bool = False


class Spdy:
    """`client` opens streams, the other end answers them; only tests are clients."""

    def __init__(self, *, client: bool = False) -> None:
        self._parser = frames.Parser()
        self._inflater = frames.Inflater()
        self._deflater = frames.Deflater()
        self._out: list[bytes] = []
        self._streams: dict[int, _Stream] = {}
        self._own_parity = 1 if client else 0
        self._next = 1 if client else 2
        self._last_opened = 0  # by the peer
        self._initial_window = WINDOW
        self._send_window = WINDOW
        self._owed = 0
        self._counts = client  # the peer minds windows
        self._leaving = False

    # ----------------------------------------------------------------------------------- in

    def receive(self, data: bytes) -> Iterator[Event]:
        """What these bytes mean. Raises SpdyError, after which nothing more can be understood."""
        for frame in self._parser.feed(data):
            if isinstance(frame, Data):
                yield from self._on_data(frame)
            else:
                yield from self._on_control(frame)

    def _on_data(self, frame: Data) -> Iterator[Event]:
        self._give_back_connection(len(frame.payload))
        if frame.stream > max(self._last_opened, self._next):
            raise SpdyError(f"data on stream {frame.stream}, which never was")
        stream = self._streams.get(frame.stream)
        if stream is None or stream.got_fin:
            return  # of a stream that has ended here; it may have been under way
        stream.receive_window -= len(frame.payload)
        if stream.receive_window < 0 and self._counts:
            self.reset(frame.stream, Reset.FLOW_CONTROL_ERROR)
            yield Broken(frame.stream)
            return
        if frame.payload:
            yield Received(frame.stream, frame.payload)
        if frame.fin:
            yield from self._on_fin(frame.stream)

    def _on_fin(self, id: int) -> Iterator[Event]:
        stream = self._streams.get(id)  # whoever took the last event may have ended it
        if stream is not None and not stream.got_fin:
            stream.got_fin = True
            self._forget_ended(id)
            yield Ended(id)

    def _on_control(self, frame: Control) -> Iterator[Event]:
        match frame.kind:
            case Kind.SYN_STREAM:
                yield from self._on_syn_stream(frame)
            case Kind.SYN_REPLY | Kind.HEADERS:
                yield from self._on_headers(frame)
            case Kind.RST_STREAM:
                (id,) = frames.words(frame.payload, 1)
                if self._streams.pop(id, None) is not None:
                    yield Broken(id)
            case Kind.PING:
                (id,) = frames.words(frame.payload, 1)
                if id % 2 != self._own_parity:  # else an answer to one of ours
                    self._out.append(frames.ping(id))
            case Kind.GOAWAY:
                yield GoneAway()
            case Kind.SETTINGS:
                yield from self._on_settings(frame.payload)
            case Kind.WINDOW_UPDATE:
                yield from self._on_window_update(*frames.words(frame.payload, 2))

    def _on_syn_stream(self, frame: Control) -> Iterator[Event]:
        (id,) = frames.words(frame.payload, 1)
        id &= 0x7FFFFFFF
        # even of a stream that is refused: the next block builds on this one
        headers = self._inflater.unpack(frame.payload[10:])
        if id == 0 or id % 2 == self._own_parity:
            raise SpdyError(f"stream {id} is not the peer's to open")
        if id in self._streams:
            self.reset(id, Reset.PROTOCOL_ERROR)
            yield Broken(id)
            return
        if self._leaving or len(self._streams) >= STREAMS_MAX:
            self._out.append(frames.rst_stream(id, Reset.REFUSED_STREAM))
            return
        self._last_opened = max(self._last_opened, id)
        self._streams[id] = _Stream(self._initial_window)
        yield Opened(id, headers)
        if frame.flags & frames.FIN:
            yield from self._on_fin(id)

    def _on_headers(self, frame: Control) -> Iterator[Event]:
        (id,) = frames.words(frame.payload, 1)
        self._inflater.unpack(frame.payload[4:])
        if frame.flags & frames.FIN:
            yield from self._on_fin(id)

    def _on_settings(self, payload: bytes) -> Iterator[Event]:
        (count,) = frames.words(payload, 1)
        if count * 8 > len(payload) - 4:
            raise SpdyError(f"a settings frame that ends before its {count} entries")
        entries = frames.words(payload, 1 + 2 * count)[1:]
        self._counts = True
        for id, value in zip(entries[::2], entries[1::2], strict=True):
            if id & 0xFFFFFF == frames.SETTING_INITIAL_WINDOW:
                if value > WINDOW_MAX:
                    raise SpdyError(f"an initial window of {value}")
                for stream in self._streams.values():
                    stream.send_window += value - self._initial_window
                self._initial_window = value
        yield Widened()

    def _on_window_update(self, id: int, delta: int) -> Iterator[Event]:
        self._counts = True
        id, delta = id & 0x7FFFFFFF, delta & 0x7FFFFFFF
        if id == 0:
            self._send_window += delta
            if self._send_window > WINDOW_MAX:
                raise SpdyError("the window of the connection is beyond its bound")
        elif (stream := self._streams.get(id)) is not None:
            stream.send_window += delta
            if stream.send_window > WINDOW_MAX:
                self.reset(id, Reset.FLOW_CONTROL_ERROR)
                yield Broken(id)
        yield Widened()

    def _give_back_connection(self, count: int) -> None:
        self._owed += count
        if self._owed >= _UPDATE_AT:
            self._out.append(frames.window_update(0, self._owed))
            self._owed = 0

    # ---------------------------------------------------------------------------------- out

    def output(self) -> bytes:
        """What is to be sent now; each byte is handed out once."""
        out, self._out = b"".join(self._out), []
        return out

    def begin(self, initial_window: int = WINDOW) -> None:
        """Say that we mind windows."""
        self._out.append(frames.settings({frames.SETTING_INITIAL_WINDOW: initial_window}))

    def open(self, headers: Headers, *, fin: bool = False) -> int:
        id, self._next = self._next, self._next + 2
        self._streams[id] = _Stream(self._initial_window, sent_fin=fin)
        self._out.append(frames.syn_stream(id, self._deflater.pack(headers), fin))
        return id

    def reply(self, id: int) -> None:
        if id in self._streams:
            self._out.append(frames.syn_reply(id, self._deflater.pack({})))

    def is_open(self, id: int) -> bool:
        """Something may still be sent on it."""
        stream = self._streams.get(id)
        return stream is not None and not stream.sent_fin

    def room(self, id: int) -> int:
        """How many bytes may be sent on it now."""
        if not self.is_open(id):
            return 0
        if not self._counts:
            return _ANY
        return max(0, min(self._streams[id].send_window, self._send_window))

    def send(self, id: int, data: bytes | memoryview) -> None:
        """At most `room` bytes."""
        stream = self._streams[id]
        stream.send_window -= len(data)
        self._send_window -= len(data)
        self._out.append(frames.data(id, data))

    def end(self, id: int) -> None:
        """No more from us. Idempotent."""
        if self.is_open(id):
            self._out.append(frames.data(id, b"", fin=True))
            self._streams[id].sent_fin = True
            self._forget_ended(id)

    def reset(self, id: int, status: Reset = Reset.CANCEL) -> None:
        """End both directions of a stream. Idempotent."""
        if self._streams.pop(id, None) is not None:
            self._out.append(frames.rst_stream(id, status))

    def taken(self, id: int, count: int) -> None:
        """The reader of a stream has dealt with so much."""
        stream = self._streams.get(id)
        if stream is None or stream.got_fin:
            return
        stream.owed += count
        if stream.owed >= _UPDATE_AT:
            self._out.append(frames.window_update(id, stream.owed))
            stream.receive_window += stream.owed
            stream.owed = 0

    def ping(self, id: int) -> None:
        self._out.append(frames.ping(id))

    def go_away(self) -> None:
        """Take no more streams. Idempotent."""
        if not self._leaving:
            self._leaving = True
            self._out.append(frames.go_away(self._last_opened))

    def _forget_ended(self, id: int) -> None:
        stream = self._streams[id]
        if stream.sent_fin and stream.got_fin:
            del self._streams[id]
