"""One session of a client: which protocol its connection is upgraded to, and what then runs over it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection
from wsproto.utilities import ProtocolError as WebSocketError

from cri.streaming.channels import Channel, ConnectionLost
from cri.streaming.http import HttpConnection, Rejected, Request
from cri.streaming.port_forward import LINGER_S, PortForwarder, forward
from cri.streaming.remote_command import CommandChannels, run
from cri.streaming.session import Backend, ExecOptions, PortForwardOptions, SessionOptions
from cri.streaming.spdy_connection import SpdyConnection
from cri.streaming.transport import IdleTimer, TcpTransport, Transport
from cri.streaming.websocket_connection import TunnelTransport, WebSocket, WebSocketConnection
from cri.streaming.websocket_messages import (
    COMMAND_SUBPROTOCOLS,
    PORT_FORWARD_SUBPROTOCOLS,
    TUNNEL,
    Subprotocol,
    choose_subprotocol,
)
from sandbox.session import PortConnection, Session

log = logging.getLogger("cri.streaming")

COMMAND_CHANNELS_MAX = 8  # a command has at most 5; others are reset one by one
STREAMS_TIMEOUT_S = 30.0  # for a client to open the streams of its command
SPDY = "SPDY/3.1"
PROTOCOL_HEADER = "X-Stream-Protocol-Version"
PORT_FORWARD_PROTOCOL = "portforward.k8s.io"
# Remote command over SPDY, newest first, and what came with which version.
COMMAND_PROTOCOLS = ("v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io")
WITH_RESIZE = frozenset(COMMAND_PROTOCOLS[:2])
WITH_STATUS = frozenset(COMMAND_PROTOCOLS[:1])
BASE64_PORTS_MAX = 5  # two channels a port, and a channel is a digit
BINARY_PORTS_MAX = 127  # two channels a port, and a channel is a byte


@dataclass(frozen=True, slots=True)
class Upgrade:
    """The negotiated protocol: the response that accepts it, and what then serves the connection."""

    response: bytes
    serve: Callable[[TcpTransport], Awaitable[str]]  # returns the outcome, for the log


class ClientSession:
    """One session. `kind` names it in the log: exec, attach or portforward."""

    def __init__(self, backend: Backend, options: SessionOptions, kind: str, idle_timeout_s: float) -> None:
        self._backend = backend
        self._options = options
        self._kind = kind
        self._idle = IdleTimer(idle_timeout_s)
        self._idle_timeout_s = idle_timeout_s
        self._protocol = ""

    async def serve(self, upgrade: Upgrade, transport: TcpTransport) -> None:
        """Accept the upgrade, serve the session to its end and log it. A lost client is not an error."""
        began = time.monotonic()
        outcome = "the daemon stopped"
        try:
            await transport.send(upgrade.response)
            outcome = await upgrade.serve(transport)
        except ConnectionLost as lost:
            outcome = str(lost)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
            raise
        finally:
            fields = {
                "of": _subject(self._options)[:13],
                "protocol": self._protocol,
                "seconds": time.monotonic() - began,
                "outcome": outcome,
            }
            log.info("%s session", self._kind, extra={"fields": fields})

    def negotiate(self, request: Request, http: HttpConnection) -> Upgrade:
        """Choose the protocol by the request's headers. Raises Rejected."""
        upgrades = [each.lower() for each in request.values("upgrade")]
        if "websocket" in upgrades:
            return self._negotiate_websocket(request)
        if SPDY.lower() in upgrades:
            return self._negotiate_spdy(request, http)
        raise Rejected(400, f"the connection must be upgraded to {SPDY} or to a WebSocket")

    async def _run(
        self,
        connection: SpdyConnection | WebSocketConnection,
        work: Coroutine[Any, Any, str],
        linger_s: float = 0,
    ) -> str:
        """Run `work` while the client is connected and not idle. Raises ConnectionLost.

        Once the client has ended its side, what it has sent may be answered for `linger_s` more.
        """
        receiving = asyncio.create_task(connection.run())
        working = asyncio.create_task(work)
        idling = asyncio.create_task(self._idle.wait_expired())
        try:
            await asyncio.wait({receiving, working, idling}, return_when=asyncio.FIRST_COMPLETED)
            if linger_s and receiving.done():
                await asyncio.wait({working}, timeout=linger_s)
            if not working.done():
                if idling.done():
                    raise ConnectionLost(f"no data for {self._idle_timeout_s:g} s")
                receiving.result()
            outcome = working.result()
        finally:
            for task in (receiving, working, idling):
                task.cancel()
            await asyncio.gather(receiving, working, idling, return_exceptions=True)
        with suppress(ConnectionLost):
            await connection.close()
        return outcome

    # ---------------------------------------------------------------------------------- SPDY

    def _negotiate_spdy(self, request: Request, http: HttpConnection) -> Upgrade:
        forwards = isinstance(self._options, PortForwardOptions)
        supported = (PORT_FORWARD_PROTOCOL,) if forwards else COMMAND_PROTOCOLS
        offered = request.values(PROTOCOL_HEADER)
        if not offered:
            raise Rejected(400, f"{PROTOCOL_HEADER} is missing; supported: {', '.join(supported)}")
        version = next((each for each in offered if each in supported), None)
        if version is None:
            accepted = [("X-Accepted-Stream-Protocol-Versions", ", ".join(supported))]
            problem = f"unsupported protocols {', '.join(offered)}; supported: {', '.join(supported)}"
            raise Rejected(403, problem, accepted)
        self._protocol = f"{SPDY} {version}"
        headers = [("Connection", "Upgrade"), ("Upgrade", SPDY), (PROTOCOL_HEADER, version)]

        async def serve(transport: TcpTransport) -> str:
            if forwards:
                outcome = await self._forward_spdy(transport)
            else:
                outcome = await self._command_spdy(transport, version)
            with suppress(ConnectionLost):
                await transport.close()
            return outcome

        return Upgrade(http.switch_protocols(headers), serve)

    async def _forward_spdy(self, transport: Transport) -> str:
        connection = SpdyConnection(transport, self._idle)

        async def work() -> str:
            await PortForwarder(self._dial).run(connection)
            return "closed"

        return await self._run(connection, work(), LINGER_S)

    async def _command_spdy(self, transport: Transport, version: str) -> str:
        connection = SpdyConnection(transport, self._idle, COMMAND_CHANNELS_MAX)
        options = self._options
        assert not isinstance(options, PortForwardOptions)
        expected = {"error"} | {name for name in ("stdin", "stdout", "stderr") if getattr(options, name)}
        if options.tty and version in WITH_RESIZE:
            expected.add("resize")

        async def work() -> str:
            try:
                async with asyncio.timeout(STREAMS_TIMEOUT_S):
                    channels = await _accept_all(connection, expected)
            except TimeoutError:
                problem = f"the client did not open all streams within {STREAMS_TIMEOUT_S:g} s"
                raise ConnectionLost(problem) from None
            plain = version not in WITH_STATUS
            return await run(self._start, CommandChannels(**channels, plain_status=plain))

        return await self._run(connection, work())

    # ----------------------------------------------------------------------------- WebSocket

    def _negotiate_websocket(self, request: Request) -> Upgrade:
        forwards = isinstance(self._options, PortForwardOptions)
        subprotocols = PORT_FORWARD_SUBPROTOCOLS if forwards else COMMAND_SUBPROTOCOLS
        supported = [name for name in (*subprotocols, TUNNEL if forwards else "") if name]
        offered = request.values("sec-websocket-protocol")
        chosen = choose_subprotocol(offered, supported)
        if chosen is None:
            problem = f"unsupported subprotocols {', '.join(offered)}; supported: {', '.join(supported)}"
            raise Rejected(403, problem)
        if isinstance(self._options, PortForwardOptions) and chosen != TUNNEL:
            _check_port_count(self._options.ports, subprotocols[chosen])
        self._protocol = f"WebSocket {chosen}"
        protocol = WSConnection(ConnectionType.SERVER)
        try:
            protocol.initiate_upgrade_connection(list(request.headers), request.path)
            response = protocol.send(AcceptConnection(subprotocol=chosen or None))
        except WebSocketError as error:
            raise Rejected(400, f"not a valid WebSocket handshake: {error}") from error

        async def serve(transport: TcpTransport) -> str:
            socket = WebSocket(transport, protocol)
            if chosen == TUNNEL:
                return await self._forward_tunnel(socket)
            if forwards:
                return await self._forward_websocket(socket, subprotocols[chosen])
            return await self._command_websocket(socket, subprotocols[chosen])

        return Upgrade(response, serve)

    async def _forward_tunnel(self, socket: WebSocket) -> str:
        transport = TunnelTransport(socket)
        outcome = await self._forward_spdy(transport)
        with suppress(ConnectionLost):
            await transport.close()
        return outcome

    async def _command_websocket(self, socket: WebSocket, subprotocol: Subprotocol) -> str:
        options = self._options
        assert not isinstance(options, PortForwardOptions)
        connection = WebSocketConnection(socket, subprotocol, 5, self._idle)
        stdin, stdout, stderr, error, resize = connection.channels
        channels = CommandChannels(
            error=error,
            stdin=stdin if options.stdin else None,
            stdout=stdout if options.stdout else None,
            stderr=stderr if options.stderr else None,
            resize=resize if options.tty else None,
            plain_status=not subprotocol.status,
        )

        async def work() -> str:
            # an empty message: clients take it for "connected", before the command writes anything
            await (channels.stdout or channels.stderr or error).write(b"")
            return await run(self._start, channels)

        return await self._run(connection, work())

    async def _forward_websocket(self, socket: WebSocket, subprotocol: Subprotocol) -> str:
        options = self._options
        assert isinstance(options, PortForwardOptions)
        connection = WebSocketConnection(socket, subprotocol, 2 * len(options.ports), self._idle)

        async def work() -> str:
            connections = []
            for index, port in enumerate(options.ports):
                data, error = connection.channels[2 * index : 2 * index + 2]
                for channel in (data, error):
                    await channel.write(port.to_bytes(2, "little"))
                connections.append(forward(self._dial, port, data, error))
            await asyncio.gather(*connections)
            return "closed"

        return await self._run(connection, work(), LINGER_S)

    # ------------------------------------------------------------------------------- backend

    async def _start(self) -> Session:
        if isinstance(self._options, ExecOptions):
            return await self._backend.exec(self._options)
        assert not isinstance(self._options, PortForwardOptions)
        return await self._backend.attach(self._options)

    async def _dial(self, port: int) -> PortConnection:
        assert isinstance(self._options, PortForwardOptions)
        return await self._backend.dial(self._options.pod_id, port)


async def _accept_all(connection: SpdyConnection, expected: set[str]) -> dict[str, Any]:
    """Return the streams of a remote command by type, once all are open; reset any others.

    Raises ConnectionLost.
    """
    channels: dict[str, Channel] = {}
    async for channel in connection.accept():
        kind = channel.headers.get("streamtype", "")
        if kind in expected and kind not in channels:
            channels[kind] = channel
        else:
            channel.reset()
        if len(channels) == len(expected):
            return channels
    missing = ", ".join(sorted(expected - set(channels)))
    raise ConnectionLost(f"the client opens no more streams, and these are missing: {missing}")


def _check_port_count(ports: Sequence[int], subprotocol: Subprotocol) -> None:
    most = BASE64_PORTS_MAX if subprotocol.base64 else BINARY_PORTS_MAX
    if not 0 < len(ports) <= most:
        raise Rejected(400, f"{len(ports)} ports were requested; accepted by this subprotocol: 1 to {most}")


def _subject(options: SessionOptions) -> str:
    return options.pod_id if isinstance(options, PortForwardOptions) else options.container_id
