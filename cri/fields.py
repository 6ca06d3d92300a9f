"""Checks of single fields of a request. Each raises InvalidSpec with the path of its field, `at`. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from google.protobuf.message import Message

from sandbox.errors import InvalidSpec
from sandbox.host.ids import ID_MAX


class Enum(Protocol):
    """An enum as protobuf generates it."""

    def Name(self, number: Any) -> str:
        """Return the name of a value. Raises ValueError for an unknown one."""

    def keys(self) -> list[str]:
        """Return every name."""


def one_of(enum: Enum, number: int, at: str) -> str:
    """Return the name of an enum value. Raises InvalidSpec for a value of a newer CRI."""
    try:
        return enum.Name(number)
    except ValueError as error:
        raise InvalidSpec(at, f"{number} is unknown", ", ".join(enum.keys())) from error


def optional_id(message: Message, field: str, at: str) -> int | None:
    """Return a user or group id of an Int64Value; None if it is not set. Raises InvalidSpec."""
    if not message.HasField(field):
        return None
    return checked_id(getattr(message, field).value, f"{at}.{field}")


def checked_id(number: int, at: str) -> int:
    """Return a user or group id. Raises InvalidSpec outside 0 to ID_MAX."""
    if not 0 <= number <= ID_MAX:
        raise InvalidSpec(at, f"{number} is not an id", f"0 to {ID_MAX}")
    return number


def checked_ids(numbers: Sequence[int], at: str) -> tuple[int, ...]:
    """Return a list of ids. Raises InvalidSpec as `checked_id` does."""
    return tuple(checked_id(number, f"{at}[{n}]") for n, number in enumerate(numbers))


def required(text: str, at: str) -> str:
    """Return a text that must not be empty. Raises InvalidSpec."""
    if not text:
        raise InvalidSpec(at, "is empty", "a name")
    return text


def absolute(path: str, at: str) -> str:
    """Return an absolute path without NUL. Raises InvalidSpec."""
    if not path.startswith("/") or "\0" in path:
        raise InvalidSpec(at, f"{path!r} is not an absolute path", "an absolute path")
    return path


def absolute_or_empty(path: str, at: str) -> str:
    """Return "" or what `absolute` returns. Raises InvalidSpec."""
    return absolute(path, at) if path else ""


def absolutes(paths: Sequence[str], at: str) -> tuple[str, ...]:
    """Return a list of absolute paths. Raises InvalidSpec as `absolute` does."""
    return tuple(absolute(path, f"{at}[{n}]") for n, path in enumerate(paths))


def refuse_message(message: Message, field: str, at: str, problem: str) -> None:
    """Raise InvalidSpec if a part of the configuration that Husk cannot apply is set."""
    if message.HasField(field):
        raise InvalidSpec(f"{at}.{field}" if at else field, problem, "nothing")


@contextmanager
def renamed(prefix: str, wire: str) -> Iterator[None]:
    """Replace `prefix` by `wire` in the path of an InvalidSpec: the field has that name in this request."""
    try:
        yield
    except InvalidSpec as error:
        field = wire + error.field.removeprefix(prefix) if error.field.startswith(prefix) else error.field
        raise InvalidSpec(field, error.problem, error.accepted) from error
