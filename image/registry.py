"""Speaks the registry protocol (OCI distribution-spec 1.1, Docker Registry v2): the read half of it.

The only user of the HTTP client. One `Registry` serves one pull: it knows the hosts to ask, in
order, the credential, and the tokens it was given; `close` it. Every answer is bounded in size and
time, every wait is bounded too, and what a server says reaches an error only shortened.

Retries: what may pass (a lost connection, a stall, 429, 5xx) is tried again with growing pauses,
or the pause that the server asks for. A mirror is given up sooner than the registry itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

import httpx
import msgspec

from image import manifest
from image.auth import Auth, Challenge, Credential, challenges, credential
from image.blobs import BlobWriter, Fetched
from image.errors import (
    DigestMismatch,
    ImageError,
    ManifestInvalid,
    ManifestNotFound,
    MirrorConfigInvalid,
    RegistryUnavailable,
    Unauthorized,
)
from image.hosts import HUB_SERVER, Host, is_loopback
from image.manifest import Descriptor
from image.reference import DEFAULT_DOMAIN, Reference, is_digest

T = TypeVar("T")

ACCEPT = ", ".join((*manifest.INDEXES, *manifest.MANIFESTS, "application/json;q=0.5"))
REDIRECT_LIMIT = 10
TOKEN_LIMIT = 1 << 20
ERROR_BODY_LIMIT = 16 << 10
_PASSING = frozenset((408, 425, 429, 500, 502, 503, 504))
_REDIRECTS = frozenset((301, 302, 303, 307, 308))


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How patient a pull is. A stream that brings less than `stall_bytes` in `stall_s` has stalled."""

    connect_s: float = 15.0
    stall_s: float = 30.0
    stall_bytes: int = 1024
    answer_s: float = 60.0  # a whole manifest, token or small blob
    attempts: int = 5
    backoff_s: float = 0.5
    backoff_limit_s: float = 30.0


class _ErrorItem(msgspec.Struct, frozen=True):
    code: str = ""
    message: str = ""


class _ErrorBody(msgspec.Struct, frozen=True):
    errors: list[_ErrorItem] = []


class _Token(msgspec.Struct, frozen=True):
    token: str = ""
    access_token: str = ""


class _Passing(Exception):
    """Worth another try."""

    def __init__(self, problem: str, pause_s: float | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.pause_s = pause_s


class Registry:
    """The `Source` that is a registry."""

    def __init__(
        self, reference: Reference, hosts: tuple[Host, ...], auth: Auth | None, timing: Timing | None = None
    ) -> None:
        timing = timing or Timing()
        self._reference = reference
        self._timing = timing
        self._endpoints = [_Endpoint(host, reference, auth, timing) for host in hosts]

    async def close(self) -> None:
        for endpoint in self._endpoints:
            await endpoint.close()

    async def manifest(self, target: str, size: int | None = None) -> Fetched:
        """Raises ManifestNotFound, Unauthorized, RegistryUnavailable, DigestMismatch."""

        async def ask(endpoint: _Endpoint) -> Fetched:
            data, headers = await endpoint.small(f"manifests/{target}", manifest.MANIFEST_LIMIT)
            what = f"manifest {self._reference.name} {target}"
            told = headers.get("docker-content-digest", "")
            wanted = target if is_digest(target) else told if is_digest(told) else ""
            if wanted:
                manifest.check(what, data, wanted, size)
            return Fetched(
                data=data,
                digest=wanted or manifest.digest_of(data),
                media_type=headers.get("content-type", ""),
            )

        return await self._first("pull" if is_digest(target) else "resolve", ask)

    async def small_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        if descriptor.size > limit:
            raise ManifestInvalid(
                f"blob {descriptor.digest}", f"{descriptor.size} bytes, the limit is {limit}"
            )

        async def ask(endpoint: _Endpoint) -> bytes:
            data, _ = await endpoint.small(f"blobs/{descriptor.digest}", descriptor.size)
            manifest.check(f"blob {descriptor.digest}", data, descriptor.digest, descriptor.size)
            return data

        return await self._first("pull", ask)

    async def blob(self, descriptor: Descriptor, into: BlobWriter) -> None:
        async def ask(endpoint: _Endpoint) -> None:
            try:
                await endpoint.blob(f"blobs/{descriptor.digest}", into)
                await into.finish()
            except DigestMismatch:
                into.restart()
                raise

        await self._first("pull", ask)

    async def _first(self, capability: str, ask: Callable[[_Endpoint], Awaitable[T]]) -> T:
        """Ask the hosts in turn. The last one's error counts: it is the registry itself."""
        able = [e for e in self._endpoints if capability in e.host.capabilities]
        if not able:
            raise RegistryUnavailable(self._reference.domain, capability, "no configured host may be asked")
        failures: list[ImageError] = []
        for endpoint in able:
            try:
                return await ask(endpoint)
            except (ManifestNotFound, Unauthorized, RegistryUnavailable, DigestMismatch) as error:
                failures.append(error)
        last = failures[-1]
        for mirror in failures[:-1]:
            last.add_note(f"a mirror was asked before: {mirror}")
        raise last


class _Endpoint:
    """One host: its connections, its token, its retries."""

    def __init__(self, host: Host, reference: Reference, auth: Auth | None, timing: Timing) -> None:
        self.host = host
        self._reference = reference
        self._timing = timing
        self._attempts = min(2, timing.attempts) if host.mirror else timing.attempts
        names = (host.address,) if host.mirror else (host.address, reference.domain)
        self._credential = credential(auth, hosts=names)
        self._authorization = ""
        if self._credential.registry_token:
            self._authorization = f"Bearer {self._credential.registry_token}"
        self._signing_in = asyncio.Lock()
        self._client: httpx.AsyncClient | None = None

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    # --------------------------------------------------------------------------- operations

    async def small(self, path: str, limit: int) -> tuple[bytes, Mapping[str, str]]:
        """A whole answer of at most `limit` bytes."""

        async def once() -> tuple[bytes, Mapping[str, str]]:
            try:
                async with asyncio.timeout(self._timing.answer_s), self._get(path, {}) as response:
                    return await _bounded_body(response, limit), response.headers
            except TimeoutError as error:
                raise _Passing(f"no whole answer within {self._timing.answer_s:g} s") from error

        return await self._persist(path, once)

    async def blob(self, path: str, into: BlobWriter) -> None:
        """Fetch what `into` still lacks; an attempt that brought something does not count as failed."""

        async def once() -> None:
            headers = {"Range": f"bytes={into.written}-"} if into.written else {}
            if into.written == into.descriptor.size and into.written:
                return
            async with self._get(path, headers) as response:
                if into.written and not _continues(response, into.written):
                    into.restart()
                await into.take(self._flow(response))
            if into.written < into.descriptor.size:
                raise _Passing(f"the stream ended at byte {into.written} of {into.descriptor.size}")

        await self._persist(path, once, lambda: into.written)

    async def _persist(
        self, path: str, once: Callable[[], Awaitable[T]], progress: Callable[[], int] | None = None
    ) -> T:
        failed = 0
        seen = 0
        while True:
            try:
                return await once()
            except (_Passing, httpx.TransportError) as error:
                failed += 1
                if progress is not None and progress() > seen:
                    seen, failed = progress(), 1
                problem = _problem(error)
                if failed >= self._attempts or not _may_pass(error):
                    raise RegistryUnavailable(self.host.address, path, problem, failed) from error
                await self._pause(failed, path, error)

    async def _pause(self, failed: int, path: str, error: Exception) -> None:
        pause_s = min(self._timing.backoff_s * 2 ** (failed - 1), self._timing.backoff_limit_s)
        pause_s *= random.uniform(0.75, 1.25)
        asked_s = error.pause_s if isinstance(error, _Passing) else None
        if asked_s is not None:
            if asked_s > self._timing.backoff_limit_s:
                problem = f"{_problem(error)}, asks to come back in {asked_s:.0f} s"
                raise RegistryUnavailable(self.host.address, path, problem, failed) from error
            pause_s = max(asked_s, 0.0)
        await asyncio.sleep(pause_s)

    async def _flow(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The body, watched for trickling: a read timeout alone never sees one byte every 20 s."""
        begun, count = time.monotonic(), 0
        async for chunk in response.aiter_raw():
            count += len(chunk)
            now = time.monotonic()
            if now - begun > self._timing.stall_s:
                if count < self._timing.stall_bytes:
                    raise _Passing(f"only {count} bytes in {now - begun:.0f} s")
                begun, count = now, 0
            yield chunk

    # ----------------------------------------------------------------------------- requests

    @contextlib.asynccontextmanager
    async def _get(self, path: str, headers: Mapping[str, str]) -> AsyncIterator[httpx.Response]:
        """A good answer (200 or 206), signed in and redirected as needed; else raises."""
        response = await self._send(self._url(path), self._headers(headers))
        try:
            if response.status_code == 401:
                response = await self._signed_in(path, headers, response)
            for _ in range(REDIRECT_LIMIT):
                if response.status_code not in _REDIRECTS:
                    break
                response = await self._follow(response, headers)
            await self._check(response, path)
            yield response
        finally:
            await response.aclose()

    def _url(self, path: str) -> str:
        url = f"{self.host.url}/{self._reference.path}/{path}"
        origin = HUB_SERVER if self._reference.domain == DEFAULT_DOMAIN else self._reference.domain
        # containerd's way of telling a mirror whose images are meant
        return f"{url}?ns={self._reference.domain}" if self.host.address != origin else url

    def _headers(self, extra: Mapping[str, str]) -> dict[str, str]:
        headers = {"Accept": ACCEPT, "Accept-Encoding": "identity", **dict(self.host.headers), **extra}
        if self._authorization:
            headers["Authorization"] = self._authorization
        return headers

    async def _send(self, url: str, headers: Mapping[str, str]) -> httpx.Response:
        if self._client is None:
            self._client = self._make_client()
        try:
            request = self._client.build_request("GET", url, headers=dict(headers))
            return await self._client.send(request, stream=True)
        except httpx.ConnectError:
            if not self._turn_plain():
                raise
            return await self._send(url.replace("https://", "http://", 1), headers)

    def _turn_plain(self) -> bool:
        """Registries on loopback rarely have certificates; nobody can listen in there."""
        if not self.host.plain_fallback or self.host.scheme == "http":
            return False
        self.host = msgspec.structs.replace(self.host, scheme="http")
        return True

    def _make_client(self) -> httpx.AsyncClient:
        timing = self._timing
        return httpx.AsyncClient(
            verify=_tls(self.host),
            follow_redirects=False,
            timeout=httpx.Timeout(timing.stall_s, connect=timing.connect_s, pool=None),
            limits=httpx.Limits(max_connections=16),
            headers={"User-Agent": "husk"},
        )

    async def _follow(self, response: httpx.Response, headers: Mapping[str, str]) -> httpx.Response:
        """Storage lies elsewhere; the credential is for the registry alone."""
        location = response.headers.get("location", "")
        await response.aclose()
        here = str(response.request.url)
        there = urljoin(here, location)
        parts = urlsplit(there)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise RegistryUnavailable(
                self.host.address, "redirect", "to something that is no http(s) address"
            )
        sent = self._headers(headers)
        if _origin(here) != _origin(there):
            sent = {"Accept-Encoding": "identity", **headers}
        return await self._send(there, sent)

    async def _check(self, response: httpx.Response, path: str) -> None:
        status = response.status_code
        if status in (200, 206):
            return
        detail = await self._detail(response)
        reference = f"{self._reference.name} {path}"
        if status in (401, 403):
            raise Unauthorized(reference, self.host.address, status, detail)
        if status == 404:
            raise ManifestNotFound(reference, self.host.address, detail or "404")
        text = f"answered {status}" + (f" {detail}" if detail else "")
        if status == 416:
            raise _Passing(text)
        if status in _PASSING:
            raise _Passing(text, _retry_after(response))
        raise RegistryUnavailable(self.host.address, path, text)

    async def _detail(self, response: httpx.Response) -> str:
        """The codes and messages of an error answer (distribution-spec, "Error Codes")."""
        try:
            async with asyncio.timeout(self._timing.connect_s):
                body = await _bounded_body(response, ERROR_BODY_LIMIT)
            found = msgspec.json.decode(body, type=_ErrorBody)
        except (
            _Passing,
            ImageError,
            httpx.TransportError,
            TimeoutError,
            msgspec.DecodeError,
            UnicodeDecodeError,
        ):
            return ""
        text = "; ".join(f"{e.code}: {e.message}".strip(": ") for e in found.errors[:3])
        return self._redacted(text)

    def _redacted(self, text: str) -> str:
        """A hostile or careless server may send a secret back in its message."""
        shown = self._credential
        secrets = (shown.password, shown.identity_token, shown.registry_token, shown.basic.partition(" ")[2])
        for secret in (*secrets, self._authorization.partition(" ")[2]):
            if secret:
                text = text.replace(secret, "<redacted>")
        return text

    # ------------------------------------------------------------------------------ sign-in

    async def _signed_in(
        self, path: str, headers: Mapping[str, str], refused: httpx.Response
    ) -> httpx.Response:
        """Answer the challenge and ask once more; a second 401 is final."""
        shown = refused.request.headers.get("authorization", "")
        await refused.aclose()
        async with self._signing_in:
            # another request may have fetched a token meanwhile
            if self._authorization == shown:
                offered = challenges(refused.headers.get("www-authenticate", ""))
                self._authorization = await self._answer(offered)
        return await self._send(self._url(path), self._headers(headers))

    async def _answer(self, offered: tuple[Challenge, ...]) -> str:
        for challenge in offered:
            if challenge.scheme == "bearer" and not self._credential.registry_token:
                return f"Bearer {await self._token(challenge)}"
        for challenge in offered:
            if challenge.scheme == "basic" and self._credential.basic:
                return self._credential.basic
        raise Unauthorized(str(self._reference), self.host.address, 401, self._why(offered))

    def _why(self, offered: tuple[Challenge, ...]) -> str:
        if self._credential.registry_token:
            return "the registry token was not accepted"
        if any(challenge.scheme == "basic" for challenge in offered):
            return "credentials are needed"
        return "no known way of signing in is offered"

    async def _token(self, challenge: Challenge) -> str:
        realm = urlsplit(challenge.realm)
        safe = realm.scheme == "https" or self.host.scheme == "http" or is_loopback(realm.netloc)
        if realm.scheme not in ("http", "https") or not realm.netloc or not safe:
            raise Unauthorized(str(self._reference), self.host.address, 401, "its token service is not safe")
        try:
            async with asyncio.timeout(self._timing.answer_s):
                response = await self._ask_token(challenge)
                try:
                    if response.status_code != 200:
                        await self._refused_token(response, realm.netloc)
                    body = await _bounded_body(response, TOKEN_LIMIT)
                finally:
                    await response.aclose()
        except TimeoutError as error:
            raise _Passing(f"no token from {realm.netloc} within {self._timing.answer_s:g} s") from error
        try:
            answer = msgspec.json.decode(body, type=_Token)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _Passing(f"{realm.netloc} sent something that is no token") from error
        token = answer.token or answer.access_token
        if not token or not token.isascii() or not token.isprintable():
            raise Unauthorized(str(self._reference), realm.netloc, 200, "no token in the answer")
        return token

    async def _ask_token(self, challenge: Challenge) -> httpx.Response:
        assert self._client is not None
        shown: Credential = self._credential
        scope = challenge.scope or f"repository:{self._reference.path}:pull"
        if shown.identity_token:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": shown.identity_token,
                "service": challenge.service,
                "scope": scope,
                "client_id": "husk",
            }
            request = self._client.build_request("POST", challenge.realm, data=form)
        else:
            # an httpx `params` would replace what the realm already carries
            query = {"service": challenge.service, "scope": scope}
            url = httpx.URL(challenge.realm).copy_merge_params({k: v for k, v in query.items() if v})
            headers = {"Authorization": shown.basic} if shown.basic else {}
            request = self._client.build_request("GET", url, headers=headers)
        return await self._client.send(request, stream=True)

    async def _refused_token(self, response: httpx.Response, host: str) -> None:
        status = response.status_code
        if status in _PASSING:
            raise _Passing(f"token service {host} answered {status}", _retry_after(response))
        detail = await self._detail(response)
        raise Unauthorized(str(self._reference), host, status, detail or "no token was given")


# ----------------------------------------------------------------------------------- helpers


async def _bounded_body(response: httpx.Response, limit: int) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > limit:
            raise DigestMismatch("an answer's size", f"at most {limit}", "more")
    return bytes(body)


def _continues(response: httpx.Response, offset: int) -> bool:
    """Whether a server honoured the Range header, at the very byte asked for (RFC 9110, 14.4)."""
    told = response.headers.get("content-range", "")
    return response.status_code == 206 and told.startswith(f"bytes {offset}-")


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds, or a date (RFC 9110, 10.2.3)."""
    told = response.headers.get("retry-after", "").strip()
    if told.isdecimal() and len(told) < 9:
        return float(told)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = httpx.URL(url)
    return parts.scheme, parts.host, parts.port


def _may_pass(error: Exception) -> bool:
    """A certificate that does not verify now will not verify in a second."""
    return "CERTIFICATE_VERIFY_FAILED" not in str(error)


def _problem(error: Exception) -> str:
    if isinstance(error, _Passing):
        return error.problem
    kinds: dict[type[Exception], str] = {
        httpx.ConnectTimeout: "no connection in time",
        httpx.ReadTimeout: "no data in time",
    }
    return kinds.get(type(error), "") or str(error) or type(error).__name__


def _tls(host: Host) -> ssl.SSLContext | bool:
    if host.scheme == "http":
        return False
    context = ssl.create_default_context()
    try:
        for authority in host.ca:
            context.load_verify_locations(authority)
        for certificate, key in host.client:
            context.load_cert_chain(certificate, key or None)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join((*host.ca, *(c for c, _ in host.client)))
        raise MirrorConfigInvalid(files, f"cannot be loaded: {error}") from error
    if host.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
