"""Parse the challenges of a 401 response (RFC 9110, 11.6.1). Pure.

There is no ping of /v2/: the first request of a pull gets the 401 with the challenges.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import msgspec

from image.budget import Budget, Limits

_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_SEPARATOR = re.compile(r"[\s,]*")
_SCHEME = re.compile(rf"({_TOKEN})(?=\s|,|$)[ \t]*")
_TOKEN68 = re.compile(r"[A-Za-z0-9._~+/-]+=*\s*(?=,|$)")
_PARAMETER = re.compile(rf'[\s,]*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))')


class Challenge(msgspec.Struct, frozen=True, kw_only=True):
    """One way to authenticate that a registry offers; `scheme` is lower case."""

    scheme: str
    realm: str = ""
    service: str = ""
    scope: str = ""


def parse_challenges(headers: Iterable[str], limits: Limits) -> tuple[Challenge, ...]:
    """Return all challenges of the WWW-Authenticate headers, in order.

    A header may hold several challenges, and challenges may lie in several headers. Parameters other than
    realm, service and scope are ignored, and so is what follows the first syntax error of a header. Raises
    OverLimit.
    """
    found: list[Challenge] = []
    size, count = Budget(limits, "challenge_bytes"), Budget(limits, "challenges")
    for header in headers:
        size.spend(len(header))
        for challenge in _parse(header):
            count.spend()
            found.append(challenge)
    return tuple(found)


def _parse(header: str) -> Iterator[Challenge]:
    at = _skip(_SEPARATOR, header, 0)
    while scheme := _SCHEME.match(header, at):
        at = scheme.end()
        parameters: dict[str, str] = {}
        at = _skip(_TOKEN68, header, at)  # the opaque data of Negotiate and its like
        while parameter := _PARAMETER.match(header, at):
            at = parameter.end()
            name, quoted, bare = parameter.groups()
            parameters[name.lower()] = re.sub(r"\\(.)", r"\1", quoted) if quoted else bare or ""
        yield Challenge(
            scheme=scheme.group(1).lower(),
            realm=parameters.get("realm", ""),
            service=parameters.get("service", ""),
            scope=parameters.get("scope", ""),
        )
        at = _skip(_SEPARATOR, header, at)


def _skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at
