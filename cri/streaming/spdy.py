"""One end of a SPDY/3.1 connection: its streams, their flow control, and the frames that the protocol
requires in response (PING, RST_STREAM, WINDOW_UPDATE). Does no I/O: `receive` takes bytes and yields events,
`output` returns the bytes to send.

Flow control. Received data is credited per stream, with WINDOW_UPDATE once its reader has consumed it; the
window of the whole connection is credited on receipt, so a stopped reader stops its own stream only. Data
that we send respects the peer's windows if it has any: the library of kubelet, kubectl and crictl neither
sends WINDOW_UPDATE nor respects ours, and would stall for ever at 64 KiB. A peer with flow control shows it
by SETTINGS before its first stream or by its first WINDOW_UPDATE; towards the others only the TCP
connection's back-pressure limits us.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cri.streaming import spdy_frames as frames
from cri.streaming.spdy_frames import Control, Data, Headers, Kind, SpdyError, Status

WINDOW = 64 << 10  # SPDY's default, of a stream and of the connection
WINDOW_MAX = (1 << 31) - 1
STREAMS_MAX = 2048
_UPDATE_AT = WINDOW // 2  # bytes to credit in one WINDOW_UPDATE
_CAPACITY_WITHOUT_WINDOWS = 64 << 10  # of one send to a peer without flow control


@dataclass(frozen=True, slots=True)
class SynStream:
    """The peer opened a stream."""

    stream: int
    headers: Headers


@dataclass(frozen=True, slots=True)
class DataReceived:
    """Part of a DATA frame of a stream; never empty."""

    stream: int
    data: bytes


@dataclass(frozen=True, slots=True)
class FinReceived:
    """The peer sends no more on this stream (FLAG_FIN)."""

    stream: int


@dataclass(frozen=True, slots=True)
class RstStream:
    """The stream is closed in both directions, by the peer or for an error of the peer."""

    stream: int


@dataclass(frozen=True, slots=True)
class WindowUpdate:
    """`send_capacity` of some stream may have grown."""


@dataclass(frozen=True, slots=True)
class GoAway:
    """The peer opens no more streams."""


Event = SynStream | DataReceived | FinReceived | RstStream | WindowUpdate | GoAway


@dataclass(slots=True)
class _Stream:
    send_window: int
    receive_window: int = WINDOW
    consumed: int = 0  # by the reader, and not credited by WINDOW_UPDATE yet
    sent_fin: bool = False
    received_fin: bool = False


class SpdyProtocol:
    """Protocol state of one end. `client` opens streams and the other end replies; only tests are clients."""

    def __init__(self, *, client: bool = False) -> None:
        self._parser = frames.Parser()
        self._decompressor = frames.HeaderDecompressor()
        self._compressor = frames.HeaderCompressor()
        self._out: list[bytes] = []
        self._streams: dict[int, _Stream] = {}
        self._own_parity = 1 if client else 0
        self._next_id = 1 if client else 2
        self._last_peer_id = 0
        self._initial_window = WINDOW
        self._send_window = WINDOW
        self._received = 0  # on the connection, and not credited yet
        self._peer_has_windows = client
        self._going_away = False

    # ------------------------------------------------------------------------------- receiving

    def receive(self, data: bytes) -> Iterator[Event]:
        """Parse received bytes into events. Raises SpdyError, after which the connection is unusable."""
        for frame in self._parser.feed(data):
            if isinstance(frame, Data):
                yield from self._on_data(frame)
            else:
                yield from self._on_control(frame)

    def _on_data(self, frame: Data) -> Iterator[Event]:
        self._credit_connection(len(frame.payload))
        if frame.stream > max(self._last_peer_id, self._next_id):
            raise SpdyError(f"DATA for stream {frame.stream}, which was never opened")
        stream = self._streams.get(frame.stream)
        if stream is None or stream.received_fin:
            return  # sent before the peer learned that the stream is closed
        stream.receive_window -= len(frame.payload)
        if stream.receive_window < 0 and self._peer_has_windows:
            self.reset(frame.stream, Status.FLOW_CONTROL_ERROR)
            yield RstStream(frame.stream)
            return
        if frame.payload:
            yield DataReceived(frame.stream, frame.payload)
        if frame.fin:
            yield from self._on_fin(frame.stream)

    def _on_fin(self, id: int) -> Iterator[Event]:
        stream = self._streams.get(id)  # the consumer of the last event may have closed it
        if stream is not None and not stream.received_fin:
            stream.received_fin = True
            self._drop_if_closed(id)
            yield FinReceived(id)

    def _on_control(self, frame: Control) -> Iterator[Event]:
        match frame.kind:
            case Kind.SYN_STREAM:
                yield from self._on_syn_stream(frame)
            case Kind.SYN_REPLY | Kind.HEADERS:
                yield from self._on_headers(frame)
            case Kind.RST_STREAM:
                (id,) = frames.uint32s(frame.payload, 1)
                if self._streams.pop(id, None) is not None:
                    yield RstStream(id)
            case Kind.PING:
                (id,) = frames.uint32s(frame.payload, 1)
                if id % 2 != self._own_parity:  # otherwise it answers a PING of ours
                    self._out.append(frames.ping(id))
            case Kind.GOAWAY:
                yield GoAway()
            case Kind.SETTINGS:
                yield from self._on_settings(frame.payload)
            case Kind.WINDOW_UPDATE:
                yield from self._on_window_update(*frames.uint32s(frame.payload, 2))

    def _on_syn_stream(self, frame: Control) -> Iterator[Event]:
        (id,) = frames.uint32s(frame.payload, 1)
        id &= 0x7FFFFFFF
        # also for a stream that is refused: the next block depends on the state after this one
        headers = self._decompressor.decompress(frame.payload[10:])
        if id == 0 or id % 2 == self._own_parity:
            raise SpdyError(f"SYN_STREAM with id {id}, which the peer may not use")
        if id in self._streams:
            self.reset(id, Status.PROTOCOL_ERROR)
            yield RstStream(id)
            return
        if self._going_away or len(self._streams) >= STREAMS_MAX:
            self._out.append(frames.rst_stream(id, Status.REFUSED_STREAM))
            return
        self._last_peer_id = max(self._last_peer_id, id)
        self._streams[id] = _Stream(self._initial_window)
        yield SynStream(id, headers)
        if frame.flags & frames.FIN:
            yield from self._on_fin(id)

    def _on_headers(self, frame: Control) -> Iterator[Event]:
        (id,) = frames.uint32s(frame.payload, 1)
        self._decompressor.decompress(frame.payload[4:])
        if frame.flags & frames.FIN:
            yield from self._on_fin(id)

    def _on_settings(self, payload: bytes) -> Iterator[Event]:
        (count,) = frames.uint32s(payload, 1)
        if count * 8 > len(payload) - 4:
            raise SpdyError(f"SETTINGS frame is shorter than its {count} entries")
        entries = frames.uint32s(payload, 1 + 2 * count)[1:]
        self._peer_has_windows = True
        for id, value in zip(entries[::2], entries[1::2], strict=True):
            if id & 0xFFFFFF == frames.SETTING_INITIAL_WINDOW:
                if value > WINDOW_MAX:
                    raise SpdyError(f"initial window of {value} bytes, at most {WINDOW_MAX} are allowed")
                for stream in self._streams.values():
                    stream.send_window += value - self._initial_window
                self._initial_window = value
        yield WindowUpdate()

    def _on_window_update(self, id: int, delta: int) -> Iterator[Event]:
        self._peer_has_windows = True
        id, delta = id & 0x7FFFFFFF, delta & 0x7FFFFFFF
        if id == 0:
            self._send_window += delta
            if self._send_window > WINDOW_MAX:
                raise SpdyError(f"the window of the connection grew beyond {WINDOW_MAX} bytes")
        elif (stream := self._streams.get(id)) is not None:
            stream.send_window += delta
            if stream.send_window > WINDOW_MAX:
                self.reset(id, Status.FLOW_CONTROL_ERROR)
                yield RstStream(id)
        yield WindowUpdate()

    def _credit_connection(self, count: int) -> None:
        self._received += count
        if self._received >= _UPDATE_AT:
            self._out.append(frames.window_update(0, self._received))
            self._received = 0

    # --------------------------------------------------------------------------------- sending

    def output(self) -> bytes:
        """Return the bytes to send now. Each byte is returned once."""
        out, self._out = b"".join(self._out), []
        return out

    def send_settings(self, initial_window: int = WINDOW) -> None:
        """Send SETTINGS, which announces that this end has flow control."""
        self._out.append(frames.settings({frames.SETTING_INITIAL_WINDOW: initial_window}))

    def open(self, headers: Headers, *, fin: bool = False) -> int:
        """Open a stream with SYN_STREAM and return its id; with `fin` nothing can be sent on it."""
        id, self._next_id = self._next_id, self._next_id + 2
        self._streams[id] = _Stream(self._initial_window, sent_fin=fin)
        self._out.append(frames.syn_stream(id, self._compressor.compress(headers), fin))
        return id

    def reply(self, id: int) -> None:
        """Accept a stream of the peer with SYN_REPLY; nothing if it is closed already."""
        if id in self._streams:
            self._out.append(frames.syn_reply(id, self._compressor.compress({})))

    def is_open(self, id: int) -> bool:
        """Whether data may still be sent on this stream, once its window allows it."""
        stream = self._streams.get(id)
        return stream is not None and not stream.sent_fin

    def send_capacity(self, id: int) -> int:
        """Return how many bytes may be sent on this stream now; 0 on one that is not open."""
        if not self.is_open(id):
            return 0
        if not self._peer_has_windows:
            return _CAPACITY_WITHOUT_WINDOWS
        return max(0, min(self._streams[id].send_window, self._send_window))

    def send(self, id: int, data: bytes | memoryview) -> None:
        """Send at most `send_capacity` bytes on an open stream."""
        stream = self._streams[id]
        stream.send_window -= len(data)
        self._send_window -= len(data)
        self._out.append(frames.data(id, data))

    def end(self, id: int) -> None:
        """Send FLAG_FIN: no more data from us on this stream. Idempotent."""
        if self.is_open(id):
            self._out.append(frames.data(id, b"", fin=True))
            self._streams[id].sent_fin = True
            self._drop_if_closed(id)

    def reset(self, id: int, status: Status = Status.CANCEL) -> None:
        """Close both directions of a stream with RST_STREAM. Idempotent."""
        if self._streams.pop(id, None) is not None:
            self._out.append(frames.rst_stream(id, status))

    def consumed(self, id: int, count: int) -> None:
        """Record that the reader of a stream has consumed `count` bytes, and credit them in large steps."""
        stream = self._streams.get(id)
        if stream is None or stream.received_fin:
            return
        stream.consumed += count
        if stream.consumed >= _UPDATE_AT:
            self._out.append(frames.window_update(id, stream.consumed))
            stream.receive_window += stream.consumed
            stream.consumed = 0

    def ping(self, id: int) -> None:
        """Send PING. `id` has the parity of this end's streams, or the peer takes it for a response."""
        self._out.append(frames.ping(id))

    def go_away(self) -> None:
        """Send GOAWAY; streams that the peer opens from now on are refused. Idempotent."""
        if not self._going_away:
            self._going_away = True
            self._out.append(frames.go_away(self._last_peer_id))

    def _drop_if_closed(self, id: int) -> None:
        stream = self._streams[id]
        if stream.sent_fin and stream.received_fin:
            del self._streams[id]
