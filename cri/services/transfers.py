"""husk.v1.Images: pulls and imports that tell how far they are.

For people at a terminal, so unlike a kubelet's pull the work ends with its caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

from cri.metrics import Metrics
from cri.ports import Images
from cri.proto import husk_v1_pb2 as pb
from cri.services.images import Downloads
from image.auth import Auth
from image.blobs import Progress
from image.index import Image
from sandbox.errors import InvalidSpec

Report = Callable[[Progress], None]


class TransferCalls:
    def __init__(self, images: Images, metrics: Metrics) -> None:
        self._images = images
        self._metrics = metrics

    async def Pull(self, request: pb.PullRequest) -> AsyncIterator[pb.Progress]:
        if not request.image:
            raise InvalidSpec("image", "is empty", "a name")
        auth = (
            Auth(username=request.username, password=request.password)
            if request.username or request.password
            else None
        )

        async def pull(report: Report) -> Sequence[Image]:
            with self._metrics.pulling() as pulling:
                downloads = Downloads(pulling.count)

                def both(progress: Progress) -> None:
                    downloads(progress)
                    report(progress)

                return [await self._images.pull(request.image, auth, on_progress=both)]

        async for progress in _told(pull):
            yield progress

    async def Import(self, request: pb.ImportRequest) -> AsyncIterator[pb.Progress]:
        if not request.path.startswith("/"):
            raise InvalidSpec("path", f"{request.path!r} is not absolute", "a path on the node")
        path = Path(request.path)

        async def load(report: Report) -> Sequence[Image]:
            return await self._images.import_archive(path, name=request.name, on_progress=report)

        async for progress in _told(load):
            yield progress


async def _told(work: Callable[[Report], Awaitable[Sequence[Image]]]) -> AsyncIterator[pb.Progress]:
    """What `work` reports as it goes on, and what it made, last."""
    inbox = _Inbox()

    async def run() -> Sequence[Image]:
        try:
            return await work(inbox.put)
        finally:
            inbox.close()

    task = asyncio.create_task(run())
    try:
        while not inbox.closed:
            for progress in await inbox.take():
                yield _wire(progress)
        for image in await task:
            names = (*image.repo_tags, *image.repo_digests)
            yield pb.Progress(done=pb.Done(image_id=image.id, names=names))
    finally:
        task.cancel()
        await asyncio.wait({task})


class _Inbox:
    """The newest report of each item: a slow reader misses steps in between, and costs no memory."""

    def __init__(self) -> None:
        self._news: dict[tuple[str, str], Progress] = {}
        self._ready = asyncio.Event()
        self._closing = False

    @property
    def closed(self) -> bool:
        return self._closing and not self._news

    def put(self, progress: Progress) -> None:
        self._news[progress.item, progress.step] = progress
        self._ready.set()

    def close(self) -> None:
        self._closing = True
        self._ready.set()

    async def take(self) -> Sequence[Progress]:
        await self._ready.wait()
        if not self._closing:
            self._ready.clear()
        news, self._news = list(self._news.values()), {}
        return news


def _wire(progress: Progress) -> pb.Progress:
    return pb.Progress(item=progress.item, step=progress.step, current=progress.current, total=progress.total)
