"""The rpcs of husk.v1.Images: pulls and imports that stream their progress.

They serve `husk image` at a terminal, so unlike a kubelet's pull the work is cancelled with its caller.
"""

from __future__ import annotations

import asyncio
import time
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
    """Pull, Import, and the list of those under way."""

    def __init__(self, images: Images, metrics: Metrics) -> None:
        self._images = images
        self._metrics = metrics

    async def Pull(self, request: pb.PullRequest) -> AsyncIterator[pb.Progress]:
        """Pull an image; the last message has its id and names."""
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

        async for progress in _stream(pull):
            yield progress

    async def Import(self, request: pb.ImportRequest) -> AsyncIterator[pb.Progress]:
        """Import an archive or OCI layout of the node; the last messages have the images in it."""
        if not request.path.startswith("/"):
            raise InvalidSpec("path", f"{request.path!r} is not absolute", "a path on the node")
        path = Path(request.path)

        async def load(report: Report) -> Sequence[Image]:
            return await self._images.import_archive(path, name=request.name, on_progress=report)

        async for progress in _stream(load):
            yield progress

    async def ListTransfers(self, request: pb.ListTransfersRequest) -> pb.ListTransfersResponse:
        """List the pulls and imports that are under way, those of the kubelet too."""
        now_s = time.monotonic()
        found = (
            pb.Transfer(
                name=each.name,
                running_ms=int(1000 * (now_s - each.began_s)),
                bytes_received=each.bytes_received,
                bytes_total=each.bytes_total,
                layers_stored=each.stored,
                layers=each.layers,
            )
            for each in self._images.transfers()
        )
        return pb.ListTransfersResponse(transfers=found)


async def _stream(work: Callable[[Report], Awaitable[Sequence[Image]]]) -> AsyncIterator[pb.Progress]:
    """Yield what `work` reports, then the images that it returns."""
    latest = _LatestProgress()

    async def run() -> Sequence[Image]:
        try:
            return await work(latest.put)
        finally:
            latest.close()

    task = asyncio.create_task(run())
    try:
        while not latest.closed:
            for progress in await latest.take():
                yield _wire(progress)
        for image in await task:
            names = (*image.repo_tags, *image.repo_digests)
            yield pb.Progress(done=pb.Done(image_id=image.id, names=names))
    finally:
        task.cancel()
        await asyncio.wait({task})


class _LatestProgress:
    """The latest report of each item and step, so that a slow reader misses some and costs no memory."""

    def __init__(self) -> None:
        self._reports: dict[tuple[str, str], Progress] = {}
        self._ready = asyncio.Event()
        self._closing = False

    @property
    def closed(self) -> bool:
        return self._closing and not self._reports

    def put(self, progress: Progress) -> None:
        self._reports[progress.item, progress.step] = progress
        self._ready.set()

    def close(self) -> None:
        self._closing = True
        self._ready.set()

    async def take(self) -> Sequence[Progress]:
        await self._ready.wait()
        if not self._closing:
            self._ready.clear()
        reports, self._reports = list(self._reports.values()), {}
        return reports


def _wire(progress: Progress) -> pb.Progress:
    return pb.Progress(item=progress.item, step=progress.step, current=progress.current, total=progress.total)
