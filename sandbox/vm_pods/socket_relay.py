"""Carries one connection between a program in a guest and a server on the host's socket.

Memory: at most a window of the guest (`guest.sockets.WINDOW`) and one message wait here for a server that
does not read, and one chunk for a guest that does not.

Each direction ends by itself, as on one socket: the end of what one side sends is seen by the other; a side
that reads no more makes the other's writes fail. A server that closes its end as a whole ends both.

Descriptors cannot be carried, as a process of the guest has no use for one of the host: a connection over
which either side passes some is ended, rather than losing them without a word.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress

from sandbox.errors import ProtocolError, StreamReset
from sandbox.guest.sockets import SocketConnection
from sandbox.host.socket_files import MESSAGE_BYTES, Identity, SocketKind, credentials_of
from sandbox.host.tasks import together

CHUNK_BYTES = 64 << 10
_LENGTH_BYTES = 4  # before each message in a stream to or from the guest

Connect = Callable[[], Awaitable[socket.socket]]


class DescriptorsPassed(OSError):
    """The server passed descriptors."""


async def relay(connection: SocketConnection, kind: SocketKind, identity: Identity, connect: Connect) -> None:
    """Carry what both sides send until both have ended. Closes the connection.

    `connect` connects to the server; what it raises is raised. Raises GuestUnreachable, DescriptorsPassed,
    ProtocolError.
    """
    try:
        with await connect() as server:
            if kind is SocketKind.DATAGRAM:
                await _send_datagrams(connection, server, identity, connect)
            else:
                await together(
                    _copy_to_server(connection, kind, server, identity),
                    _copy_to_guest(connection, kind, server),
                )
    finally:
        connection.close()


async def _copy_to_server(
    connection: SocketConnection, kind: SocketKind, server: socket.socket, identity: Identity
) -> None:
    try:
        async for data in _received(connection, kind):
            await send(server, data, identity)
        server.shutdown(socket.SHUT_WR)
    except StreamReset:
        pass  # `_copy_to_guest` stopped the reader
    except OSError:  # the server reads no more
        connection.reader.stop()


async def _copy_to_guest(connection: SocketConnection, kind: SocketKind, server: socket.socket) -> None:
    messages = kind is not SocketKind.STREAM
    try:
        while (data := await receive(server, messages=messages)) is not None:
            head = len(data).to_bytes(_LENGTH_BYTES, "little") if messages else b""
            await connection.writer.write(head + data)
    except StreamReset:  # the guest reads no more
        with suppress(OSError):
            server.shutdown(socket.SHUT_RD)
        return
    except DescriptorsPassed:
        raise
    except OSError:
        pass  # the server has closed with bytes unread
    connection.writer.close()
    if _poll(server) & select.POLLHUP:  # it reads no more either
        connection.reader.stop()


async def _send_datagrams(
    connection: SocketConnection, server: socket.socket, identity: Identity, connect: Connect
) -> None:
    """Send each; one that is not received is lost. A server that has started again is connected to again."""
    current = server
    try:
        async for data in _received(connection, SocketKind.DATAGRAM):
            try:
                await send(current, data, identity)
            except OSError:
                with suppress(OSError):
                    again = await connect()
                    current.close()
                    current = again
                    await send(current, data, identity)
    finally:
        current.close()


async def _received(connection: SocketConnection, kind: SocketKind) -> AsyncIterator[bytes]:
    """Yield what the guest sends until its end: pieces, or whole messages."""
    messages = Messages()
    while data := await connection.reader.read():
        if kind is SocketKind.STREAM:
            yield data
            continue
        for message in messages.feed(data):
            yield message


class Messages:
    """Splits a stream into messages, each after its length (u32 LE). Bounded by MESSAGE_BYTES. Pure."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the messages that these bytes complete. Raises ProtocolError for one that is too long."""
        self._rest += data
        while len(self._rest) >= _LENGTH_BYTES:
            length = int.from_bytes(self._rest[:_LENGTH_BYTES], "little")
            if length > MESSAGE_BYTES:
                raise ProtocolError(f"the guest sent a message of {length} bytes through a socket")
            end = _LENGTH_BYTES + length
            if len(self._rest) < end:
                return
            yield bytes(self._rest[_LENGTH_BYTES:end])
            del self._rest[:end]


# ------------------------------------------------------------------------------------- the socket


async def send(server: socket.socket, data: bytes, identity: Identity) -> None:
    """Send all of `data`, or one message, as this user. Raises OSError."""
    rest, ancillary = memoryview(data), credentials_of(identity)
    loop = asyncio.get_running_loop()
    while True:
        try:
            rest = rest[server.sendmsg([rest], ancillary, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            await _ready(server, loop.add_writer, loop.remove_writer)
        else:
            if not rest:
                return


async def receive(server: socket.socket, *, messages: bool) -> bytes | None:
    """Return the next bytes or the next message; None at the end. Raises OSError, DescriptorsPassed."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            data, _, flags, _ = server.recvmsg(MESSAGE_BYTES if messages else CHUNK_BYTES)
        except BlockingIOError:
            await _ready(server, loop.add_reader, loop.remove_reader)
            continue
        if flags & socket.MSG_CTRUNC:
            raise DescriptorsPassed("the server passes descriptors")
        if flags & socket.MSG_TRUNC:
            raise OSError(f"the server sent a message of more than {MESSAGE_BYTES} bytes")
        if data or (messages and not _poll(server) & select.POLLRDHUP):
            return data
        return None


def _poll(server: socket.socket) -> int:
    poll = select.poll()
    poll.register(server, select.POLLRDHUP)
    return next((events for _, events in poll.poll(0)), 0)


async def _ready(
    server: socket.socket, add: Callable[..., object], remove: Callable[[socket.socket], object]
) -> None:
    ready = asyncio.Event()
    add(server, ready.set)
    try:
        await ready.wait()
    finally:
        remove(server)
