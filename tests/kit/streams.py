"""Clients of the streaming server: SPDY/3.1, with windows or without as kubectl's, and WebSocket."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import wsproto.events
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    Pong,
    RejectConnection,
    Request,
    TextMessage,
)

from cri.streaming.spdy import DataReceived, Event, FinReceived, GoAway, RstStream, SpdyProtocol
from tests.kit.eventually import eventually

READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Answer:
    """An HTTP response: status, headers, and the body."""

    code: int
    headers: Mapping[str, str]
    rest: bytes


class NotUpgraded(Exception):
    """The server answered a request for an upgrade with an ordinary response."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"{answer.code}: {answer.rest.decode(errors='replace')}")
        self.answer = answer


Dialer = Callable[[str, int], socket.socket]  # opens the connection, for example in another namespace


async def connect(
    url: str, tls: ssl.SSLContext | None = None, dialer: Dialer | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    where = urlsplit(url)
    assert where.hostname is not None
    assert where.port is not None
    if dialer is None:
        return await asyncio.open_connection(where.hostname, where.port, ssl=tls, limit=READ_BYTES)
    sock = dialer(where.hostname, where.port)
    sock.setblocking(False)
    return await asyncio.open_connection(sock=sock, limit=READ_BYTES)


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    first, *lines = head.decode().split("\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
    }
    code = int(first.split()[1])
    rest = await reader.readexactly(int(headers.get("content-length", 0)))
    return Answer(code, headers, rest)


async def request(url: str, headers: Sequence[tuple[str, str]] = (), method: str = "GET") -> Answer:
    reader, writer = await connect(url)
    try:
        await _send_request(writer, url, headers, method)
        return await read_answer(reader)
    finally:
        writer.close()


async def _send_request(
    writer: asyncio.StreamWriter, url: str, headers: Sequence[tuple[str, str]], method: str
) -> None:
    where = urlsplit(url)
    lines = [f"{method} {where.path} HTTP/1.1", f"Host: {where.netloc}"]
    lines += [f"{name}: {value}" for name, value in headers]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    await writer.drain()


def spdy_headers(*protocols: str) -> list[tuple[str, str]]:
    upgrade = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")]
    return upgrade + [("X-Stream-Protocol-Version", name) for name in protocols]


@dataclass
class Stream:
    seen: bytearray = field(default_factory=bytearray)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    broken: bool = False
    hold: bool = False  # give no credit back


class _WindowlessSpdy(SpdyProtocol):
    """Ignores windows, as the library of Kubernetes's clients does."""

    def __init__(self) -> None:
        super().__init__(client=True)
        self._peer_has_windows = False

    def _on_window_update(self, id: int, delta: int) -> Iterator[Event]:
        return iter(())


class SpdyClient:
    """A SPDY client. With `counts` False it ignores and grants no credit, like kubectl's library."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counts: bool = True
    ) -> None:
        self.spdy = SpdyProtocol(client=True) if counts else _WindowlessSpdy()
        self.streams: dict[int, Stream] = {}
        self.gone_away = False
        self.received = b""  # the last bytes of it
        self.protocol = ""
        self._reader = reader
        self.writer = writer
        self._counts = counts
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._reading = asyncio.Event()  # cleared: nothing more is read from the connection
        self._reading.set()

    @classmethod
    async def dial(
        cls,
        url: str,
        *protocols: str,
        counts: bool = True,
        tls: ssl.SSLContext | None = None,
        dialer: Dialer | None = None,
    ) -> SpdyClient:
        """Raises NotUpgraded."""
        reader, writer = await connect(url, tls, dialer)
        await _send_request(writer, url, spdy_headers(*protocols), "POST")
        answer = await read_answer(reader)
        if answer.code != 101:
            writer.close()
            raise NotUpgraded(answer)
        client = cls(reader, writer, counts=counts)
        client.protocol = answer.headers["x-stream-protocol-version"]
        client.begin()
        return client

    def pause(self) -> None:
        """Stop reading from the connection after the data that is being read."""
        self._reading.clear()

    def resume(self) -> None:
        """Read again. Idempotent."""
        self._reading.set()

    def begin(self) -> None:
        if self._counts:
            self.spdy.send_settings()
        self._task = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        while data := await self._reader.read(READ_BYTES):
            self.received = (self.received + data)[-64:]
            for event in self.spdy.receive(data):
                match event:
                    case DataReceived(id, piece):
                        self.streams[id].seen += piece
                        if self._counts and not self.streams[id].hold:
                            self.spdy.consumed(id, len(piece))
                    case FinReceived(id):
                        self.streams[id].ended.set()
                    case RstStream(id):
                        self.streams[id].broken = True
                        self.streams[id].ended.set()
                    case GoAway():
                        self.gone_away = True
            self._write()  # reading does not wait for writing
            self._news.set()
            await self._reading.wait()
        for stream in self.streams.values():
            stream.ended.set()
        self._news.set()

    def _write(self) -> None:
        if data := self.spdy.output():
            self.writer.write(data if self._counts else _without_window_updates(data))

    async def flush(self) -> None:
        self._write()
        await self.writer.drain()

    async def open(self, *, hold: bool = False, **headers: str) -> int:
        id = self.spdy.open(headers)
        self.streams[id] = Stream(hold=hold)
        await self.flush()
        return id

    async def open_command(self, *names: str) -> dict[str, int]:
        return {name: await self.open(streamtype=name) for name in names}

    async def send(self, id: int, data: bytes) -> None:
        """Send data; a client with windows waits for credit."""
        rest = memoryview(data)
        while rest:
            credit = self.spdy.send_capacity(id) if self._counts else len(rest)
            if credit == 0:
                self._news.clear()
                await asyncio.wait_for(self._news.wait(), 20)
                continue
            self.spdy.send(id, rest[: min(credit, 1 << 20)])
            rest = rest[min(credit, 1 << 20) :]
            await self.flush()

    async def end(self, id: int) -> None:
        self.spdy.end(id)
        await self.flush()

    async def until(self, id: int, enough: Callable[[bytes], bool], timeout_s: float = 20) -> bytes:
        return await eventually(lambda: bytes(self.streams[id].seen), until=enough, timeout_s=timeout_s)

    async def all(self, id: int, timeout_s: float = 20) -> bytes:
        await asyncio.wait_for(self.streams[id].ended.wait(), timeout_s)
        return bytes(self.streams[id].seen)

    async def wait_closed(self, timeout_s: float = 20) -> None:
        """Wait until the server has closed the connection."""
        assert self._task is not None
        await asyncio.wait_for(asyncio.shield(self._task), timeout_s)

    async def close(self, *, abort: bool = False) -> None:
        self.resume()
        if abort:
            self.writer.transport.abort()
        self.writer.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def _without_window_updates(data: bytes) -> bytes:
    """Drop WINDOW_UPDATE frames from bytes that begin and end at frame boundaries."""
    kept = bytearray()
    while data:
        length = 8 + int.from_bytes(data[5:8], "big")
        if data[:4] != b"\x80\x03\x00\x09":
            kept += data[:length]
        data = data[length:]
    return bytes(kept)


class WebSocketClient:
    """A WebSocket client that keeps the messages it received."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self.connection = WSConnection(ConnectionType.CLIENT)
        self.subprotocol: str | None = None
        self.messages: list[bytes | str] = []
        self.closed: CloseConnection | None = None
        self.pongs = 0
        self._ended = False
        self._partial: bytes | str | None = None

    @classmethod
    async def dial(cls, url: str, *subprotocols: str, dialer: Dialer | None = None) -> WebSocketClient:
        """Raises NotUpgraded."""
        reader, writer = await connect(url, dialer=dialer)
        client = cls(reader, writer)
        where = urlsplit(url)
        target = f"{where.path}?{where.query}" if where.query else where.path
        ask = Request(host=where.netloc, target=target, subprotocols=list(subprotocols))
        await client.send_event(ask)
        while True:
            data = await asyncio.wait_for(reader.read(READ_BYTES), 20)
            client.connection.receive_data(data or None)
            for event in client.connection.events():
                if isinstance(event, AcceptConnection):
                    client.subprotocol = event.subprotocol
                    client._take_events()
                    return client
                if isinstance(event, RejectConnection):
                    writer.close()
                    raise NotUpgraded(Answer(event.status_code, {}, b""))
            assert data, "the server hung up"

    async def send_event(self, event: wsproto.events.Event) -> None:
        self.writer.write(self.connection.send(event))
        await self.writer.drain()

    async def send(self, data: bytes | str) -> None:
        await self.send_event(BytesMessage(data=data) if isinstance(data, bytes) else TextMessage(data=data))

    async def ping(self) -> None:
        await self.send_event(Ping(payload=b"there?"))

    async def receive(self) -> bool:
        """Receive and keep the next messages; False at the end of the connection."""
        data = await asyncio.wait_for(self._reader.read(READ_BYTES), 20)
        if not data:
            return False
        self.connection.receive_data(data)
        self._take_events()
        return self.closed is None

    def _take_events(self) -> None:
        for event in self.connection.events():
            if isinstance(event, Message):
                data = bytes(event.data) if isinstance(event, BytesMessage) else str(event.data)
                self._partial = data if self._partial is None else self._partial + data  # type: ignore[operator]
                if event.message_finished:
                    self.messages.append(self._partial)
                    self._partial = None
            elif isinstance(event, Pong):
                self.pongs += 1
            elif isinstance(event, CloseConnection):
                self.closed = event
                if self.connection.state is ConnectionState.REMOTE_CLOSING and not self._ended:
                    self.writer.write(self.connection.send(event.response()))

    def channel(self, number: int) -> bytes:
        """Return what was received on a channel of the binary form."""
        return b"".join(each[1:] for each in self.messages if isinstance(each, bytes) and each[0] == number)

    async def until(self, enough: Callable[[], bool]) -> None:
        while not enough():
            assert await self.receive() or enough(), f"ended: {self.messages[-5:]!r} {self.closed}"

    async def read_all(self) -> None:
        while await self.receive():
            pass

    def end(self) -> None:
        """Send no more, and still receive."""
        self._ended = True
        self.writer.write_eof()

    async def close(self) -> None:
        self.writer.close()


class Tunnelled:
    """SPDY in WebSocket messages that are cut anywhere; reader and writer of a connection in one."""

    def __init__(self, websocket: WebSocketClient) -> None:
        self._websocket = websocket
        self._taken = 0

    async def read(self, size: int) -> bytes:
        while self._taken == len(self._websocket.messages):
            if not await self._websocket.receive() and self._taken == len(self._websocket.messages):
                return b""
        message = self._websocket.messages[self._taken]
        self._taken += 1
        assert isinstance(message, bytes)
        return message

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), 1000):
            piece = BytesMessage(data=data[start : start + 1000])
            self._websocket.writer.write(self._websocket.connection.send(piece))

    async def drain(self) -> None:
        await self._websocket.writer.drain()

    def close(self) -> None:
        self._websocket.writer.close()
