"""The Authorization header for one registry host, and the bearer token exchange.

Docker's "Token Authentication Specification": a 401 names a token service; the client asks it for a token
for one scope, with its credentials if it has any, and shows that token to the registry. An identity token
(OAuth2 refresh token) is exchanged with POST. One token serves the whole pull.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from urllib.parse import urlsplit

import msgspec

from image.auth import Credential
from image.budget import Budget, Limits, OverLimit
from image.errors import Unauthorized
from image.hosts import Host, is_loopback
from image.reference import Reference
from image.registry.challenge import Challenge, parse_challenges
from image.registry.errors import TemporaryFailure, error_detail, is_temporary, retry_after_s
from image.registry.timing import Timing
from image.registry.transport import (
    REDIRECT_LIMIT,
    Response,
    Transport,
    check_url,
    origin,
    redirect_target,
    with_query,
)


class _TokenBody(msgspec.Struct, frozen=True):
    token: str | None = None
    access_token: str | None = None  # OAuth2's name for the same


class Authorizer:
    """Holds what is shown to one host. `header` is empty until a challenge asks for something.

    A registry token (AuthConfig.registry_token) is shown from the first request on.
    """

    def __init__(
        self,
        reference: Reference,
        credential: Credential,
        transport: Transport,
        timing: Timing,
        limits: Limits,
        redirected_to: Host | None = None,
    ) -> None:
        """`redirected_to` is the host, if it is not the one that `transport` was made for."""
        self._reference = reference
        self._credential = credential
        self._transport = transport
        self._timing = timing
        self._limits = limits
        self._redirected_to = redirected_to
        self._lock = asyncio.Lock()
        self.header = f"Bearer {credential.registry_token}" if credential.registry_token else ""

    @property
    def _host(self) -> Host:
        return self._redirected_to or self._transport.host

    async def answer(self, refused: Response) -> None:
        """Set `header` to what the challenges of this 401 ask for.

        Does nothing if `header` changed since that request was sent: a concurrent request got a token.
        Raises Unauthorized when there is no way to authenticate, TemporaryFailure, TransportError.
        """
        shown = refused.request.headers.get("authorization", "")
        async with self._lock:
            if self.header == shown:
                self.header = await self._authorize(self._offered(refused))

    def _offered(self, refused: Response) -> tuple[Challenge, ...]:
        try:
            return parse_challenges(refused.headers.get_list("www-authenticate"), self._limits)
        except OverLimit as error:
            raise self._unauthorized(self._host.address, 401, error.reason) from error

    def redact(self, text: str) -> str:
        """Return `text` without the credential and the token: a server may echo what it was shown."""
        own = self._credential
        secrets = (own.password, own.identity_token, own.registry_token, own.basic.partition(" ")[2])
        for secret in (*secrets, self.header.partition(" ")[2]):
            if secret:
                text = text.replace(secret, "<redacted>")
        return text

    async def _authorize(self, offered: tuple[Challenge, ...]) -> str:
        for challenge in offered:
            if challenge.scheme == "bearer" and not self._credential.registry_token:
                return f"Bearer {await self._token(challenge)}"
        if self._credential.basic and any(challenge.scheme == "basic" for challenge in offered):
            return self._credential.basic
        raise self._unauthorized(self._host.address, 401, self._problem(offered))

    def _problem(self, offered: tuple[Challenge, ...]) -> str:
        if self._credential.registry_token:
            return "the registry token was not accepted"
        schemes = [challenge.scheme for challenge in offered]
        if "basic" in schemes:
            return "credentials are needed"
        return f"supports none of the offered authentication schemes: {', '.join(schemes) or 'none'}"

    def _unauthorized(self, host: str, status: int, detail: str) -> Unauthorized:
        return Unauthorized(str(self._reference), host, status, self.redact(detail))

    # ------------------------------------------------------------------------ token service

    async def _token(self, challenge: Challenge) -> str:
        host = self._host.address
        try:
            check_url(challenge.realm)
        except ValueError as error:
            raise self._unauthorized(host, 401, f"its token service: {error}") from error
        service = urlsplit(challenge.realm).netloc
        try:
            async with asyncio.timeout(self._timing.answer_s):
                body = await self._fetch(challenge)
        except OverLimit as error:
            raise self._unauthorized(service, 200, f"token service: {error.reason}") from error
        except TimeoutError as error:
            raise TemporaryFailure(f"no token from {service} within {self._timing.answer_s:g} s") from error
        try:
            answer = msgspec.json.decode(body, type=_TokenBody)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise TemporaryFailure(f"the response of token service {service} is not a token") from error
        token = answer.token or answer.access_token or ""
        try:
            Budget(self._limits, "token_bytes").check(len(token))
        except OverLimit as error:
            raise self._unauthorized(service, 200, error.reason) from error
        # it becomes a header value
        if not token or not token.isascii() or not token.isprintable():
            raise self._unauthorized(service, 200, "the token service's response holds no valid token")
        return token

    async def _fetch(self, challenge: Challenge) -> bytes:
        response = await self._request(challenge)
        try:
            if not 200 <= response.status_code < 300:
                await self._raise_refused(response)
            return await self._transport.read(response, "token_answer_bytes")
        finally:
            await response.aclose()

    def _check_safe(self, url: str) -> None:
        """Raise Unauthorized for a token service that would get the credential over an open network."""
        parts = urlsplit(url)
        own = self._host
        if parts.scheme != "https" and own.scheme != "http" and not is_loopback(parts.netloc):
            raise self._unauthorized(own.address, 401, "its token service does not use https")

    async def _request(self, challenge: Challenge) -> Response:
        """Ask the token service, and follow its redirects. A credential is sent to one origin only."""
        url, form = self._question(challenge)
        service = origin(url)
        for _ in range(REDIRECT_LIMIT):
            self._check_safe(url)
            response = await self._send(url, form, trusted=origin(url) == service)
            target = self._redirect_target(response)
            if target is None:
                return response
            await response.aclose()
            if form and response.status_code not in (307, 308):
                form = {}  # becomes a GET (RFC 9110, 15.4)
            url = target
        raise self._unauthorized(urlsplit(url).netloc, response.status_code, "too many redirects")

    async def _send(self, url: str, form: Mapping[str, str], *, trusted: bool) -> Response:
        if form and not trusted:
            problem = "the token service redirects to another host, which must not get the identity token"
            raise self._unauthorized(urlsplit(url).netloc, 401, problem)
        if form:
            return await self._transport.post(url, form)
        basic = self._credential.basic
        return await self._transport.get(url, {"Authorization": basic} if basic and trusted else {})

    def _redirect_target(self, response: Response) -> str | None:
        try:
            return redirect_target(response)
        except ValueError as error:
            host = self._host.address
            raise self._unauthorized(host, response.status_code, f"token service: {error}") from error

    def _question(self, challenge: Challenge) -> tuple[str, Mapping[str, str]]:
        """Return the URL to ask, and the form to post to it; empty for a GET."""
        own = self._credential
        scope = challenge.scope or f"repository:{self._reference.path}:pull"
        if own.identity_token:
            return challenge.realm, {
                "grant_type": "refresh_token",
                "refresh_token": own.identity_token,
                "service": challenge.service,
                "scope": scope,
                "client_id": "husk",
            }
        return with_query(challenge.realm, {"service": challenge.service, "scope": scope}), {}

    async def _raise_refused(self, response: Response) -> None:
        status, service = response.status_code, response.request.url.netloc.decode("ascii", "replace")
        if is_temporary(status):
            problem = f"token service {service} answered {status}"
            raise TemporaryFailure(problem, retry_after_s(response.headers))
        detail = await error_detail(response, self._timing.connect_s)
        raise self._unauthorized(service, status, detail or "the token service issued no token")
