"""Download a blob, continuing after a broken connection where the last attempt ended.

distribution-spec, "Pulling blobs": a registry should support Range requests. One that ignores them answers
200 with the whole blob, which then replaces what was written so far.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager

from image.blobs import BlobWriter
from image.registry.errors import TemporaryFailure
from image.registry.rate import RateFloor
from image.registry.transport import Response

Get = Callable[[Mapping[str, str]], AbstractAsyncContextManager[Response]]


async def download_rest(get: Get, into: BlobWriter, floor: RateFloor) -> None:
    """Append to `into` what it still lacks. `get` sends the request with these additional headers.

    Raises TemporaryFailure when the stream ends early or is slow, TooSlow when it stays slow; the bytes that
    came stay in `into`.
    """
    if into.written and into.written == into.descriptor.size:
        return
    headers = {"Range": f"bytes={into.written}-"} if into.written else {}
    async with get(headers) as response:
        if into.written and not continues_at(response, into.written):
            into.restart()
        await into.append(watched(response, floor))
    if into.written < into.descriptor.size:
        raise TemporaryFailure(f"the stream ended at byte {into.written} of {into.descriptor.size}")


def continues_at(response: Response, offset: int) -> bool:
    """Return whether the server honoured the Range header at exactly this offset (RFC 9110, 14.4)."""
    content_range = response.headers.get("content-range", "")
    return response.status_code == 206 and content_range.startswith(f"bytes {offset}-")


async def watched(response: Response, floor: RateFloor) -> AsyncIterator[bytes]:
    """Yield the body; raise TemporaryFailure or TooSlow when it comes below the least rate.

    The client's read timeout does not see a server that sends one byte every 20 s.
    """
    async for chunk in response.aiter_raw():
        floor.count(len(chunk))
        yield chunk
