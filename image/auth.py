"""The credentials of one pull. Pure. Their `repr` hides every field, so that no log shows a secret."""

from __future__ import annotations

import base64

import msgspec

_HUB = frozenset(("docker.io", "index.docker.io", "registry-1.docker.io"))


class Auth(msgspec.Struct, frozen=True, kw_only=True):
    """AuthConfig of the CRI, as the client sent it."""

    username: str = ""
    password: str = ""
    auth: str = ""  # base64 of "username:password", as in a docker config file
    server_address: str = ""
    identity_token: str = ""
    registry_token: str = ""

    def __repr__(self) -> str:
        return "Auth(...)"

    __str__ = __repr__


class Credential(msgspec.Struct, frozen=True, kw_only=True):
    """What may be sent to one registry. At most one of the three forms is set."""

    username: str = ""
    password: str = ""
    identity_token: str = ""  # an OAuth2 refresh token
    registry_token: str = ""  # a bearer token, ready for use

    def __repr__(self) -> str:
        return "Credential(...)"

    __str__ = __repr__

    @property
    def basic(self) -> str:
        """The value of a Basic Authorization header (RFC 7617); empty without user and password."""
        if not self.username and not self.password:
            return ""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


ANONYMOUS = Credential()


def find_credential(auth: Auth | None, *, hosts: tuple[str, ...]) -> Credential:
    """Return the part of `auth` for a registry that is known by these names ("host" or "host:port").

    ANONYMOUS when `server_address` names another host. The order of the forms is containerd's.
    """
    if auth is None or (auth.server_address and not _names(auth.server_address, hosts)):
        return ANONYMOUS
    if auth.username:
        return Credential(username=auth.username, password=auth.password)
    if auth.identity_token:
        return Credential(identity_token=auth.identity_token)
    if auth.auth:
        return _decoded(auth.auth)
    return Credential(registry_token=auth.registry_token)


def _names(server_address: str, hosts: tuple[str, ...]) -> bool:
    """Return whether `server_address`, a host or a URL such as "https://index.docker.io/v1/", is one of these
    hosts. All names of Docker Hub are the same."""
    named = server_address.partition("://")[2] if "://" in server_address else server_address
    host = named.partition("/")[0].lower()
    return any(host == known.lower() or (host in _HUB and known in _HUB) for known in hosts)


def _decoded(text: str) -> Credential:
    """Decode `auth.auth`. An invalid value counts as none: the registry's refusal then reaches the client."""
    try:
        username, _, password = base64.b64decode(text, validate=True).decode().partition(":")
    except ValueError:  # not base64, or not UTF-8
        return ANONYMOUS
    return Credential(username=username, password=password.rstrip("\0"))
