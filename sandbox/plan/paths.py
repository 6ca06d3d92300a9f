"""Texts and paths from a client: what a system call and a protobuf string can take. Pure."""

from __future__ import annotations

import posixpath

from sandbox.errors import InvalidSpec

MAX_PATH_BYTES = 4095  # PATH_MAX without its zero byte


def checked(text: str, field: str) -> str:
    """Return `text` if it can be an argument of a system call and a protobuf string.

    Raises InvalidSpec for a zero byte and for what UTF-8 cannot encode (lone surrogates of JSON).
    """
    if "\0" in text:
        raise InvalidSpec(field, "has a zero byte")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidSpec(field, "is not valid Unicode") from error
    return text


def container_path(path: str, field: str) -> str:
    """Return an absolute path normalized: no `..`, no doubled or trailing slashes. Raises InvalidSpec.

    Symbolic links are not resolved here: the agent follows them, beneath the container's root.
    """
    checked(path, field)
    if not path.startswith("/"):
        raise InvalidSpec(field, f"{path!r} is relative", "an absolute path in the container")
    if len(path.encode()) > MAX_PATH_BYTES:
        raise InvalidSpec(field, "is too long", f"{MAX_PATH_BYTES} bytes at most")
    return posixpath.normpath("/" + path.lstrip("/"))


def covers(above: str, path: str) -> bool:
    """Return whether `path` is `above` or lies beneath it; both as `container_path` returns them."""
    return path == above or above == "/" or path.startswith(above + "/")


def depth(path: str) -> int:
    """Return the number of a normalized path's components."""
    return 0 if path == "/" else path.count("/")
