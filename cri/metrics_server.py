"""/metrics and /healthz over HTTP, from threads, so that neither a scrape nor a slow client delays a call."""

from __future__ import annotations

import http.server
import logging
import threading
from typing import Any

from prometheus_client.exposition import choose_encoder

from cri.metrics import Metrics

log = logging.getLogger(__name__)


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
            self._server = _HttpServer((address, port), _handler_for(metrics))
        except OSError as error:
            raise MetricsNotServed(address, port, error.strerror or str(error)) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)

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


class _HttpServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("the connection to a metrics client broke", exc_info=True)


def _handler_for(metrics: Metrics) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10  # seconds; an idle or stuck client must not keep its thread

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._answer(200, content_type, encode(metrics.registry))
            elif path == "/healthz":
                self._answer(200, "text/plain", b"ok\n")
            else:
                self._answer(404, "text/plain", b"not found; this server has /metrics and /healthz\n")

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            log.debug(format, *args)

    return Handler
