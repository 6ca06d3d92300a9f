"""/metrics and /healthz over HTTP, from threads, so that neither a scrape nor a slow client delays a call.

At most CONNECTIONS_MAX clients are served at a time, each for at most DEADLINE_S; further ones get 503. The
cost of a scrape grows with the node's pods, so clients within CACHE_S share one result.
"""

from __future__ import annotations

import http.server
import logging
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from prometheus_client.exposition import choose_encoder

from cri.metrics import Metrics

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 8
DEADLINE_S = 10.0  # of a connection, from accept to close
SCRAPE_TIMEOUT_S = 5.0  # for which a client waits for the scrape of another one
CACHE_S = 1.0
POLL_S = 0.5  # how often deadlines are checked
BUSY = b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\n\r\n"


class MetricsNotServed(Exception):
    """The address of /metrics cannot be bound."""

    def __init__(self, address: str, port: int, problem: str) -> None:
        advice = "set another metrics.port in the configuration, or 0 to serve none"
        super().__init__(f"cannot serve metrics on {address}:{port}: {problem}; {advice}")
        self.address = address
        self.port = port
        self.problem = problem


class MetricsServer:
    """Serves /metrics and /healthz over HTTP from `start` until `close`.

    The constructor binds the port and raises MetricsNotServed. A client that connects before `start` waits.
    """

    def __init__(self, metrics: Metrics, address: str, port: int) -> None:
        try:
            self._server = _HttpServer((address, port), _handler_for(_Scrapes(metrics)))
        except OSError as error:
            raise MetricsNotServed(address, port, error.strerror or str(error)) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(POLL_S,), name="metrics", daemon=True
        )

    def start(self) -> None:
        """Answer requests, in a thread per connection."""
        self._thread.start()

    @property
    def port(self) -> int:
        """The bound port, also when the system chose it (port 0)."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop serving and close the port. Blocks up to 5 s for the accepting thread."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join(timeout=5)
        self._server.server_close()


class ScrapeTimeout(Exception):
    """Another client's scrape did not end in time."""


class _Scrapes:
    """Encodes the metrics, once per CACHE_S and content type."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._running = threading.Lock()
        self._cached: dict[str, tuple[float, bytes]] = {}

    def scrape(self, accept: str) -> tuple[str, bytes]:
        """Return content type and body for an Accept header. Raises ScrapeTimeout."""
        encode, content_type = choose_encoder(accept)
        if not self._running.acquire(timeout=SCRAPE_TIMEOUT_S):
            raise ScrapeTimeout
        try:
            at, body = self._cached.get(content_type, (0.0, b""))
            if not body or time.monotonic() - at > CACHE_S:
                body = encode(self._metrics.registry)
                # choose_encoder returns one of a few content types, whatever the header says
                self._cached[content_type] = (time.monotonic(), body)
        finally:
            self._running.release()
        return content_type, body


class _HttpServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._deadlines: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            busy = len(self._deadlines) >= CONNECTIONS_MAX
            if not busy:
                self._deadlines[request] = time.monotonic() + DEADLINE_S
        if not busy:
            super().process_request(request, client_address)
            return
        with suppress(OSError):
            request.setblocking(False)
            request.send(BUSY)
        self.shutdown_request(request)

    def service_actions(self) -> None:
        """End connections after their deadline. Called by serve_forever, at least every POLL_S."""
        now = time.monotonic()
        with self._lock:
            for request, deadline in self._deadlines.items():
                if now > deadline:
                    with suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._deadlines.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("the connection to a metrics client broke", exc_info=True)


def _handler_for(scrapes: _Scrapes) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = DEADLINE_S  # of each read and write

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._answer_metrics()
            elif path == "/healthz":
                self._answer(200, "text/plain", b"ok\n")
            else:
                self._answer(404, "text/plain", b"not found; this server has /metrics and /healthz\n")

        def _answer_metrics(self) -> None:
            try:
                content_type, body = scrapes.scrape(self.headers.get("Accept", ""))
            except ScrapeTimeout:
                self._answer(503, "text/plain", b"another scrape has not ended yet\n")
            else:
                self._answer(200, content_type, body)

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            log.debug(format, *args)

    return Handler
