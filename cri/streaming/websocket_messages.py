"""The channel subprotocols of Kubernetes over WebSocket messages. Pure.

    binary   | channel | payload ...                 one message is one part of one channel
    base64   the same as text: a digit, then the payload in base64
    v5       as binary, and | 255 | channel | ends the client's direction of that channel

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
TUNNEL = "SPDY/3.1+portforward.k8s.io"  # the messages carry the bytes of a SPDY connection
TEXT_MAX = 1 << 20  # characters of a base64 message, which must be complete to be decoded


@dataclass(frozen=True, slots=True)
class Subprotocol:
    """How a subprotocol encodes messages and the exit status of a command."""

    base64: bool = False
    status: bool = True  # metav1.Status on the error channel; otherwise plain text
    half_close: bool = False


COMMAND_SUBPROTOCOLS = {
    "v5.channel.k8s.io": Subprotocol(half_close=True),
    "v4.channel.k8s.io": Subprotocol(),
    "v4.base64.channel.k8s.io": Subprotocol(base64=True),
    "channel.k8s.io": Subprotocol(status=False),
    "base64.channel.k8s.io": Subprotocol(base64=True, status=False),
    "": Subprotocol(status=False),
}
PORT_FORWARD_SUBPROTOCOLS = {
    "v4.channel.k8s.io": Subprotocol(),
    "v4.base64.channel.k8s.io": Subprotocol(base64=True),
    "": Subprotocol(),
}


AnyMessage = Message[Any]


class SubprotocolError(Exception):
    """The client sent a message that its subprotocol does not allow."""


@dataclass(frozen=True, slots=True)
class ChannelData:
    """Received bytes of a channel; never empty."""

    channel: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ChannelEnd:
    """The client sends no more on this channel (v5)."""

    channel: int


def choose_subprotocol(offered: Sequence[str], supported: Sequence[str]) -> str | None:
    """Return the client's first supported subprotocol; "" if it offered none; None if none is supported."""
    return next((name for name in offered if name in supported), None if offered else "")


class Decoder:
    """Decodes messages as their parts arrive; a long binary message is never buffered."""

    def __init__(self, subprotocol: Subprotocol) -> None:
        self._subprotocol = subprotocol
        self._channel: int | None = None  # of the message that is being received
        self._text = ""

    def feed(self, message: AnyMessage) -> Iterator[ChannelData | ChannelEnd]:
        """Decode one message, or one part of it as wsproto delivers them. Raises SubprotocolError."""
        if isinstance(message, TextMessage) and self._subprotocol.base64:
            yield from self._feed_text(message)
        elif isinstance(message, BytesMessage) and not self._subprotocol.base64:
            yield from self._feed_bytes(bytes(message.data), message.message_finished)
        else:
            kind = "text" if self._subprotocol.base64 else "binary"
            raise SubprotocolError(f"wrong type of message: this subprotocol has {kind} messages only")

    def _feed_text(self, message: TextMessage) -> Iterator[ChannelData | ChannelEnd]:
        self._text += message.data
        if len(self._text) > TEXT_MAX:
            raise SubprotocolError(f"message of more than {TEXT_MAX} characters")
        if not message.message_finished or not self._text:
            return
        text, self._text = self._text, ""
        if not "0" <= text[0] <= "9":
            raise SubprotocolError("message does not begin with the digit of a channel")
        try:
            data = base64.b64decode(text[1:], validate=True)
        except (binascii.Error, ValueError) as cause:
            raise SubprotocolError("message is not valid base64") from cause
        if data:
            yield ChannelData(int(text[0]), data)

    def _feed_bytes(self, data: bytes, last: bool) -> Iterator[ChannelData | ChannelEnd]:
        if self._channel is None and data:
            self._channel, data = data[0], data[1:]
        if data and self._channel is not None:
            if self._channel == CLOSE_SIGNAL and self._subprotocol.half_close:
                yield ChannelEnd(data[0])
            else:
                yield ChannelData(self._channel, data)
        if last:
            self._channel = None


def encode(subprotocol: Subprotocol, channel: int, data: bytes) -> AnyMessage:
    """Encode one message for a channel."""
    if subprotocol.base64:
        return TextMessage(data=f"{channel}{base64.b64encode(data).decode()}")
    return BytesMessage(data=bytes([channel]) + data)
