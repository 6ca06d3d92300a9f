"""Parse image references, with Docker's defaults for short names. Pure.

    [domain/]path[:tag][@digest]        busybox -> docker.io/library/busybox:latest

The grammar is that of the distribution project (github.com/distribution/reference, regexp.go). The kubelet
and crictl expect the defaults: repo tags of images are full names.
"""

from __future__ import annotations

import re

import msgspec

from image.errors import InvalidReference

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"
NAME_LIMIT = 255  # characters of domain and path (distribution's NameTotalLengthMax)

_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]{{1,5}})?")
_PIECE = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_PIECE}(?:/{_PIECE})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128}")
_HEX64 = re.compile(r"[a-f0-9]{64}")


def is_digest(text: str) -> bool:
    """Return whether `text` is a sha256 or sha512 digest (image-spec, descriptor.md, "Digests")."""
    return _DIGEST.fullmatch(text) is not None


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """A normalized image reference; it has a tag, a digest, or both."""

    domain: str
    path: str
    tag: str = ""  # empty only where a digest is given
    digest: str = ""

    @property
    def name(self) -> str:
        """The full repository name: domain and path."""
        return f"{self.domain}/{self.path}"

    @property
    def tagged(self) -> str:
        """The full name with the tag; empty without a tag."""
        return f"{self.name}:{self.tag}" if self.tag else ""

    @property
    def digested(self) -> str:
        """The full name with the digest; empty without a digest."""
        return f"{self.name}@{self.digest}" if self.digest else ""

    @property
    def target(self) -> str:
        """What to request from a registry: the digest if there is one, else the tag."""
        return self.digest or self.tag

    def __str__(self) -> str:
        return self.digested or self.tagged


def parse(text: str) -> Reference:
    """Parse and normalize a reference; without tag and digest the tag is "latest". Raises
    InvalidReference."""
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
    """Split off the tag: a colon after the last slash begins a tag, one before it a port."""
    head, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        return rest, ""
    if not _TAG.fullmatch(tag):
        raise InvalidReference(text, f"bad tag {tag!r}")
    return head, tag


def _split_domain(rest: str) -> tuple[str, str]:
    """Split off the registry: the first component if it looks like a host, else Docker Hub. A name of one
    component on Docker Hub is in library/."""
    first, slash, path = rest.partition("/")
    looks_like_host = "." in first or ":" in first or first == "localhost" or first != first.lower()
    if not slash or not looks_like_host:
        first, path = DEFAULT_DOMAIN, rest
    if first == "index.docker.io":
        first = DEFAULT_DOMAIN
    if first == DEFAULT_DOMAIN and "/" not in path:
        path = f"library/{path}"
    return first, path
