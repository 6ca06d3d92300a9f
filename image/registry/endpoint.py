"""One host that serves a repository: the requests for manifests and blobs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from image import manifest
from image.auth import ANONYMOUS, Auth, find_credential
from image.blobs import BlobWriter
from image.budget import Limits, OverLimit
from image.errors import ManifestInvalid, RegistryUnavailable
from image.hosts import HUB_SERVER, Host
from image.reference import DEFAULT_DOMAIN, Reference
from image.registry.challenge import parse_challenges
from image.registry.errors import TemporaryFailure, check_status
from image.registry.parts import PARALLEL_BYTES, download_parts
from image.registry.rate import RateFloor, TooSlow
from image.registry.resume import download_rest
from image.registry.retry import Retrier
from image.registry.timing import Timing
from image.registry.token import Authorizer
from image.registry.transport import (
    REDIRECT_LIMIT,
    Response,
    Transport,
    TransportError,
    origin,
    redirect_target,
)

ACCEPT = ", ".join((*manifest.INDEXES, *manifest.MANIFESTS, "application/json;q=0.5"))
_MIRROR_ATTEMPTS = 2  # the registry itself can still be asked after a mirror


class Endpoint:
    """Reads one repository from one host, with that host's credential, token and retries. Close it.

    Its methods raise ManifestNotFound, Unauthorized, RegistryUnavailable, DigestMismatch.
    """

    def __init__(
        self,
        host: Host,
        reference: Reference,
        auth: Auth | None,
        timing: Timing,
        limits: Limits,
        scratch: Path,
    ) -> None:
        self._reference = reference
        self._timing = timing
        self._limits = limits
        self._transport = Transport(host, timing, limits, scratch)
        # credentials for the registry itself must not reach its mirrors
        names = (host.address,) if host.mirror else (host.address, reference.domain)
        credential = find_credential(auth, hosts=names)
        self._authorizer = Authorizer(reference, credential, self._transport, timing, limits)
        # of registries that this host redirects to
        self._anonymous: dict[tuple[str, str, int | None], Authorizer] = {}
        attempts = min(_MIRROR_ATTEMPTS, timing.attempts) if host.mirror else timing.attempts
        self._retrier = Retrier(host.address, timing, attempts)

    @property
    def host(self) -> Host:
        """The host's configuration, with the scheme that it turned out to speak."""
        return self._transport.host

    async def close(self) -> None:
        """Close its connections. Idempotent."""
        await self._transport.close()

    async def read(self, path: str, key: str) -> tuple[bytes, Mapping[str, str]]:
        """Return a whole body, and the response's headers. `key` names the limit of its size.

        The body may have megabytes: callers drop it before their next await. Raises ManifestInvalid above the
        limit.
        """

        async def attempt() -> tuple[bytes, Mapping[str, str]]:
            try:
                async with asyncio.timeout(self._timing.answer_s), self._get(path, {}) as response:
                    return await self._transport.read(response, key), response.headers
            except TimeoutError as error:
                raise TemporaryFailure(f"no whole answer within {self._timing.answer_s:g} s") from error

        try:
            return await self._retrier.run(path, attempt)
        except OverLimit as error:
            raise ManifestInvalid(f"{self.host.address}: {path}", error.reason) from error

    async def download(self, path: str, into: BlobWriter, *, parallel: bool) -> None:
        """Append to `into` what it still lacks of this blob. Its digest is not checked here."""

        large = into.descriptor.size - into.written > PARALLEL_BYTES
        if parallel and large and self._timing.connections > 1 and await self._download_parts(path, into):
            return
        floor, useful = RateFloor(self._timing), 0

        async def attempt() -> None:
            nonlocal useful
            floor.begin()
            try:
                await download_rest(lambda headers: self._get(path, headers), into, floor)
            except (TemporaryFailure, TransportError):
                if floor.end():
                    useful = into.written
                raise

        try:
            await self._retrier.run(path, attempt, lambda: useful)
        except TooSlow as error:
            raise RegistryUnavailable(self.host.address, path, f"too slow: {error}") from error

    async def _download_parts(self, path: str, into: BlobWriter) -> bool:
        floor = RateFloor(self._timing)
        try:
            return await download_parts(
                lambda headers: self._get(path, headers),
                into,
                floor,
                self._retrier,
                path,
                self._timing.connections,
            )
        except TooSlow as error:
            raise RegistryUnavailable(self.host.address, path, f"too slow: {error}") from error

    # ----------------------------------------------------------------------------- requests

    @contextlib.asynccontextmanager
    async def _get(self, path: str, headers: Mapping[str, str]) -> AsyncIterator[Response]:
        """Yield a 200 or 206 response, authenticated and redirected as needed; raise for any other."""
        response = await self._request(path, headers)
        try:
            if response.status_code == 401:
                await response.aclose()
                await self._authorizer.answer(response)
                response = await self._request(path, headers)  # a second 401 is final
            trusted = True  # until the first redirect to another origin, whatever comes after it
            for _ in range(REDIRECT_LIMIT):
                if (target := self._redirect_target(response)) is None:
                    break
                await response.aclose()
                trusted = trusted and origin(str(response.request.url)) == origin(target)
                response = await self._follow(target, headers, trusted=trusted)
            await check_status(
                response, host=self.host.address, name=self._reference.name, path=path,
                timeout_s=self._timing.connect_s, redact=self._authorizer.redact,
            )  # fmt: skip
            yield response
        finally:
            await response.aclose()

    async def _request(self, path: str, headers: Mapping[str, str]) -> Response:
        return await self._transport.get(self._url(path), self._headers(headers))

    def _url(self, path: str) -> str:
        url = f"{self.host.url}/{self._reference.path}/{path}"
        registry = HUB_SERVER if self._reference.domain == DEFAULT_DOMAIN else self._reference.domain
        # containerd's convention: a mirror of several registries learns from `ns` which one is meant
        return f"{url}?ns={self._reference.domain}" if self.host.address != registry else url

    def _headers(self, extra: Mapping[str, str]) -> dict[str, str]:
        headers = {"Accept": ACCEPT, "Accept-Encoding": "identity", **dict(self.host.headers), **extra}
        if self._authorizer.header:
            headers["Authorization"] = self._authorizer.header
        return headers

    def _redirect_target(self, response: Response) -> str | None:
        try:
            return redirect_target(response)
        except ValueError as error:
            raise RegistryUnavailable(self.host.address, "redirect", f"its target: {error}") from error

    async def _follow(self, target: str, headers: Mapping[str, str], *, trusted: bool) -> Response:
        """Request a redirect's target. Credentials and configured headers are for the registry alone.

        Another registry that asks for a token is shown one that its token service gives to anybody. Raises
        Unauthorized, TemporaryFailure, TransportError.
        """
        if trusted:
            return await self._transport.get(target, self._headers(headers))
        place = origin(target)
        authorizer = self._anonymous.get(place)
        response = await self._get_untrusted(target, headers, authorizer)
        if response.status_code != 401 or not self._asks_for_token(response):
            return response
        await response.aclose()
        if authorizer is None:
            other = Host(scheme=place[0], address=urlsplit(target).netloc.rpartition("@")[2])
            authorizer = Authorizer(
                self._reference, ANONYMOUS, self._transport, self._timing, self._limits, other
            )
            authorizer = self._anonymous.setdefault(place, authorizer)
        await authorizer.answer(response)
        return await self._get_untrusted(target, headers, authorizer)

    async def _get_untrusted(
        self, target: str, headers: Mapping[str, str], authorizer: Authorizer | None
    ) -> Response:
        shown = {"Accept": ACCEPT, "Accept-Encoding": "identity", **headers}
        if authorizer is not None and authorizer.header:
            shown["Authorization"] = authorizer.header
        return await self._transport.get(target, shown)

    def _asks_for_token(self, refused: Response) -> bool:
        """Return whether a 401 names a token service; that of a file server with signed URLs does not."""
        try:
            offered = parse_challenges(refused.headers.get_list("www-authenticate"), self._limits)
        except OverLimit:
            return False
        return any(challenge.scheme == "bearer" for challenge in offered)
