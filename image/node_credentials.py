"""Credentials that the node itself has for registries: docker's config.json, and its credential helpers.

    {"auths": {"registry.example.com": {"auth": "base64 of user:password"},
               "registry.example.com/team": {"username": "u", "password": "p"},
               "https://index.docker.io/v1/": {"identitytoken": "..."}},
     "credHelpers": {"registry.example.org": "ecr-login"},
     "credsStore": "pass"}

They are used for pulls that bring none. The file and the helpers are asked at each pull, so a change needs
no restart. A helper is the program docker-credential-NAME, found in the directories of PATH: it is called
with the argument "get", reads the registry and writes JSON. What cannot be read is logged, and the pull goes
on without.
Source: docker's documentation of `docker login`, "Credential stores"; paths as keys: containers-auth.json(5).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from image.auth import Auth
from image.errors import bounded
from image.hosts import HUB_SERVER, Host
from image.reference import DEFAULT_DOMAIN, Reference
from sandbox.host import process

log = logging.getLogger(__name__)

FILE_LIMIT = 1 << 20
HELPER_TIMEOUT_S = 10.0
HELPER_OUTPUT_LIMIT = 1 << 16
HUB_KEY = "https://index.docker.io/v1/"  # what docker calls its own registry
_TOKEN_USER = "<token>"  # with this user name, a helper's secret is an identity token
_NOT_THERE = b"credentials not found"  # how a helper that has none begins its message


class _Entry(msgspec.Struct, frozen=True, rename="lower"):
    auth: str | None = None
    username: str | None = None
    password: str | None = None
    identitytoken: str | None = None
    registrytoken: str | None = None


class _File(msgspec.Struct, frozen=True, rename="camel"):
    auths: dict[str, _Entry] | None = None
    cred_helpers: dict[str, str] | None = None
    creds_store: str | None = None


class _Answer(msgspec.Struct, frozen=True, rename="pascal"):
    username: str
    secret: str


class NodeCredentials:
    """The credentials of one config.json; None and a file that does not exist hold none."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    async def find(self, host: Host, reference: Reference) -> Auth | None:
        """Return the credentials for a host that serves a repository; None without any.

        A mirror is looked up by its own name, so it never gets what is meant for the registry.
        """
        if self._file is None:
            return None
        content = await asyncio.to_thread(_read, self._file)
        registry = host.address if host.mirror else reference.domain
        known = _keys(registry, reference)
        helpers = {_place(key): name for key, name in (content.cred_helpers or {}).items()}
        for key in known:
            if name := helpers.get(key, ""):
                return await _ask(name, _spoken(registry), host.address)
        if content.creds_store and (
            found := await _ask(content.creds_store, _spoken(registry), host.address)
        ):
            return found
        entries = {_place(key): entry for key, entry in (content.auths or {}).items()}
        return next((_auth(entries[key], host.address) for key in known if key in entries), None)


def _read(file: Path) -> _File:
    try:
        with file.open("rb") as opened:
            return msgspec.json.decode(opened.read(FILE_LIMIT), type=_File)
    except FileNotFoundError:
        return _File()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        log.warning("credentials of the node cannot be read, pulls go on without: %s: %s", file, error)
        return _File()


def _keys(registry: str, reference: Reference) -> tuple[str, ...]:
    """Return the places of a repository for which credentials may be kept, the closest first."""
    names = [registry]
    if registry in (DEFAULT_DOMAIN, HUB_SERVER):
        names = [DEFAULT_DOMAIN, "index.docker.io", HUB_SERVER]
    return tuple(key for name in names for key in _above(f"{name}/{reference.path}"))


def _above(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition("/")[0]


def _place(key: str) -> str:
    """Return the host and path of a key, which may be a URL with the path of an API's version."""
    place = key.partition("://")[2] if "://" in key else key
    place = place.rstrip("/")
    for version in ("/v1", "/v2"):
        place = place.removesuffix(version)
    host, slash, path = place.partition("/")
    return host.lower() + slash + path


def _spoken(registry: str) -> str:
    return HUB_KEY if registry in (DEFAULT_DOMAIN, HUB_SERVER) else registry


def _auth(entry: _Entry, address: str) -> Auth | None:
    auth = Auth(
        username=entry.username or "",
        password=entry.password or "",
        auth=entry.auth or "",
        identity_token=entry.identitytoken or "",
        registry_token=entry.registrytoken or "",
    )
    return msgspec.structs.replace(auth, server_address=address) if auth != Auth() else None


async def _ask(name: str, registry: str, address: str) -> Auth | None:
    """Return what a credential helper has for a registry; None if nothing, or if it fails (logged)."""
    program = f"docker-credential-{name}"
    if "/" in name or not name:
        log.warning("credential helper %r: a name without slashes is needed", bounded(name))
        return None
    try:
        done = await process.run(
            (program, "get"),
            timeout_s=HELPER_TIMEOUT_S,
            max_output=HELPER_OUTPUT_LIMIT,
            environment=os.environ,  # such as HOME, and what a cloud's helper signs in with
            stdin=registry.encode(),
        )
    except (OSError, process.DeadlineExceeded) as error:
        log.warning("credential helper %s cannot be asked for %s: %s", program, registry, error)
        return None
    if done.status != 0:
        said = done.stdout + done.stderr
        if _NOT_THERE not in said:
            text = bounded(said.decode("utf-8", "replace"))
            log.warning(
                "credential helper %s ended with status %d for %s: %s", program, done.status, registry, text
            )
        return None
    try:
        answer = msgspec.json.decode(done.stdout, type=_Answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        log.warning("credential helper %s gave no credentials for %s", program, registry)  # never its output
        return None
    if answer.username == _TOKEN_USER:
        return Auth(identity_token=answer.secret, server_address=address)
    return Auth(username=answer.username, password=answer.secret, server_address=address)
