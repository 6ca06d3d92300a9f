"""Checks on single fields of a request; each names the field by its path. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from google.protobuf.message import Message

from sandbox.errors import InvalidSpec
from sandbox.host.ids import ID_MAX


class Enum(Protocol):
    """A generated enum."""

    def Name(self, number: Any) -> str: ...
    def keys(self) -> list[str]: ...


def one_of(enum: Enum, number: int, at: str) -> str:
    """The value's name. Raises InvalidSpec for a number of a newer CRI."""
    try:
        return enum.Name(number)
    except ValueError as error:
        raise InvalidSpec(at, f"{number} is not known", ", ".join(enum.keys())) from error


def optional_id(message: Message, field: str, at: str) -> int | None:
    """An Int64Value that holds a user or group id."""
    if not message.HasField(field):
        return None
    return checked_id(getattr(message, field).value, f"{at}.{field}")


def checked_id(number: int, at: str) -> int:
    if not 0 <= number <= ID_MAX:
        raise InvalidSpec(at, f"{number} is not an id", f"0 to {ID_MAX}")
    return number


def checked_ids(numbers: Sequence[int], at: str) -> tuple[int, ...]:
    return tuple(checked_id(number, f"{at}[{n}]") for n, number in enumerate(numbers))


def required(text: str, at: str) -> str:
    if not text:
        raise InvalidSpec(at, "is empty", "a name")
    return text


def absolute(path: str, at: str) -> str:
    if not path.startswith("/") or "\0" in path:
        raise InvalidSpec(at, f"{path!r} is not an absolute path", "an absolute path")
    return path


def absolute_or_empty(path: str, at: str) -> str:
    return absolute(path, at) if path else ""


def absolutes(paths: Sequence[str], at: str) -> tuple[str, ...]:
    return tuple(absolute(path, f"{at}[{n}]") for n, path in enumerate(paths))


def refuse_message(message: Message, field: str, at: str, problem: str) -> None:
    """For a part of the configuration that must not be there at all."""
    if message.HasField(field):
        raise InvalidSpec(f"{at}.{field}" if at else field, problem, "nothing")


@contextmanager
def renamed(prefix: str, wire: str) -> Iterator[None]:
    """Around work that knows a field by the name that another request gives it."""
    try:
        yield
    except InvalidSpec as error:
        field = wire + error.field.removeprefix(prefix) if error.field.startswith(prefix) else error.field
        raise InvalidSpec(field, error.problem, error.accepted) from error
