"""WebSocket connections: as a wire for a tunnel, and as channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wsproto import WSConnection
from wsproto.events import BytesMessage, CloseConnection, Event, Message, Ping
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from cri.streaming.channels import ChannelClosed, ConnectionLost, Inbox
from cri.streaming.websocket import (
    AnyMessage,
    ChannelError,
    Decoder,
    Form,
    HalfClosed,
    Piece,
    encode,
)
from cri.streaming.wire import Idle, Wire, wait_for_room

NORMAL, PROTOCOL_ERROR = 1000, 1002


class WebSocket:
    """An accepted connection."""

    def __init__(self, wire: Wire, connection: WSConnection) -> None:
        self._wire = wire
        self._connection = connection
        self._ended = False

    async def receive(self) -> Sequence[AnyMessage]:
        """What has come, in pieces of messages; nothing at the end. Raises ConnectionLost."""
        while not self._ended and (data := await self._wire.receive()):
            if found := self._understood(data):
                return found
        return ()

    def _understood(self, data: bytes) -> Sequence[AnyMessage]:
        found: list[AnyMessage] = []
        try:
            self._connection.receive_data(data)
            for event in self._connection.events():
                if isinstance(event, Message):
                    found.append(event)
                elif isinstance(event, Ping):
                    self._wire.post(self._connection.send(event.response()))
                elif isinstance(event, CloseConnection):
                    self._ended = True
                    self._wire.post(self._connection.send(event.response()))
        except RemoteProtocolError as cause:
            raise ConnectionLost(f"the client broke the protocol: {cause}") from cause
        except LocalProtocolError:
            self._ended = True  # it goes on behind a close, ours or its own
        return found

    async def send(self, event: Event) -> None:
        """Raises ConnectionLost."""
        await self._wire.send(self._packed(event))

    def post(self, event: Event) -> None:
        """Raises ConnectionLost."""
        self._wire.post(self._packed(event))

    def _packed(self, event: Event) -> bytes:
        try:
            return self._connection.send(event)
        except LocalProtocolError as cause:
            raise ConnectionLost("the WebSocket is closed") from cause

    def has_left(self) -> bool:
        return self._wire.has_left()

    async def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Say goodbye and hang up. Raises ConnectionLost."""
        await self.send(CloseConnection(code=code, reason=reason[:100]))
        await self._wire.finish()


class TunnelWire:
    """Bytes in binary messages, whose borders mean nothing."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._posted: list[bytes] = []

    async def receive(self) -> bytes:
        while messages := await self._websocket.receive():
            for message in messages:
                if not isinstance(message, BytesMessage):
                    raise ConnectionLost("the client sent text into a tunnel of bytes")
            if data := b"".join(bytes(message.data) for message in messages):
                return data
        return b""

    async def send(self, data: bytes) -> None:
        await self._websocket.send(BytesMessage(data=data))

    def post(self, data: bytes) -> None:
        self._websocket.post(BytesMessage(data=data))

    def has_left(self) -> bool:
        return self._websocket.has_left()

    async def finish(self) -> None:
        await self._websocket.close()


class WebSocketChannel:
    """One of the numbered channels."""

    def __init__(self, peer: WebSocketPeer, number: int) -> None:
        self.headers: Mapping[str, str] = {}
        self.inbox = Inbox(lambda count: None)
        self._peer = peer
        self._number = number
        self._closed = False

    async def read(self) -> bytes:
        return await self.inbox.read()

    async def write(self, data: bytes) -> None:
        if self._closed:
            raise ChannelClosed
        await self._peer.send(self._number, data)

    async def close(self) -> None:
        """There is no word for it: the end of all is that of the connection."""
        self._closed = True

    def reset(self) -> None:
        self._closed = True
        self.inbox.fail(ChannelClosed())


class WebSocketPeer:
    """A client with `count` channels. `run` reads for all of them.

    WebSocket has no credit for a single channel: while one is full, the others are not read either.
    """

    def __init__(self, websocket: WebSocket, form: Form, count: int, idle: Idle) -> None:
        self.channels = [WebSocketChannel(self, number) for number in range(count)]
        self._websocket = websocket
        self._form = form
        self._decoder = Decoder(form)
        self._idle = idle

    async def run(self) -> None:
        """Until the client has left. Raises ConnectionLost, always."""
        try:
            while messages := await self._websocket.receive():
                await self._take(messages)
            raise ConnectionLost("the client has left")
        except ChannelError as cause:
            lost = ConnectionLost(f"the client broke the protocol: {cause}")
            self._lose(lost)
            raise lost from cause
        except ConnectionLost as lost:
            self._lose(lost)
            raise

    async def _take(self, messages: Sequence[AnyMessage]) -> None:
        for message in messages:
            for event in self._decoder.feed(message):
                if event.channel >= len(self.channels):
                    continue  # of a newer protocol, or nonsense: nobody here reads it
                inbox = self.channels[event.channel].inbox
                match event:
                    case Piece(_, data):
                        self._idle.touch()
                        inbox.put(data)
                        await wait_for_room(inbox, self._websocket)
                    case HalfClosed():
                        inbox.end()

    def _lose(self, lost: ConnectionLost) -> None:
        for channel in self.channels:
            channel.inbox.fail(lost)

    async def send(self, channel: int, data: bytes) -> None:
        """Raises ConnectionLost."""
        self._idle.touch()
        await self._websocket.send(encode(self._form, channel, data))

    async def finish(self) -> None:
        await self._websocket.close()
