"""The streaming server: one TCP connection is one session, from its token to its end.

    GET or POST /exec|attach|portforward/TOKEN, upgraded to SPDY/3.1 or to a WebSocket

A session is one task and the tasks that it starts. When it ends, for whatever reason, nothing of it is left
in the daemon, and in the guest only what the client started there (see `sandbox.guest.sessions`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import ssl
from dataclasses import dataclass
from typing import Any

from cri.streaming.channels import ConnectionLost
from cri.streaming.http import HttpConnection, Rejected, Request
from cri.streaming.session import AttachOptions, Backend, ExecOptions, PortForwardOptions, SessionOptions
from cri.streaming.tokens import Tokens
from cri.streaming.transport import TcpTransport
from cri.streaming.upgrade import ClientSession

log = logging.getLogger("cri.streaming")

HANDSHAKE_TIMEOUT_S = 10.0
# Connections that have not shown a token yet. A client needs none for long, so a legitimate crowd stays far
# below, and any process of the node could otherwise hold the daemon's descriptors.
HANDSHAKES_MAX = 1024

PATHS: dict[type[SessionOptions], str] = {
    ExecOptions: "exec",
    AttachOptions: "attach",
    PortForwardOptions: "portforward",
}


@dataclass(frozen=True, slots=True)
class StreamingOptions:
    """`address` is an IP address of this host that clients connect to; port 0 is any free one."""

    address: str
    port: int
    idle_timeout_s: float  # without a byte of data in either direction
    tls_cert: str = ""  # PEM files; both or none
    tls_key: str = ""


class StreamingNotServed(Exception):
    """The server cannot start as configured. `key` is the one of [streaming] to change."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"streaming.{key}: {problem}")
        self.key = key
        self.problem = problem


class StreamingServer:
    """Issues the URLs of sessions and serves each of them once, from `start` until `stop`."""

    def __init__(self, backend: Backend, options: StreamingOptions, tokens: Tokens | None = None) -> None:
        self._backend = backend
        self._options = options
        self._tokens = tokens or Tokens()
        self._server: asyncio.Server | None = None
        self._base_url = ""
        self._connections: set[asyncio.Task[Any]] = set()
        self._handshakes = 0

    # ------------------------------------------------------------------------------ life cycle

    async def start(self) -> None:
        """Bind the address and serve. Raises StreamingNotServed."""
        address, port = self._options.address, self._options.port
        tls = self._tls_context() if self._options.tls_cert else None
        try:
            self._server = await asyncio.start_server(
                self._on_connection,
                address,
                port,
                backlog=HANDSHAKES_MAX,
                ssl=tls,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if tls else None,
            )
        except OSError as error:
            problem = error.strerror or str(error)
            raise StreamingNotServed("address", f"cannot bind {address}, port {port}: {problem}") from error
        host = f"[{address}]" if ipaddress.ip_address(address).version == 6 else address
        self._base_url = f"{'https' if tls else 'http'}://{host}:{self._server.sockets[0].getsockname()[1]}"

    def _tls_context(self) -> ssl.SSLContext:
        cert, key = self._options.tls_cert, self._options.tls_key
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(cert, key)
        except OSError as error:  # ssl.SSLError is one
            problem = error.strerror or str(error)
            raise StreamingNotServed("tls_cert", f"cannot load {cert} and {key}: {problem}") from error
        return context

    async def stop(self) -> None:
        """Close the address and end every session. Idempotent."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    def __len__(self) -> int:
        """Return the number of open connections."""
        return len(self._connections)

    def url(self, options: SessionOptions) -> str:
        """Return the URL at which a client can start this session, once and within the next minute.

        Raises TooManyTokens.
        """
        return f"{self._base_url}/{PATHS[type(options)]}/{self._tokens.issue(options)}"

    # --------------------------------------------------------------------------- connections

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._handshakes >= HANDSHAKES_MAX:
            log.warning("closed a new connection: %d others have sent no request yet", self._handshakes)
            writer.transport.abort()
            return
        self._handshakes += 1
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._serve_request(reader, writer)
        except (ConnectionLost, OSError, TimeoutError) as error:
            log.debug("lost a streaming client: %s", error)
        except Exception:
            log.exception("a streaming session failed unexpectedly")
        finally:
            writer.transport.abort()  # what had to be sent was sent: see TcpTransport.close

    async def _serve_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        http = HttpConnection(reader)
        try:
            request = await self._receive_request(http)
            if request is None:
                return
            redeemed = self._redeem(request)
            kind, idle_timeout_s = PATHS[type(redeemed)], self._options.idle_timeout_s
            session = ClientSession(self._backend, redeemed, kind, idle_timeout_s)
            upgrade = session.negotiate(request, http)
        except Rejected as rejected:
            writer.write(http.rejection(rejected))
            await TcpTransport(reader, writer).close()
            return
        await session.serve(upgrade, TcpTransport(reader, writer, request.trailing))

    async def _receive_request(self, http: HttpConnection) -> Request | None:
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                return await http.receive_request()
        finally:
            self._handshakes -= 1

    def _redeem(self, request: Request) -> SessionOptions:
        """Raises Rejected."""
        if request.method not in ("GET", "POST"):
            raise Rejected(405, "only GET and POST are allowed", [("Allow", "GET, POST")])
        empty, *parts = request.path.split("/")
        if empty or len(parts) != 2 or parts[0] not in PATHS.values():
            raise Rejected(404, "not found")
        options = self._tokens.redeem(parts[1])
        if options is None or PATHS[type(options)] != parts[0]:
            raise Rejected(404, "the token is unknown, used or expired")
        return options
