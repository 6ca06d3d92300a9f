"""The channel protocols over WebSocket messages, without a socket."""

from __future__ import annotations

import pytest
from wsproto.events import BytesMessage, TextMessage

from cri.streaming.websocket import (
    COMMAND_FORMS,
    TEXT_MAX,
    ChannelError,
    Decoder,
    Form,
    HalfClosed,
    Piece,
    choose,
    encode,
)

BINARY, BASE64, V5 = Form(), Form(base64=True), Form(half_close=True)


def decoded(form: Form, *messages: bytes | str) -> list[Piece | HalfClosed]:
    decoder = Decoder(form)
    found: list[Piece | HalfClosed] = []
    for each in messages:
        found += decoder.feed(BytesMessage(data=each) if isinstance(each, bytes) else TextMessage(data=each))
    return found


def test_binary() -> None:
    assert decoded(BINARY, b"\0abc", b"", b"\4", b"\xffxyz") == [Piece(0, b"abc"), Piece(255, b"xyz")]


def test_base64() -> None:
    assert decoded(BASE64, "0YWJj", "", "4", "2/w==") == [Piece(0, b"abc"), Piece(2, b"\xff")]


def test_half_close_is_v5s_alone() -> None:
    assert decoded(V5, b"\0a", b"\xff\0", b"\xff") == [Piece(0, b"a"), HalfClosed(0)]
    assert decoded(BINARY, b"\xff\0") == [Piece(255, b"\0")]


def test_a_message_in_pieces() -> None:
    decoder = Decoder(V5)
    seen: list[Piece | HalfClosed] = []
    for data, last in (
        (b"", False),
        (b"\1", False),
        (b"ab", False),
        (b"c", True),
        (b"\xff", False),
        (b"\0", True),
    ):
        seen += decoder.feed(BytesMessage(data=data, frame_finished=last, message_finished=last))
    assert seen == [Piece(1, b"ab"), Piece(1, b"c"), HalfClosed(0)]


def test_text_in_pieces() -> None:
    decoder = Decoder(BASE64)
    seen: list[Piece | HalfClosed] = []
    for data, last in (("1Y", False), ("WJ", False), ("j", True)):
        seen += decoder.feed(TextMessage(data=data, frame_finished=last, message_finished=last))
    assert seen == [Piece(1, b"abc")]


@pytest.mark.parametrize(
    ("form", "message"),
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
def test_what_is_no_message(form: Form, message: bytes | str) -> None:
    with pytest.raises(ChannelError):
        decoded(form, message)


@pytest.mark.parametrize("form", [BINARY, BASE64, V5])
def test_what_is_written_can_be_read(form: Form) -> None:
    assert list(Decoder(form).feed(encode(form, 1, b"\0\xffdata"))) == [Piece(1, b"\0\xffdata")]
    assert list(Decoder(form).feed(encode(form, 1, b""))) == []


def test_the_first_that_is_known_is_chosen() -> None:
    known = [name for name in COMMAND_FORMS if name]
    assert (
        choose(["v9.channel.k8s.io", "v4.channel.k8s.io", "v5.channel.k8s.io"], known) == "v4.channel.k8s.io"
    )
    assert choose([], known) == ""
    assert choose(["v9.channel.k8s.io"], known) is None
