"""The HTTP request of a client and its response, by h11: everything before the connection is upgraded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import h11

HEADER_MAX = 64 << 10
BODY_MAX = 64 << 10  # of a POST, whose body is ignored


class Rejected(Exception):
    """The request is answered with this error, and the connection is closed."""

    def __init__(self, code: int, text: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Request:
    """A complete request."""

    method: str
    path: str  # without the query
    headers: Sequence[tuple[bytes, bytes]]
    trailing: bytes  # bytes after the request, of the protocol to be upgraded to

    def values(self, name: str) -> list[str]:
        """Return every value of a header, in order; a line may have several, separated by commas."""
        wanted = name.lower().encode()
        lines = [value.decode("latin-1") for key, value in self.headers if key == wanted]
        return [part.strip() for line in lines for part in line.split(",") if part.strip()]


class HttpConnection:
    """A connection that was not upgraded yet: one request, one response."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADER_MAX)

    async def receive_request(self) -> Request | None:
        """Read the request; None if the client closed without one. Raises Rejected, OSError."""
        try:
            head = await self._next_event()
            if not isinstance(head, h11.Request):
                return None
            body = 0
            while isinstance(event := await self._next_event(), h11.Data):
                body += len(event.data)
                if body > BODY_MAX:
                    raise Rejected(413, f"the body is larger than {BODY_MAX} bytes")
        except h11.RemoteProtocolError as error:
            raise Rejected(error.error_status_hint, f"not a valid HTTP request: {error}") from error
        return Request(
            head.method.decode(),
            head.target.decode("latin-1").partition("?")[0],
            list(head.headers),
            bytes(self._connection.trailing_data[0]),
        )

    async def _next_event(self) -> object:
        while (event := self._connection.next_event()) is h11.NEED_DATA:
            self._connection.receive_data(await self._reader.read(HEADER_MAX))
        return event

    def rejection(self, rejected: Rejected) -> bytes:
        """Return the bytes of the error response; empty when HTTP does not allow one any more."""
        if self._connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return b""
        body = (rejected.text + "\n").encode()
        headers = [
            *rejected.headers,
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        parts = [
            self._connection.send(h11.Response(status_code=rejected.code, headers=headers)),
            self._connection.send(h11.Data(data=body)),
            self._connection.send(h11.EndOfMessage()),
        ]
        return b"".join(part for part in parts if part)

    def switch_protocols(self, headers: Sequence[tuple[str, str]]) -> bytes:
        """Return the bytes of the response 101, after which the connection speaks another protocol."""
        response = h11.InformationalResponse(status_code=101, headers=list(headers))
        return self._connection.send(response) or b""
