"""The rpcs of the ImageService."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence

from cri.metrics import Metrics
from cri.ports import Images
from cri.proto import runtime_v1_pb2 as pb
from cri.responses import objects
from cri.responses.info import info_json
from cri.responses.list_cache import ListCache
from image.auth import Auth
from image.blobs import Progress
from image.errors import ImageNotFound
from image.index import Image
from sandbox.errors import InvalidSpec
from sandbox.host.flights import Flights

Handlers = Callable[[], Sequence[str]]


class ImageCalls:
    """Rpcs about images. Concurrent pulls of one reference with the same credentials share one execution.

    `handlers` returns the names of the runtime handlers that a request may name.
    """

    def __init__(self, images: Images, flights: Flights, metrics: Metrics, handlers: Handlers) -> None:
        self._images = images
        self._flights = flights
        self._metrics = metrics
        self._handlers = handlers
        self._items = ListCache[Image](lambda image: image.id, objects.image)

    async def ListImages(self, request: pb.ListImagesRequest) -> bytes:
        """List images, or the one that the filter names, as an encoded ListImagesResponse."""
        images = self._images.list()
        self._items.keep_only(images)
        wanted = request.filter.image.image
        if not wanted:
            return self._items.of(images)
        found = self._find(wanted)
        return self._items.of([found] if found else [])

    async def StreamImages(self, request: pb.StreamImagesRequest) -> AsyncIterator[bytes]:
        """Stream what ListImages lists, in batches of a bounded size."""
        wanted = request.filter.image.image
        found = self._find(wanted) if wanted else None
        images = self._images.list()
        self._items.keep_only(images)
        for batch in self._items.batches(([found] if found else []) if wanted else images):
            yield batch

    async def ImageStatus(self, request: pb.ImageStatusRequest) -> pb.ImageStatusResponse:
        """Return the status of an image; a response without one if it does not exist (CRI)."""
        image = self._find(self._reference(request.image))
        if image is None:
            return pb.ImageStatusResponse()
        response = pb.ImageStatusResponse(image=objects.image(image))
        if request.verbose:
            facts = {"chainIds": image.chain_ids, "created": image.created, "config": image.config}
            response.info["info"] = info_json(facts)
        return response

    async def PullImage(self, request: pb.PullImageRequest) -> pb.PullImageResponse:
        """Pull an image and return its id. Goes on when the client disconnects, so that a retry joins it."""
        ref = self._reference(request.image)
        auth = pull_auth(request.auth) if request.HasField("auth") else None
        image = await self._flights.join(("pull-image", ref, auth), lambda: self._pull(ref, auth))
        return pb.PullImageResponse(image_ref=image.id)

    async def _pull(self, ref: str, auth: Auth | None) -> Image:
        with self._metrics.pulling() as pull:
            return await self._images.pull(ref, auth, on_progress=Downloads(pull.count))

    async def RemoveImage(self, request: pb.RemoveImageRequest) -> pb.RemoveImageResponse:
        """Remove an image with all its names. Idempotent."""
        ref = self._reference(request.image)
        await self._flights.join(("remove-image", ref), lambda: self._images.remove(ref))
        return pb.RemoveImageResponse()

    async def ImageFsInfo(self, request: pb.ImageFsInfoRequest) -> pb.ImageFsInfoResponse:
        """Return usage of the filesystem of images. Writable layers are on the same one, so one entry is
        complete."""
        usage = self._images.fs_usage()
        filesystem = objects.filesystem(usage.mountpoint, time.time_ns(), usage.used_bytes, usage.inodes_used)
        return pb.ImageFsInfoResponse(image_filesystems=[filesystem])

    def _find(self, ref: str) -> Image | None:
        try:
            return self._images.find(ref)
        except ImageNotFound:
            return None

    def _reference(self, spec: pb.ImageSpec) -> str:
        """Raises InvalidSpec."""
        if not spec.image:
            raise InvalidSpec("image.image", "is empty", "a name, a digest or an id")
        if spec.runtime_handler not in (known := self._handlers()):
            names = ", ".join(map(repr, known))
            raise InvalidSpec("image.runtime_handler", f"{spec.runtime_handler!r} is not configured", names)
        return spec.image


def pull_auth(auth: pb.AuthConfig) -> Auth | None:
    """Convert credentials of a pull; None for empty ones.

    Raises InvalidSpec, whose message repeats no secret.
    """
    token = auth.registry_token
    if not (token.isascii() and token.isprintable()):
        problem = "has characters that a header cannot carry"
        raise InvalidSpec("auth.registry_token", problem, "printable ASCII")
    given = Auth(
        username=auth.username,
        password=auth.password,
        auth=auth.auth,
        server_address=auth.server_address,
        identity_token=auth.identity_token,
        registry_token=auth.registry_token,
    )
    return None if given == Auth() else given


class Downloads:
    """Converts progress, the bytes of each blob so far, to increments for a counter."""

    def __init__(self, count: Callable[[int], None]) -> None:
        self._count = count
        self._seen: dict[str, int] = {}

    def __call__(self, progress: Progress) -> None:
        """Add what was downloaded since the last report of this blob."""
        if progress.step == "download":
            # a download that was restarted counts again, as its bytes are received again
            seen = self._seen.get(progress.item, 0)
            self._count(progress.current - seen if progress.current >= seen else progress.current)
            self._seen[progress.item] = progress.current
