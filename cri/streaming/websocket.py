"""The channel protocols of Kubernetes over WebSocket messages. Pure.

    binary   | channel | payload ...                 one message: one piece of one channel
    base64   the same as text: a digit, then the payload in base64
    v5       as binary, and | 255 | channel | says that the client has no more on that channel

Channels of a remote command: 0 stdin, 1 stdout, 2 stderr, 3 error, 4 resize.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from wsproto.events import BytesMessage, Message, TextMessage

STDIN, STDOUT, STDERR, ERROR, RESIZE = range(5)
CLOSE_SIGNAL = 255
TUNNEL = "SPDY/3.1+portforward.k8s.io"  # the messages are the bytes of a SPDY connection
TEXT_MAX = 1 << 20  # of a message that must be whole before it can be decoded


@dataclass(frozen=True, slots=True)
class Form:
    """How a subprotocol writes its messages and the end of a command."""

    base64: bool = False
    status: bool = True  # metav1.Status on the error channel; else plain text
    half_close: bool = False


COMMAND_FORMS = {
    "v5.channel.k8s.io": Form(half_close=True),
    "v4.channel.k8s.io": Form(),
    "v4.base64.channel.k8s.io": Form(base64=True),
    "channel.k8s.io": Form(status=False),
    "base64.channel.k8s.io": Form(base64=True, status=False),
    "": Form(status=False),
}
FORWARD_FORMS = {
    "v4.channel.k8s.io": Form(),
    "v4.base64.channel.k8s.io": Form(base64=True),
    "": Form(),
}


AnyMessage = Message[Any]


class ChannelError(Exception):
    """The client sent a message that its subprotocol does not have."""


@dataclass(frozen=True, slots=True)
class Piece:
    channel: int
    data: bytes


@dataclass(frozen=True, slots=True)
class HalfClosed:
    channel: int


def choose(offered: Sequence[str], known: Sequence[str]) -> str | None:
    """The first of the client's that is known; "" where it offers none; None where none fits."""
    return next((name for name in offered if name in known), None if offered else "")


class Decoder:
    """Messages into pieces, as they come: a long binary message is never kept."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._channel: int | None = None  # of the message under way
        self._text = ""

    def feed(self, message: AnyMessage) -> Iterator[Piece | HalfClosed]:
        """Raises ChannelError."""
        if isinstance(message, TextMessage) and self._form.base64:
            yield from self._feed_text(message)
        elif isinstance(message, BytesMessage) and not self._form.base64:
            yield from self._feed_bytes(bytes(message.data), message.message_finished)
        else:
            raise ChannelError("a message of the other kind: text is base64, bytes are binary")

    def _feed_text(self, message: TextMessage) -> Iterator[Piece | HalfClosed]:
        self._text += message.data
        if len(self._text) > TEXT_MAX:
            raise ChannelError(f"a message of more than {TEXT_MAX} bytes")
        if not message.message_finished or not self._text:
            return
        text, self._text = self._text, ""
        if not "0" <= text[0] <= "9":
            raise ChannelError("a message that does not begin with the digit of its channel")
        try:
            data = base64.b64decode(text[1:], validate=True)
        except (binascii.Error, ValueError) as cause:
            raise ChannelError("a message that is no base64") from cause
        if data:
            yield Piece(int(text[0]), data)

    def _feed_bytes(self, data: bytes, last: bool) -> Iterator[Piece | HalfClosed]:
        if self._channel is None and data:
            self._channel, data = data[0], data[1:]
        if data and self._channel is not None:
            if self._channel == CLOSE_SIGNAL and self._form.half_close:
                yield HalfClosed(data[0])
            else:
                yield Piece(self._channel, data)
        if last:
            self._channel = None


def encode(form: Form, channel: int, data: bytes) -> AnyMessage:
    if form.base64:
        return TextMessage(data=f"{channel}{base64.b64encode(data).decode()}")
    return BytesMessage(data=bytes([channel]) + data)
