"""Connections of programs in the guest to sockets that stand for the host's, as the host accepts them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from sandbox.errors import GuestUnreachable, ProtocolError
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.guest.sessions import Reader
from sandbox.guest.streams import OutputStream

WINDOW = 64 << 10  # what the daemon may have to buffer for a server that does not read
_GROUPS_MAX = 64


@dataclass(frozen=True, slots=True)
class Peer:
    """Which socket was connected to, and who connected, as the guest says: not trusted."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


class SocketConnection:
    """An accepted connection. Each direction ends by itself."""

    def __init__(self, writer: OutputStream, reader: Reader) -> None:
        self.writer = writer
        self.reader = reader
        self.peer = Peer("", 0, 0, ())

    @classmethod
    async def accept(cls, client: GuestClient) -> SocketConnection:
        """Wait for a connection, however long it takes. The caller closes it.

        Raises GuestError for an agent that cannot, and GuestUnreachable.
        """
        connection = cls(client.open_output(), Reader(client, WINDOW))
        accept = pb.AcceptSocket(
            to_guest_stream=connection.writer.id, from_guest_stream=connection.reader.stream, window=WINDOW
        )
        try:
            reply = await asyncio.shield(client.post(pb.Request(accept_socket=accept)))
        except BaseException:
            connection.close()
            raise
        said = reply.accepted
        if len(said.groups) > _GROUPS_MAX:
            connection.close()
            problem = ProtocolError("the guest says that a process has too many groups")
            client.fail(problem)
            raise problem
        connection.peer = Peer(said.name, said.uid, said.gid, tuple(said.groups))
        return connection

    def close(self) -> None:
        """End both directions, once what was written has arrived. Idempotent."""
        with suppress(GuestUnreachable):
            self.writer.close()
        self.reader.stop()
