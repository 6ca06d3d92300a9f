"""The streaming server: one TCP connection is one session, from its token to its end.

    GET or POST /exec|attach|portforward/TOKEN, upgraded to SPDY/3.1 or to a WebSocket

A session is one task and what that starts; when it ends, however it does, nothing of it is left here,
and in the guest nothing but what the client started there (see `sandbox.guest.sessions`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection
from wsproto.utilities import ProtocolError as WebSocketError

from cri.streaming import websocket
from cri.streaming.channels import Channel, ConnectionLost
from cri.streaming.http import Exchange, Refused, Request
from cri.streaming.port_forward import ForwardedStreams, forward
from cri.streaming.remote_command import CommandChannels, run
from cri.streaming.session import AttachOptions, Backend, ExecOptions, PortForwardOptions, SessionOptions
from cri.streaming.spdy_channels import SpdyPeer
from cri.streaming.tokens import Tokens
from cri.streaming.websocket import COMMAND_FORMS, FORWARD_FORMS, TUNNEL, Form
from cri.streaming.websocket_channels import TunnelWire, WebSocket, WebSocketPeer
from cri.streaming.wire import Idle, TcpWire, Wire
from sandbox.session import PortConnection, Session

log = logging.getLogger("cri.streaming")

HANDSHAKE_TIMEOUT_S = 10.0
STREAMS_TIMEOUT_S = 30.0
SPDY = "SPDY/3.1"
PROTOCOL_HEADER = "X-Stream-Protocol-Version"
FORWARD_PROTOCOL = "portforward.k8s.io"
# Remote command over SPDY, and what came with which version.
COMMAND_PROTOCOLS = ("v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io")
RESIZING = frozenset(COMMAND_PROTOCOLS[:2])
WITH_STATUS = frozenset(COMMAND_PROTOCOLS[:1])

_PATHS: dict[type[SessionOptions], str] = {
    ExecOptions: "exec",
    AttachOptions: "attach",
    PortForwardOptions: "portforward",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """`address` is an IP of this host, to be dialled by clients; port 0: any that is free."""

    address: str
    port: int
    idle_timeout_s: float
    tls_cert: str = ""  # both or none
    tls_key: str = ""


class StreamingNotServed(Exception):
    """The server cannot be had as the configuration wants it."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"streaming.{key}: {problem}")
        self.key = key
        self.problem = problem


class StreamingServer:
    def __init__(self, backend: Backend, settings: Settings, tokens: Tokens | None = None) -> None:
        self._backend = backend
        self._settings = settings
        self._tokens = tokens or Tokens()
        self._server: asyncio.Server | None = None
        self._base = ""
        self._sessions: set[asyncio.Task[Any]] = set()

    # ------------------------------------------------------------------------------ its life

    async def start(self) -> None:
        """Raises StreamingNotServed."""
        address, port = self._settings.address, self._settings.port
        tls = self._tls_context() if self._settings.tls_cert else None
        try:
            self._server = await asyncio.start_server(self._connected, address, port, ssl=tls)
        except OSError as error:
            problem = error.strerror or str(error)
            raise StreamingNotServed("address", f"{address}, port {port} cannot be had: {problem}") from error
        host = f"[{address}]" if ipaddress.ip_address(address).version == 6 else address
        self._base = f"{'https' if tls else 'http'}://{host}:{self._server.sockets[0].getsockname()[1]}"

    def _tls_context(self) -> ssl.SSLContext:
        cert, key = self._settings.tls_cert, self._settings.tls_key
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(cert, key)
        except OSError as error:  # ssl.SSLError is one
            problem = error.strerror or str(error)
            raise StreamingNotServed("tls_cert", f"{cert} and {key} cannot be used: {problem}") from error
        return context

    async def stop(self) -> None:
        """End every session. Idempotent."""
        if self._server is not None:
            self._server.close()
        for task in self._sessions:
            task.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    def __len__(self) -> int:
        return len(self._sessions)

    def url(self, wish: SessionOptions) -> str:
        """Where the client finds its session, once, within the next minute. Raises TooManyTokens."""
        return f"{self._base}/{_PATHS[type(wish)]}/{self._tokens.issue(wish)}"

    # --------------------------------------------------------------------------- connections

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._hold(reader, writer))
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)

    async def _hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._greet(reader, writer)
        except (ConnectionLost, OSError, TimeoutError) as error:
            log.debug("a streaming client was lost: %s", error)
        except Exception:
            log.exception("a streaming session broke")
        finally:
            writer.transport.abort()  # what was to be said, was: see TcpWire.finish

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        exchange = Exchange(reader)
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                request = await exchange.request()
            if request is None:
                return
            wish = self._redeem(request)
            conversation = _Conversation(self._backend, self._settings, wish)
            begin = conversation.choose(request, exchange)
        except Refused as refused:
            writer.write(exchange.refusal(refused))
            await TcpWire(reader, writer).finish()
            return
        await conversation.hold(begin, TcpWire(reader, writer, request.early))

    def _redeem(self, request: Request) -> SessionOptions:
        """Raises Refused."""
        if request.method not in ("GET", "POST"):
            raise Refused(405, "only GET and POST", [("Allow", "GET, POST")])
        empty, *parts = request.path.split("/")
        if empty or len(parts) != 2 or parts[0] not in _PATHS.values():
            raise Refused(404, "there is nothing here")
        wish = self._tokens.redeem(parts[1])
        if wish is None or _PATHS[type(wish)] != parts[0]:
            raise Refused(404, "the token is unknown, used or expired")
        return wish


# What is said first over the new protocol, and what then goes on over it until all was said.
Beginning = tuple[bytes, Callable[[TcpWire], Awaitable[str]]]


class _Conversation:
    """One session."""

    def __init__(self, backend: Backend, settings: Settings, wish: SessionOptions) -> None:
        self._backend = backend
        self._wish = wish
        self._idle = Idle(settings.idle_timeout_s)
        self._idle_s = settings.idle_timeout_s
        self._protocol = ""

    async def hold(self, begin: Beginning, wire: TcpWire) -> None:
        began = time.monotonic()
        answer, go_on = begin
        outcome = "the daemon ends"
        try:
            await wire.send(answer)
            outcome = await go_on(wire)
        except ConnectionLost as lost:
            outcome = str(lost)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
            raise
        finally:
            fields = {
                "of": _subject(self._wish)[:13],
                "protocol": self._protocol,
                "seconds": time.monotonic() - began,
                "outcome": outcome,
            }
            log.info("%s session", _PATHS[type(self._wish)], extra={"fields": fields})

    def choose(self, request: Request, exchange: Exchange) -> Beginning:
        """Raises Refused."""
        upgrades = [each.lower() for each in request.values("upgrade")]
        if "websocket" in upgrades:
            return self._choose_websocket(request)
        if SPDY.lower() in upgrades:
            return self._choose_spdy(request, exchange)
        raise Refused(400, f"the connection must be upgraded to {SPDY} or to a WebSocket")

    async def _converse(self, peer: SpdyPeer | WebSocketPeer, work: Coroutine[Any, Any, str]) -> str:
        """Do the work while the client is there. Raises ConnectionLost."""
        reading = asyncio.create_task(peer.run())
        working = asyncio.create_task(work)
        idling = asyncio.create_task(self._idle.watch())
        try:
            await asyncio.wait({reading, working, idling}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                if idling.done():
                    raise ConnectionLost(f"nothing was said for {self._idle_s:g} s")
                reading.result()
            outcome = working.result()
        finally:
            for task in (reading, working, idling):
                task.cancel()
            await asyncio.gather(reading, working, idling, return_exceptions=True)
        with suppress(ConnectionLost):
            await peer.finish()
        return outcome

    # ---------------------------------------------------------------------------------- SPDY

    def _choose_spdy(self, request: Request, exchange: Exchange) -> Beginning:
        forwards = isinstance(self._wish, PortForwardOptions)
        known = (FORWARD_PROTOCOL,) if forwards else COMMAND_PROTOCOLS
        offered = request.values(PROTOCOL_HEADER)
        if not offered:
            raise Refused(400, f"{PROTOCOL_HEADER} is missing; known: {', '.join(known)}")
        version = next((each for each in offered if each in known), None)
        if version is None:
            accepted = [("X-Accepted-Stream-Protocol-Versions", ", ".join(known))]
            raise Refused(403, f"none of {', '.join(offered)} is known; known: {', '.join(known)}", accepted)
        self._protocol = f"{SPDY} {version}"
        headers = [("Connection", "Upgrade"), ("Upgrade", SPDY), (PROTOCOL_HEADER, version)]

        async def go_on(wire: TcpWire) -> str:
            outcome = await self._forward_spdy(wire) if forwards else await self._command(wire, version)
            with suppress(ConnectionLost):
                await wire.finish()
            return outcome

        return exchange.switch(headers), go_on

    async def _forward_spdy(self, wire: Wire) -> str:
        peer = SpdyPeer(wire, self._idle)

        async def work() -> str:
            await ForwardedStreams(self._dial).run(peer)
            return "closed"

        return await self._converse(peer, work())

    async def _command(self, wire: Wire, version: str) -> str:
        peer = SpdyPeer(wire, self._idle)
        wish = self._wish
        assert not isinstance(wish, PortForwardOptions)
        wanted = {"error"} | {name for name in ("stdin", "stdout", "stderr") if getattr(wish, name)}
        if wish.tty and version in RESIZING:
            wanted.add("resize")

        async def work() -> str:
            try:
                async with asyncio.timeout(STREAMS_TIMEOUT_S):
                    found = await _gather(peer, wanted)
            except TimeoutError:
                raise ConnectionLost(f"not all streams were opened within {STREAMS_TIMEOUT_S:g} s") from None
            return await run(self._begin, CommandChannels(**found, plain_status=version not in WITH_STATUS))

        return await self._converse(peer, work())

    # ----------------------------------------------------------------------------- WebSocket

    def _choose_websocket(self, request: Request) -> Beginning:
        forwards = isinstance(self._wish, PortForwardOptions)
        forms = FORWARD_FORMS if forwards else COMMAND_FORMS
        known = [*forms, TUNNEL] if forwards else list(forms)
        chosen = websocket.choose(request.values("sec-websocket-protocol"), [each for each in known if each])
        if chosen is None:
            raise Refused(403, f"none of the subprotocols is known; known: {', '.join(filter(None, known))}")
        if isinstance(self._wish, PortForwardOptions) and chosen != TUNNEL:
            self._check_ports(self._wish.ports, forms[chosen])
        self._protocol = f"WebSocket {chosen}"
        connection = WSConnection(ConnectionType.SERVER)
        try:
            connection.initiate_upgrade_connection(list(request.headers), request.path)
            answer = connection.send(AcceptConnection(subprotocol=chosen or None))
        except WebSocketError as error:
            raise Refused(400, f"no WebSocket handshake: {error}") from error

        async def go_on(wire: TcpWire) -> str:
            socket = WebSocket(wire, connection)
            if chosen == TUNNEL:
                return await self._tunnel(socket)
            if forwards:
                return await self._forward_websocket(socket, forms[chosen])
            return await self._command_websocket(socket, forms[chosen])

        return answer, go_on

    def _check_ports(self, ports: Sequence[int], form: Form) -> None:
        most = 5 if form.base64 else 127  # a channel is a digit, or a byte
        if not 0 < len(ports) <= most:
            raise Refused(400, f"{len(ports)} ports were asked for; accepted here: 1 to {most}")

    async def _tunnel(self, socket: WebSocket) -> str:
        wire = TunnelWire(socket)
        outcome = await self._forward_spdy(wire)
        with suppress(ConnectionLost):
            await wire.finish()
        return outcome

    async def _command_websocket(self, socket: WebSocket, form: Form) -> str:
        wish = self._wish
        assert not isinstance(wish, PortForwardOptions)
        peer = WebSocketPeer(socket, form, 5, self._idle)
        stdin, stdout, stderr, error, resize = peer.channels
        channels = CommandChannels(
            error=error,
            stdin=stdin if wish.stdin else None,
            stdout=stdout if wish.stdout else None,
            stderr=stderr if wish.stderr else None,
            resize=resize if wish.tty else None,
            plain_status=not form.status,
        )

        async def work() -> str:
            # tells the client that it is connected, before the command has anything to say
            await (channels.stdout or channels.stderr or error).write(b"")
            return await run(self._begin, channels)

        return await self._converse(peer, work())

    async def _forward_websocket(self, socket: WebSocket, form: Form) -> str:
        wish = self._wish
        assert isinstance(wish, PortForwardOptions)
        peer = WebSocketPeer(socket, form, 2 * len(wish.ports), self._idle)

        async def work() -> str:
            connections = []
            for index, port in enumerate(wish.ports):
                data, error = peer.channels[2 * index : 2 * index + 2]
                for channel in (data, error):
                    await channel.write(port.to_bytes(2, "little"))
                connections.append(forward(self._dial, port, data, error))
            await asyncio.gather(*connections)
            return "closed"

        return await self._converse(peer, work())

    # ------------------------------------------------------------------------------- backend

    async def _begin(self) -> Session:
        if isinstance(self._wish, ExecOptions):
            return await self._backend.exec(self._wish)
        assert isinstance(self._wish, AttachOptions)
        return await self._backend.attach(self._wish)

    async def _dial(self, port: int) -> PortConnection:
        assert isinstance(self._wish, PortForwardOptions)
        return await self._backend.dial(self._wish.pod_id, port)


async def _gather(peer: SpdyPeer, wanted: set[str]) -> dict[str, Any]:
    """The streams of a remote command, once all are there. Raises ConnectionLost."""
    found: dict[str, Channel] = {}
    async for channel in peer.arrivals():
        kind = channel.headers.get("streamtype", "")
        if kind in wanted and kind not in found:
            found[kind] = channel
        else:
            channel.reset()
        if len(found) == len(wanted):
            return found
    raise ConnectionLost("the client opened no more streams, and not all that it asked for")


def _subject(wish: SessionOptions) -> str:
    return wish.pod_id if isinstance(wish, PortForwardOptions) else wish.container_id
