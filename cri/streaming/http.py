"""One HTTP request and its answer, by h11: all that is spoken of HTTP before a connection is upgraded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import h11

HEADER_MAX = 64 << 10
BODY_MAX = 64 << 10  # of a POST, whose body means nothing


class Refused(Exception):
    """The request is answered with this and no more."""

    def __init__(self, code: int, text: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    headers: Sequence[tuple[bytes, bytes]]
    early: bytes  # came behind the request

    def values(self, name: str) -> list[str]:
        """Every value of a header, in order; values of one line are parted by commas."""
        wanted = name.lower().encode()
        lines = [value.decode("latin-1") for key, value in self.headers if key == wanted]
        return [part.strip() for line in lines for part in line.split(",") if part.strip()]


class Exchange:
    """A connection that has not been upgraded yet."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADER_MAX)

    async def request(self) -> Request | None:
        """None when nothing came. Raises Refused, OSError."""
        try:
            head = await self._event()
            if not isinstance(head, h11.Request):
                return None
            body = 0
            while isinstance(event := await self._event(), h11.Data):
                body += len(event.data)
                if body > BODY_MAX:
                    raise Refused(413, "the body is too large")
        except h11.RemoteProtocolError as error:
            raise Refused(error.error_status_hint, f"no HTTP request: {error}") from error
        return Request(
            head.method.decode(),
            head.target.decode("latin-1").partition("?")[0],
            list(head.headers),
            bytes(self._connection.trailing_data[0]),
        )

    async def _event(self) -> object:
        while (event := self._connection.next_event()) is h11.NEED_DATA:
            self._connection.receive_data(await self._reader.read(HEADER_MAX))
        return event

    def refusal(self, refused: Refused) -> bytes:
        if self._connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return b""
        body = (refused.text + "\n").encode()
        headers = [
            *refused.headers,
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        pieces = [
            self._connection.send(h11.Response(status_code=refused.code, headers=headers)),
            self._connection.send(h11.Data(data=body)),
            self._connection.send(h11.EndOfMessage()),
        ]
        return b"".join(piece for piece in pieces if piece)

    def switch(self, headers: Sequence[tuple[str, str]]) -> bytes:
        """101, after which the connection speaks another protocol."""
        answer = h11.InformationalResponse(status_code=101, headers=list(headers))
        return self._connection.send(answer) or b""
