"""Turn a registry's error responses into exceptions of this package.

`TemporaryFailure` stays inside `image.registry`: `retry` either retries it or raises RegistryUnavailable.
"""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Callable, Mapping

import msgspec

from image.errors import ManifestNotFound, RegistryUnavailable, Unauthorized
from image.registry.transport import Response, TransportError

ERROR_BODY_LIMIT = 16 << 10
_ERRORS_SHOWN = 3
# Worth a retry: request timeout, too early, too many requests (RFC 9110, 8470, 6585), and what a proxy or a
# restarting registry answers.
_TEMPORARY_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504))


class TemporaryFailure(Exception):
    """A failure that a retry may cure. `retry_after_s` is the delay that the server asks for, if any."""

    def __init__(self, problem: str, retry_after_s: float | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.retry_after_s = retry_after_s


class _ErrorItem(msgspec.Struct, frozen=True):
    code: str = ""
    message: str | None = None


class _ErrorBody(msgspec.Struct, frozen=True):
    """The body of an error response (distribution-spec, "Error Codes")."""

    errors: list[_ErrorItem] = []


async def check_status(
    response: Response, *, host: str, name: str, path: str, timeout_s: float, redact: Callable[[str], str]
) -> None:
    """Return for 200 and 206; raise for any other status.

    Raises Unauthorized (401, 403), ManifestNotFound (404), TemporaryFailure (a status worth a retry), else
    RegistryUnavailable. `name` is the repository, `path` what was requested beneath it.
    """
    status = response.status_code
    if status in (200, 206):
        return
    detail = redact(await error_detail(response, timeout_s))
    reference = f"{name} {path}"
    if status in (401, 403):
        raise Unauthorized(reference, host, status, detail)
    if status == 404:
        raise ManifestNotFound(reference, host, detail or "404")
    problem = f"answered {status}" + (f" {detail}" if detail else "")
    if status == 416:
        # the range does not fit what the server holds now: the next attempt starts from what is written
        raise TemporaryFailure(problem)
    if is_temporary(status):
        raise TemporaryFailure(problem, retry_after_s(response.headers))
    raise RegistryUnavailable(host, path, problem)


def is_temporary(status: int) -> bool:
    """Return whether a request that got this status may succeed later."""
    return status in _TEMPORARY_STATUS


async def error_detail(response: Response, timeout_s: float) -> str:
    """Return the codes and messages of an error response; empty if it has none or does not come in time."""
    try:
        async with asyncio.timeout(timeout_s):
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk[:ERROR_BODY_LIMIT]
                if len(body) > ERROR_BODY_LIMIT:
                    return ""
        found = msgspec.json.decode(body, type=_ErrorBody)
    except (TransportError, TimeoutError, RecursionError, msgspec.DecodeError, UnicodeDecodeError):
        return ""
    return "; ".join(f"{e.code}: {e.message or ''}".strip(": ") for e in found.errors[:_ERRORS_SHOWN])


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the delay of a Retry-After header, which holds seconds or a date (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "").strip()
    if value.isdecimal() and len(value) < 9:
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
