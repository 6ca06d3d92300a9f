"""The channel protocols over WebSocket messages, without a socket."""

from __future__ import annotations

import pytest
from wsproto.events import BytesMessage, TextMessage

from cri.streaming.websocket_messages import (
    COMMAND_SUBPROTOCOLS,
    TEXT_MAX,
    ChannelData,
    ChannelEnd,
    Decoder,
    Subprotocol,
    SubprotocolError,
    choose_subprotocol,
    encode,
)

BINARY, BASE64, V5 = Subprotocol(), Subprotocol(base64=True), Subprotocol(half_close=True)


def decoded(subprotocol: Subprotocol, *messages: bytes | str) -> list[ChannelData | ChannelEnd]:
    decoder = Decoder(subprotocol)
    found: list[ChannelData | ChannelEnd] = []
    for each in messages:
        found += decoder.feed(BytesMessage(data=each) if isinstance(each, bytes) else TextMessage(data=each))
    return found


def test_binary_messages_are_decoded() -> None:
    assert decoded(BINARY, b"\0abc", b"", b"\4", b"\xffxyz") == [
        ChannelData(0, b"abc"),
        ChannelData(255, b"xyz"),
    ]


def test_base64_messages_are_decoded() -> None:
    assert decoded(BASE64, "0YWJj", "", "4", "2/w==") == [ChannelData(0, b"abc"), ChannelData(2, b"\xff")]


def test_half_close_exists_in_v5_only() -> None:
    assert decoded(V5, b"\0a", b"\xff\0", b"\xff") == [ChannelData(0, b"a"), ChannelEnd(0)]
    assert decoded(BINARY, b"\xff\0") == [ChannelData(255, b"\0")]


def test_binary_message_is_decoded_as_its_parts_arrive() -> None:
    decoder = Decoder(V5)
    seen: list[ChannelData | ChannelEnd] = []
    for data, last in (
        (b"", False),
        (b"\1", False),
        (b"ab", False),
        (b"c", True),
        (b"\xff", False),
        (b"\0", True),
    ):
        seen += decoder.feed(BytesMessage(data=data, frame_finished=last, message_finished=last))
    assert seen == [ChannelData(1, b"ab"), ChannelData(1, b"c"), ChannelEnd(0)]


def test_base64_message_is_decoded_when_complete() -> None:
    decoder = Decoder(BASE64)
    seen: list[ChannelData | ChannelEnd] = []
    for data, last in (("1Y", False), ("WJ", False), ("j", True)):
        seen += decoder.feed(TextMessage(data=data, frame_finished=last, message_finished=last))
    assert seen == [ChannelData(1, b"abc")]


@pytest.mark.parametrize(
    ("subprotocol", "message"),
    [
        (BINARY, "text"),
        (BASE64, b"\0bytes"),
        (BASE64, "xYWJj"),
        (BASE64, "\u0663YWJj"),
        (BASE64, "1?"),
        (BASE64, "1YWJ"),
        (BASE64, "1" + "A" * TEXT_MAX),
    ],
)
def test_invalid_message_is_an_error(subprotocol: Subprotocol, message: bytes | str) -> None:
    with pytest.raises(SubprotocolError):
        decoded(subprotocol, message)


@pytest.mark.parametrize("subprotocol", [BINARY, BASE64, V5])
def test_encoded_message_decodes_unchanged(subprotocol: Subprotocol) -> None:
    assert list(Decoder(subprotocol).feed(encode(subprotocol, 1, b"\0\xffdata"))) == [
        ChannelData(1, b"\0\xffdata")
    ]
    assert list(Decoder(subprotocol).feed(encode(subprotocol, 1, b""))) == []


def test_first_supported_subprotocol_of_the_client_is_chosen() -> None:
    known = [name for name in COMMAND_SUBPROTOCOLS if name]
    assert (
        choose_subprotocol(["v9.channel.k8s.io", "v4.channel.k8s.io", "v5.channel.k8s.io"], known)
        == "v4.channel.k8s.io"
    )
    assert choose_subprotocol([], known) == ""
    assert choose_subprotocol(["v9.channel.k8s.io"], known) is None
