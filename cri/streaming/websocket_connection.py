"""WebSocket connections: as a transport for a SPDY tunnel, and as numbered channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wsproto import WSConnection
from wsproto.events import BytesMessage, CloseConnection, Event, Message, Ping
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from cri.streaming.channels import ChannelClosed, ConnectionLost, ReceiveBuffer
from cri.streaming.transport import IdleTimer, Transport, wait_for_space
from cri.streaming.websocket_messages import (
    AnyMessage,
    ChannelData,
    ChannelEnd,
    Decoder,
    Subprotocol,
    SubprotocolError,
    encode,
)

NORMAL, PROTOCOL_ERROR = 1000, 1002


class WebSocket:
    """An accepted WebSocket. Answers PING and CLOSE itself."""

    def __init__(self, transport: Transport, protocol: WSConnection) -> None:
        self._transport = transport
        self._protocol = protocol
        self._ended = False

    async def receive(self) -> Sequence[AnyMessage]:
        """Return received parts of messages; empty at the end. Raises ConnectionLost."""
        while not self._ended and (data := await self._transport.receive()):
            if messages := self._parse(data):
                return messages
        return ()

    def _parse(self, data: bytes) -> Sequence[AnyMessage]:
        messages: list[AnyMessage] = []
        try:
            self._protocol.receive_data(data)
            for event in self._protocol.events():
                if isinstance(event, Message):
                    messages.append(event)
                elif isinstance(event, Ping):
                    self._transport.send_nowait(self._protocol.send(event.response()))
                elif isinstance(event, CloseConnection):
                    self._ended = True
                    self._transport.send_nowait(self._protocol.send(event.response()))
        except RemoteProtocolError as cause:
            raise ConnectionLost(f"the client violated WebSocket: {cause}") from cause
        except LocalProtocolError:
            self._ended = True  # data after a CLOSE frame, ours or the client's
        return messages

    async def send(self, event: Event) -> None:
        """Send a message or a control frame. Raises ConnectionLost."""
        await self._transport.send(self._encode(event))

    def send_nowait(self, event: Event) -> None:
        """See `Transport.send_nowait`. Raises ConnectionLost."""
        self._transport.send_nowait(self._encode(event))

    def _encode(self, event: Event) -> bytes:
        try:
            return self._protocol.send(event)
        except LocalProtocolError as cause:
            raise ConnectionLost("the WebSocket is closed") from cause

    def is_disconnected(self) -> bool:
        """See `Transport.is_disconnected`."""
        return self._transport.is_disconnected()

    async def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Send CLOSE, then close the connection. Raises ConnectionLost."""
        await self.send(CloseConnection(code=code, reason=reason[:100]))
        await self._transport.close()


class TunnelTransport:
    """The byte stream in the binary messages of a WebSocket, whose boundaries have no meaning.

    See `Transport`.
    """

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket

    async def receive(self) -> bytes:
        """See `Transport.receive`. A text message raises ConnectionLost."""
        while messages := await self._websocket.receive():
            for message in messages:
                if not isinstance(message, BytesMessage):
                    raise ConnectionLost("the client sent a text message into a tunnel of bytes")
            if data := b"".join(bytes(message.data) for message in messages):
                return data
        return b""

    async def send(self, data: bytes) -> None:
        """See `Transport.send`."""
        await self._websocket.send(BytesMessage(data=data))

    def send_nowait(self, data: bytes) -> None:
        """See `Transport.send_nowait`."""
        self._websocket.send_nowait(BytesMessage(data=data))

    def is_disconnected(self) -> bool:
        """See `Transport.is_disconnected`."""
        return self._websocket.is_disconnected()

    async def close(self) -> None:
        """See `Transport.close`."""
        await self._websocket.close()


class WebSocketChannel:
    """One of the numbered channels. See `Channel`."""

    half_closes = False

    def __init__(self, connection: WebSocketConnection, number: int) -> None:
        self.headers: Mapping[str, str] = {}
        self.buffer = ReceiveBuffer(lambda count: None)
        self._connection = connection
        self._number = number
        self._closed = False

    async def read(self) -> bytes:
        """See `Channel.read`."""
        return await self.buffer.read()

    async def write(self, data: bytes) -> None:
        """See `Channel.write`."""
        if self._closed:
            raise ChannelClosed
        await self._connection.send(self._number, data)

    async def close(self) -> None:
        """Refuse further writes. The subprotocols cannot end one channel towards the client."""
        self._closed = True

    def reset(self) -> None:
        """See `Channel.reset`. The client is not informed."""
        self._closed = True
        self.buffer.fail(ChannelClosed())


class WebSocketConnection:
    """The connection of one client with `count` channels. `run` receives for every channel.

    WebSocket has no flow control per channel: while one is full, the others are not read either.
    """

    def __init__(self, websocket: WebSocket, subprotocol: Subprotocol, count: int, idle: IdleTimer) -> None:
        self.channels = [WebSocketChannel(self, number) for number in range(count)]
        self._websocket = websocket
        self._subprotocol = subprotocol
        self._decoder = Decoder(subprotocol)
        self._idle = idle

    async def run(self) -> None:
        """Receive until the client disconnects. Always raises ConnectionLost.

        A client that ends its side of the connection has ended all channels, and may still receive.
        """
        try:
            while messages := await self._websocket.receive():
                await self._handle(messages)
            for channel in self.channels:
                channel.buffer.end()
        except SubprotocolError as cause:
            lost = ConnectionLost(f"the client violated its subprotocol: {cause}")
            self._fail(lost)
            raise lost from cause
        except ConnectionLost as lost:
            self._fail(lost)
            raise
        raise ConnectionLost("the client disconnected")

    async def _handle(self, messages: Sequence[AnyMessage]) -> None:
        for message in messages:
            for event in self._decoder.feed(message):
                if event.channel >= len(self.channels):
                    continue  # a channel of a newer protocol, or an error: nothing reads it here
                buffer = self.channels[event.channel].buffer
                match event:
                    case ChannelData(_, data):
                        self._idle.touch()
                        buffer.put(data)
                        await wait_for_space(buffer, self._websocket)
                    case ChannelEnd():
                        buffer.end()

    def _fail(self, lost: ConnectionLost) -> None:
        for channel in self.channels:
            channel.buffer.fail(lost)

    async def send(self, channel: int, data: bytes) -> None:
        """Send one message of a channel. Raises ConnectionLost."""
        self._idle.touch()
        await self._websocket.send(encode(self._subprotocol, channel, data))

    async def close(self) -> None:
        """Send CLOSE, then close the connection. Raises ConnectionLost."""
        await self._websocket.close()
