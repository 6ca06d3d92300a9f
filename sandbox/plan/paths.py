"""Texts and paths that come from a client and go into a plan: what the kernel can take at all. Pure."""

from __future__ import annotations

import posixpath

from sandbox.errors import InvalidSpec

MAX_PATH_BYTES = 4095  # PATH_MAX without its zero byte


def checked(text: str, field: str) -> str:
    """`text`, if it can be an argument of a system call and a protobuf string.

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
    """An absolute path, in one spelling: no `..`, no doubled or trailing slashes. Raises InvalidSpec.

    Only spelling: links are followed by the agent, beneath the container's root.
    """
    checked(path, field)
    if not path.startswith("/"):
        raise InvalidSpec(field, f"{path!r} is relative", "an absolute path in the container")
    if len(path.encode()) > MAX_PATH_BYTES:
        raise InvalidSpec(field, "is too long", f"{MAX_PATH_BYTES} bytes at most")
    return posixpath.normpath("/" + path.lstrip("/"))


def covers(above: str, path: str) -> bool:
    """Whether `path` is `above` or lies beneath it; both as `container_path` spells them."""
    return path == above or above == "/" or path.startswith(above + "/")


def depth(path: str) -> int:
    return 0 if path == "/" else path.count("/")
