"""Protobuf messages for hypothesis, made from descriptors, so that new fields and rpcs are covered.

`any_message` draws any message of a type, `near` changes a valid message in a few places, and `field_edges`
lists all changes of one field each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

M = TypeVar("M", bound=Message)

DEEPEST = 6
FIELDS_MAX = 6  # of one message, so that a message stays small enough to be drawn

_TEXT = (
    *(
        "",
        " ",
        "/",
        ".",
        "..",
        "../..",
        "/dev/null",
        "a/b",
        "a:b",
        "a=b",
        "\0",
        "\n",
        "%s",
        "-1",
        "é",
        "€" * 90,
    ),
    *(
        "x" * 300,
        "0-1",
        "9-0",
        "1" * 40,
        "host",
        "default",
        "runtime/default",
        "localhost/",
        "sha256:" + "0" * 64,
    ),
    *("ALL", "CAP_KILL", "SYS_ADMIN", "memory.max", "2MB", "net.ipv4.ip_forward", "10.0.0.0/8", "fd00::/64"),
)
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_EDGES = (0, 1, 2, 5, 80, 999, 1000, 65535, 65536, 10**6, 10**9)


def any_message(kind: type[M], words: Sequence[str] = ()) -> st.SearchStrategy[M]:
    """Draw any message of this type; `words` are texts of interest, such as existing ids."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> M:
        message = kind()
        _fill(draw, message, words, 0)
        return message

    return draw_one()


def near(seed: M, words: Sequence[str] = ()) -> st.SearchStrategy[M]:
    """Draw a copy of `seed` with up to three fields, at any depth, cleared, set, or added to."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> M:
        message = type(seed)()
        message.CopyFrom(seed)
        for _ in range(draw(st.integers(0, 3))):
            _change(draw, message, words, 0)
        return message

    return draw_one()


Path = tuple[FieldDescriptor, ...]


def field_edges(kind: Descriptor, above: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every field of a message and its submessages, with each edge of its type; for `set_at`."""
    fields: Any = kind.fields
    for field in fields:
        if field.message_type is not None and not is_map(field):
            yield from field_edges(field.message_type, (*above, field))
        else:
            for value in _edges(field):
                yield (*above, field), value


def _edges(field: FieldDescriptor) -> Sequence[Any]:
    if field.message_type is not None:  # a map: of its keys, or of its values
        key, item = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        return [
            *({edge: _edges(item)[0]} for edge in _edges(key)),
            *({"a": edge} for edge in _edges(item)),
        ]
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return (b"\0", b"x" * 300)
        case FieldDescriptor.CPPTYPE_STRING:
            return ("", "\0", "/", "/../..", "€" * 90, "/" + "x" * 5000)
        case FieldDescriptor.CPPTYPE_BOOL:
            return (False, True)
        case FieldDescriptor.CPPTYPE_ENUM:
            assert field.enum_type is not None
            return (*(value.number for value in field.enum_type.values), -1)
    low, high = _INTEGERS[field.cpp_type]
    return (low, -1, high) if low else (0, high)


def set_at(message: Message, path: Path, value: Any) -> None:
    """Set a field; on the way, the first element of a repeated field is used, or added."""
    for field in path[:-1]:
        inner: Any = getattr(message, field.name)
        message = (inner[0] if inner else inner.add()) if field.is_repeated else inner
        message.SetInParent()
    last, there = path[-1], getattr(message, path[-1].name)
    if is_map(last):
        there.update(value)
    elif last.is_repeated:
        there.append(value)
    else:
        setattr(message, last.name, value)


def _fill(draw: st.DrawFn, message: Message, words: Sequence[str], depth: int) -> None:
    fields = _fields(message)
    if not fields or depth > DEEPEST:
        return
    for field in draw(st.lists(st.sampled_from(fields), max_size=FIELDS_MAX, unique_by=lambda f: f.name)):
        _put(draw, message, field, words, depth)


def _change(draw: st.DrawFn, message: Message, words: Sequence[str], depth: int) -> None:
    fields = _fields(message)
    if not fields:
        return
    field = draw(st.sampled_from(fields))
    inner = _inner(draw, message, field) if depth < DEEPEST else None
    if inner is not None and draw(st.integers(0, 3)):
        _change(draw, inner, words, depth + 1)
        return
    if draw(st.integers(0, 4)) == 0:
        message.ClearField(field.name)
    else:
        _put(draw, message, field, words, depth)


def _fields(message: Message) -> list[FieldDescriptor]:
    fields: Any = message.DESCRIPTOR.fields
    return list(fields)


def _inner(draw: st.DrawFn, message: Message, field: FieldDescriptor) -> Message | None:
    """Return a message in this field to descend into; an absent one is created."""
    if field.message_type is None or is_map(field):
        return None
    value: Any = getattr(message, field.name)
    if not field.is_repeated:
        value.SetInParent()
        return value  # type: ignore[no-any-return]
    return draw(st.sampled_from(list(value))) if value else None


def _put(draw: st.DrawFn, message: Message, field: FieldDescriptor, words: Sequence[str], depth: int) -> None:
    value: Any = getattr(message, field.name) if field.is_repeated or field.message_type else None
    if field.message_type is not None and is_map(field):
        key, item = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        for _ in range(draw(st.integers(0, 2))):
            value[draw(_scalar(key, words))] = draw(_scalar(item, words))
    elif field.message_type is not None:
        for _ in range(draw(st.integers(0, 2)) if field.is_repeated else 1):
            inner = value.add() if field.is_repeated else value
            inner.SetInParent()
            _fill(draw, inner, words, depth + 1)
    elif field.is_repeated:
        value.extend(draw(st.lists(_scalar(field, words), max_size=3)))
    else:
        setattr(message, field.name, draw(_scalar(field, words)))


def _scalar(field: FieldDescriptor, words: Sequence[str]) -> st.SearchStrategy[Any]:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return st.binary(max_size=40)
        case FieldDescriptor.CPPTYPE_STRING:
            return st.sampled_from((*words, *_TEXT)) | st.text(max_size=20)
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_ENUM:
            assert field.enum_type is not None
            known = [value.number for value in field.enum_type.values]
            return st.sampled_from([*known, -1, max(known) + 1, 2**31 - 1])
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return st.floats(width=32)
    low, high = _INTEGERS[field.cpp_type]
    edges = [each for each in (*_EDGES, *(-n for n in _EDGES), low, high) if low <= each <= high]
    return st.sampled_from(edges) | st.integers(low, high)


def is_map(field: FieldDescriptor) -> bool:
    """Return whether a field is a map."""
    kind: Descriptor | None = field.message_type
    return kind is not None and bool(kind.GetOptions().map_entry)


def message_class(kind: Descriptor) -> type[Message]:
    """Return the Python class of a message type."""
    return GetMessageClass(kind)
