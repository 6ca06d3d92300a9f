"""Download a large blob over several connections, each asking for the next part of it.

One connection seldom fills a line. Parts are PART_BYTES, taken in order, so that hashing follows closely
behind writing, and a download that breaks off loses little: the next one continues where the bytes are
complete. distribution-spec, "Pulling blobs": a registry should support Range requests; one that does not is
asked for the whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from image.blobs import BlobPart, BlobWriter
from image.registry.errors import TemporaryFailure
from image.registry.rate import RateFloor
from image.registry.resume import Get, continues_at, watched
from image.registry.retry import Retrier

PARALLEL_BYTES = 32 << 20  # what a blob must still lack
PART_BYTES = 8 << 20


class NoRanges(Exception):
    """The server does not honour the Range header."""


async def download_parts(
    get: Get, into: BlobWriter, floor: RateFloor, retrier: Retrier, path: str, connections: int
) -> bool:
    """Fetch what `into` still lacks; return whether the server could send parts.

    If not, `into` is as it was, or has more of the blob's beginning. `retrier` retries each part, and names
    `path`. Raises RegistryUnavailable and TooSlow; what came in one piece stays in `into`.
    """
    parts = _split(into.written, into.descriptor.size)
    works = asyncio.Event()  # the first part's response shows whether parts can be had

    async def fetch() -> None:
        for begin, end in parts:
            await _fetch(get, into.part(begin, end), floor, retrier, path, works)

    async def join() -> None:
        await works.wait()
        await fetch()

    try:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(fetch())
            others = [group.create_task(join()) for _ in range(connections - 1)]
            await asyncio.wait({first})
            if not works.is_set():  # nothing was left to fetch
                for task in others:
                    task.cancel()
    except BaseExceptionGroup as errors:
        # the first failure cancelled the others
        if isinstance(errors.exceptions[0], NoRanges):
            return False
        raise errors.exceptions[0] from errors
    finally:
        into.forget_parts()
    return True


def _split(begin: int, size: int) -> Iterator[tuple[int, int]]:
    for at in range(begin, size, PART_BYTES):
        yield at, min(at + PART_BYTES, size)


async def _fetch(
    get: Get, part: BlobPart, floor: RateFloor, retrier: Retrier, path: str, works: asyncio.Event
) -> None:
    async def attempt() -> None:
        async with get({"Range": f"bytes={part.at}-{part.end - 1}"}) as response:
            if not continues_at(response, part.at):
                raise NoRanges
            works.set()
            await part.append(watched(response, floor))
        if part.at < part.end:
            raise TemporaryFailure(f"the stream ended at byte {part.at} of {part.end}")

    await retrier.run(path, attempt, lambda: part.at)
