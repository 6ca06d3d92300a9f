"""HTTP connections to one registry host: TLS settings, timeouts, the fallback to plain HTTP.

The only module that imports the HTTP library; others use `Response` and `TransportError`. Redirects are not
followed here: `endpoint` and `token` decide what may be sent to another host.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import tempfile
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx2
import msgspec

from image.blobs import storage_error
from image.budget import Budget, Limits, OverLimit
from image.errors import MirrorConfigInvalid, RegistryUnavailable
from image.hosts import Host
from image.registry.proxy import ProxyRules
from image.registry.timing import Timing
from sandbox.host import threads

Response = httpx2.Response
TransportError = httpx2.TransportError

REDIRECT_LIMIT = 10
CONNECTION_LIMIT = 64  # per host and pull
SPOOL_BYTES = 64 << 10  # of a body that are kept in memory while it arrives
_REDIRECT_STATUS = frozenset((301, 302, 303, 307, 308))


class Transport:
    """Connections to the host that `host` describes, and to where it redirects. Close it.

    `host` changes once at most: to http, when a registry on loopback does not speak TLS.
    """

    def __init__(self, host: Host, timing: Timing, limits: Limits, scratch: Path) -> None:
        """Bodies that are read whole arrive in nameless files in the directory `scratch`."""
        self.host = host
        self._timing = timing
        self._limits = limits
        self._scratch = scratch
        self._client: httpx2.AsyncClient | None = None

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def get(self, url: str, headers: Mapping[str, str]) -> Response:
        """Send a GET request. The caller reads and closes the response.

        Raises TransportError, RegistryUnavailable (headers above a limit).
        """
        try:
            return await self._send(self._open().build_request("GET", url, headers=dict(headers)))
        except httpx2.ConnectError:
            if not self._fall_back_to_http(url):
                raise
            return await self.get(url.replace("https://", "http://", 1), headers)

    async def post(self, url: str, form: Mapping[str, str]) -> Response:
        """Send a form. The caller reads and closes the response. Raises as `get`."""
        return await self._send(self._open().build_request("POST", url, data=dict(form)))

    async def read(self, response: Response, key: str) -> bytes:
        """Read a whole body and close the response. `key` names the limit of its size.

        It waits in a file while it arrives: many slow ones would take much memory. Raises OverLimit, before
        anything is read if the server says how long it is; TransportError, DiskFull, StorageFailed.
        """
        budget = Budget(self._limits, key)
        announced = response.headers.get("content-length", "")
        if announced.isdecimal() and len(announced) < 20:
            budget.check(int(announced))
        try:
            with tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=str(self._scratch)) as body:
                async for chunk in response.aiter_raw():
                    budget.spend(len(chunk))
                    await threads.run(partial(body.write, chunk), "husk-download", pooled=True)
                await response.aclose()
                body.seek(0)
                return body.read()  # here, from the page cache: those of several threads would wait in memory
        except OSError as error:
            raise storage_error(error, self._scratch / "-", "downloading a document") from error

    async def _send(self, request: httpx2.Request) -> Response:
        try:
            # the read timeout does not see headers that drip, or one interim response after the other
            async with asyncio.timeout(self._timing.answer_s):
                response = await self._open().send(request, stream=True)
        except TimeoutError as error:
            raise httpx2.ReadTimeout(f"no response within {self._timing.answer_s:g} s") from error
        try:
            self._check_headers(response)
        except OverLimit as error:
            await response.aclose()
            raise RegistryUnavailable(request.url.netloc.decode(), "its headers", error.reason) from error
        return response

    def _check_headers(self, response: Response) -> None:
        count, size = Budget(self._limits, "headers"), Budget(self._limits, "header_bytes")
        for name, value in response.headers.raw:
            count.spend()
            size.spend(len(name) + len(value))

    def _fall_back_to_http(self, url: str) -> bool:
        """Use http from now on, if the host is on loopback and no scheme is configured for it.

        Registries on loopback rarely have certificates, and loopback traffic cannot be intercepted.
        """
        if not self.host.plain_fallback or origin(url) != origin(self.host.url):
            return False
        if self.host.scheme == "http":
            return False
        self.host = msgspec.structs.replace(self.host, scheme="http")
        return True

    def _open(self) -> httpx2.AsyncClient:
        if self._client is None:
            timing = self._timing
            connect_s = self.host.dial_timeout_s or timing.connect_s
            self._client = httpx2.AsyncClient(
                transport=_Router(self.host, ProxyRules(os.environ)),
                follow_redirects=False,
                timeout=httpx2.Timeout(timing.stall_s, connect=connect_s, pool=None),
                headers={"User-Agent": "husk"},
                trust_env=False,
            )
        return self._client


class _Router(httpx2.AsyncBaseTransport):
    """Sends each request directly or through the proxy that the environment names for its URL.

    The TLS context is made at the first https URL: loading the system's authorities takes some 20 ms.
    """

    def __init__(self, host: Host, proxies: ProxyRules) -> None:
        self._host = host
        self._proxies = proxies
        self._routes: dict[tuple[str, bool], httpx2.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request. Raises TransportError, MirrorConfigInvalid."""
        proxy, tls = self._proxies.find(str(request.url)), request.url.scheme == "https"
        route = self._routes.get((proxy, tls))
        if route is None:
            route = self._routes[proxy, tls] = self._make_route(proxy, tls)
        return await route.handle_async_request(request)

    def _make_route(self, proxy: str, tls: bool) -> httpx2.AsyncHTTPTransport:
        try:
            return httpx2.AsyncHTTPTransport(
                verify=_tls_context(self._host) if tls else False,
                trust_env=False,
                limits=httpx2.Limits(max_connections=CONNECTION_LIMIT),
                proxy=proxy or None,
            )
        except (ValueError, ImportError, httpx2.InvalidURL) as error:
            # the URL may hold a password
            shown = urlsplit(proxy).netloc.rpartition("@")[2]
            raise httpx2.UnsupportedProtocol(f"proxy {shown} cannot be used: {error}") from None

    async def aclose(self) -> None:
        """Close all connections."""
        for route in self._routes.values():
            await route.aclose()


def redirect_target(response: Response) -> str | None:
    """Return the absolute URL that a redirect points to; None if the response is not a redirect.

    Raises ValueError for a target that is not a valid http or https URL.
    """
    if response.status_code not in _REDIRECT_STATUS:
        return None
    target = urljoin(str(response.request.url), response.headers.get("location", ""))
    check_url(target)
    return target


def check_url(url: str) -> None:
    """Raise ValueError unless `url`, which a server sent, is a valid http or https URL."""
    try:
        parts, port = httpx2.URL(url), urlsplit(url).port
    except (httpx2.InvalidURL, ValueError) as error:
        raise ValueError(f"invalid URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.host or port == 0:
        raise ValueError("not an http or https URL")


def origin(url: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port: where credentials for `url` may be sent (RFC 6454, section 4)."""
    parts = httpx2.URL(url)
    return parts.scheme, parts.host, parts.port


def with_query(url: str, parameters: Mapping[str, str]) -> str:
    """Return `url` with these parameters added to the query that it already has; empty ones are left out."""
    return str(httpx2.URL(url).copy_merge_params({k: v for k, v in parameters.items() if v}))


def describe(error: TransportError) -> str:
    """Return what failed, for an error message."""
    match error:
        case httpx2.ConnectTimeout():
            return "no connection in time"
        case httpx2.ReadTimeout():
            return "no data in time"
    return str(error) or type(error).__name__


def is_permanent(error: TransportError) -> bool:
    """Return whether no retry helps: a certificate that is not accepted, or an unusable proxy."""
    return isinstance(error, httpx2.UnsupportedProtocol) or "CERTIFICATE_VERIFY_FAILED" in str(error)


def _tls_context(host: Host) -> ssl.SSLContext:
    """Raises MirrorConfigInvalid where a certificate or key of hosts.toml cannot be loaded."""
    if not (host.ca or host.client or host.skip_verify):
        return _default_tls_context()
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


@cache
def _default_tls_context() -> ssl.SSLContext:
    """The system's authorities, read once: a megabyte and some 30 ms each."""
    return ssl.create_default_context()
