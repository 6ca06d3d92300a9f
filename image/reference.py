"""Image references: parsing, and Docker's rules for what a short name means.

    [domain/]path[:tag][@digest]        busybox -> docker.io/library/busybox:latest

The grammar is that of the distribution project; the defaults are those that every client of a
container runtime expects (contract: repo tags are full names). Pure.
"""

from __future__ import annotations

import re

import msgspec

from image.errors import InvalidReference

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"
NAME_LIMIT = 255

_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]{{1,5}})?")
_PIECE = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_PIECE}(?:/{_PIECE})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128}")
_HEX64 = re.compile(r"[a-f0-9]{64}")


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    domain: str
    path: str
    tag: str = ""  # empty only where a digest is given
    digest: str = ""

    @property
    def name(self) -> str:
        """The full repository name."""
        return f"{self.domain}/{self.path}"

    @property
    def tagged(self) -> str:
        return f"{self.name}:{self.tag}" if self.tag else ""

    @property
    def digested(self) -> str:
        return f"{self.name}@{self.digest}" if self.digest else ""

    @property
    def target(self) -> str:
        """What to ask a registry for: the digest wins over the tag."""
        return self.digest or self.tag

    def __str__(self) -> str:
        return self.digested or self.tagged


def parse(text: str) -> Reference:
    """Normalise a reference. Raises InvalidReference."""
    rest, _, digest = text.partition("@")
    if "@" in text and not is_digest(digest):
        raise InvalidReference(text, "a digest is sha256: and 64, or sha512: and 128 lower-case hex digits")
    rest, tag = _split_tag(text, rest)
    if _HEX64.fullmatch(rest):
        raise InvalidReference(text, "a name cannot be 64 hex digits, which is an id")
    domain, path = _split_domain(rest)
    if not _DOMAIN.fullmatch(domain):
        raise InvalidReference(text, f"bad registry name {domain!r}")
    if path != path.lower():
        raise InvalidReference(text, "a repository name must be lower case")
    if not _PATH.fullmatch(path):
        raise InvalidReference(text, "bad repository name")
    if len(domain) + 1 + len(path) > NAME_LIMIT:
        raise InvalidReference(text, f"a name has at most {NAME_LIMIT} characters")
    if not tag and not digest:
        tag = DEFAULT_TAG
    return Reference(domain=domain, path=path, tag=tag, digest=digest)


def _split_tag(text: str, rest: str) -> tuple[str, str]:
    """A colon behind the last slash begins a tag; before it, a port."""
    head, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        return rest, ""
    if not _TAG.fullmatch(tag):
        raise InvalidReference(text, f"bad tag {tag!r}")
    return head, tag


def _split_domain(rest: str) -> tuple[str, str]:
    """The first piece is a registry if it looks like a host; a bare name is Docker Hub's library."""
    first, slash, path = rest.partition("/")
    looks_like_host = "." in first or ":" in first or first == "localhost" or first != first.lower()
    if not slash or not looks_like_host:
        first, path = DEFAULT_DOMAIN, rest
    if first == "index.docker.io":
        first = DEFAULT_DOMAIN
    if first == DEFAULT_DOMAIN and "/" not in path:
        path = f"library/{path}"
    return first, path
