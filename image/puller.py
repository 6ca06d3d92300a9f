"""Pull images from a registry, or import them from an archive, into layers and the index.

    manifest -> trust -> platform -> configuration -> layers -> index

Layers are downloaded and unpacked side by side, limited over all pulls. A layer that refers to those below it
is unpacked again once they are there. A blob is used only after its
digest and size were verified, and its unpacked form only after its diff id was. The image is added to the
index last, so an incomplete image is never visible.

Concurrent pulls of one image are one pull (`sandbox.host.flights`). It is cancelled with its last caller;
layers that are complete by then stay, and the next attempt finds them or the next collection deletes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from image import manifest, platforms
from image.archive import Archive, Archived, Opening, open_archive
from image.auth import Auth
from image.blobs import BlobWriter, Progress, Source
from image.budget import Watch
from image.choice import Choice, Chosen
from image.errors import ImageError, ManifestNotFound, PullDeadline
from image.hosts import find_hosts
from image.index import Image, Index
from image.layers import STOP_LIMIT_S, LayerStore
from image.manifest import Descriptor
from image.node_credentials import NodeCredentials
from image.options import ImageOptions
from image.reference import Reference, parse
from image.registry import Registry
from image.running import Report, Transfers
from image.trust import Trust
from sandbox.host import threads
from sandbox.host.flights import Flights
from sandbox.host.keyed_lock import KeyedLock
from sandbox.host.limiter import FairLimiter, Limiter

EXTRA_DOWNLOADS = 16  # beyond the limit, of registries that would else have none
EXTRA_UNPACKS = 2
IMPORTS = 2  # at once: each may hold an archive's index and a document of 4 MiB


class _Names(msgspec.Struct, frozen=True, kw_only=True):
    """The names of an image that is being stored, and where it comes from."""

    host: str
    tags: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()


class Puller:
    """Pulls and imports for one store. Belongs to one event loop; close it.

    `on_end` is called whenever a pull or import has ended, with or without success.
    """

    def __init__(
        self,
        index: Index,
        layers: LayerStore,
        options: ImageOptions,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._index = index
        self._layers = layers
        self._options = options
        self._platform = platforms.host_platform(platform.machine())
        self._downloads = FairLimiter("download", options.max_downloads, EXTRA_DOWNLOADS)
        self._unpacks = FairLimiter("unpack", options.max_unpacks, EXTRA_UNPACKS)
        self._imports = Limiter("import", IMPORTS)
        self.limiters: tuple[Limiter, ...] = (self._downloads, self._unpacks, self._imports)
        self.transfers = Transfers()
        self._making = KeyedLock()
        self._credentials = NodeCredentials(options.auth_file)
        self._trust = Trust(options.trust, options.limits)
        self._on_end = on_end
        self._flights = Flights(cancel_abandoned=True)

    async def pull(self, ref: str, auth: Auth | None = None, *, on_progress: Report | None = None) -> Image:
        """Fetch an image and return its entry of the index; what is here already is not downloaded again.

        The registry is asked in any case: a tag may have moved. Callers with the same reference and equal
        credentials share one pull (others do not: that would give an image to a caller who may not have
        it), and it is cancelled when the last of them is. Raises any ImageError, and ShuttingDown.
        """
        key = (parse(ref), auth)
        return await self._flights.follow(key, lambda report: self._run(*key, report), on_progress)

    async def _run(self, reference: Reference, auth: Auth | None, report: Report) -> Image:
        try:
            with self.transfers.follow(str(reference), report) as follow:
                return await self._bounded(reference, auth, follow)
        except ImageError as error:
            _forget_documents(error)
            raise
        finally:
            self._on_end()

    async def close(self) -> None:
        """Cancel all pulls and wait until they have cleaned up; later ones raise ShuttingDown."""
        await self._flights.close(grace_s=0)

    async def import_archive(
        self, path: Path, *, name: str = "", on_progress: Report | None = None
    ) -> tuple[Image, ...]:
        """Import all images of an OCI layout (directory or tar) or a docker-archive.

        `name` replaces the archive's own names; the archive must then hold one image. Raises any ImageError;
        images before the one that failed stay.
        """
        try:
            with self.transfers.follow(str(path), on_progress or (lambda progress: None)) as follow:
                async with self._imports.slot():
                    return await self._import(path, name, follow)
        except ImageError as error:
            _forget_documents(error)
            raise
        finally:
            self._on_end()

    async def _import(self, path: Path, name: str, report: Report) -> tuple[Image, ...]:
        tag = parse(name).tagged if name else ""
        with self._layers.staging() as scratch:
            archive = await self._open_archive(path, scratch)
            try:
                if tag and len(archive.images) > 1:
                    raise ManifestNotFound(
                        name, str(path), f"{len(archive.images)} images, and one name for them"
                    )
                images: list[Image] = []  # no comprehension: its closure stays with an error's traceback
                for found in archive.images:
                    images.append(await self._import_one(archive, found, tag, path, report))  # noqa: PERF401
                return tuple(images)
            finally:
                await archive.close()

    async def _open_archive(self, path: Path, scratch: Path) -> Archive:
        limits = self._options.limits
        watch = Watch(limits, "import_s")
        opening = Opening(
            scratch=scratch,
            limits=limits,
            watch=watch,
            large=self._layers.large_windows,
            check_space=lambda size: self._layers.space.check("decompressing an archive", size),
        )
        return await threads.run(
            lambda: open_archive(path, opening),
            "husk-import",
            on_cancel=watch.stop.set,
            linger_s=STOP_LIMIT_S,
            discard=Archive.abandon,
        )

    async def _import_one(
        self, archive: Source, found: Archived, tag: str, path: Path, report: Report
    ) -> Image:
        choice = self._choice(archive, found.target, str(path))
        _, document = await choice.fetch(found.target)
        named = [parse(text) for text in ((tag,) if tag else found.names)]
        names = _Names(
            host=str(path),
            tags=tuple(reference.tagged for reference in named if reference.tagged),
            digests=tuple(f"{r.name}@{found.target}" for r in named) if found.has_digest else (),
        )
        return await self._store(archive, await choice.make(document), names, report)

    # ----------------------------------------------------------------------------- one pull

    async def _bounded(self, reference: Reference, auth: Auth | None, report: Report) -> Image:
        limit_s = self._options.pull_timeout_s or None
        deadline = asyncio.timeout(limit_s)
        try:
            async with deadline:
                return await self._pull(reference, auth, report)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise PullDeadline(str(reference), limit_s or 0.0) from error

    async def _pull(self, reference: Reference, auth: Auth | None, report: Report) -> Image:
        limits = self._options.limits
        hosts = await asyncio.to_thread(find_hosts, self._options.config_path, reference.domain, limits)
        auths = [auth or await self._credentials.find(host, reference) for host in hosts]
        registry = Registry(reference, hosts, auths, self._options.timing, limits, self._layers.scratch)
        try:
            choice = self._choice(registry, str(reference), reference.domain)
            target, document = await choice.fetch(reference.target)
            await self._trust.check(registry, reference, target)
            names = _Names(
                host=reference.domain,
                # by digest: no tag, and the digest as it was asked for
                tags=() if reference.digest else (reference.tagged,),
                digests=(f"{reference.name}@{target.digest}",),
            )
            return await self._store(registry, await choice.make(document), names, report)
        finally:
            await registry.close()

    async def _store(self, source: Source, chosen: Chosen, names: _Names, report: Report) -> Image:
        chain = manifest.chain_ids(chosen.diff_ids)
        with self._layers.pinned(chain):
            await self._store_layers(source, chosen.layers, chosen.diff_ids, chain, names.host, report)
            layers = [self._layers.find(chain_id) for chain_id in chain]
            return self._index.add(
                Image(
                    id=chosen.id,
                    repo_tags=names.tags,
                    repo_digests=names.digests,
                    size=chosen.config_bytes + sum(layer.bytes for layer in layers if layer),
                    chain_ids=chain,
                    config=chosen.config,
                    created=chosen.created,
                )
            )

    def _choice(self, source: Source, what: str, host: str) -> Choice:
        return Choice(source, what, host, self._platform, self._options.limits)

    # ------------------------------------------------------------------------------- layers

    async def _store_layers(
        self,
        source: Source,
        blobs: Sequence[Descriptor],
        diff_ids: Sequence[str],
        chain: Sequence[str],
        host: str,
        report: Report,
    ) -> None:
        ready = [asyncio.Event() for _ in chain]  # a layer and all below are stored
        # Two pulls of the same blobs from one registry download them once. Another registry's blobs are not
        # waited for, even if they claim to be the same layers, and the same registry's not for ever: they may
        # never come. Nothing is locked while unpacking: the first of several to make a layer stores it.
        keys = manifest.chain_ids([blob.digest for blob in blobs])

        async def store(n: int, stage: Path) -> None:
            async with self._for_a_while(self._making.hold(f"{host} {chain[n]} {keys[n]}")):
                if self._layers.find(chain[n]):
                    report(Progress(item=blobs[n].digest, step="present", current=1, total=1))
                else:
                    await self._download(source, blobs[n], stage / str(n), host, report)
                    unpack = partial(
                        self._unpack,
                        source,
                        blobs[n],
                        diff_ids[n],
                        chain[: n + 1],
                        stage / str(n),
                        host,
                        report,
                    )
                    alone = n > 0 and not ready[n - 1].is_set()
                    if not (alone and await unpack(alone=True)):
                        if n:
                            await ready[n - 1].wait()
                        await unpack()
                    await asyncio.to_thread((stage / str(n)).unlink)
            if n:
                await ready[n - 1].wait()
            ready[n].set()

        for blob in (blob for n, blob in enumerate(blobs) if not self._layers.find(chain[n])):
            report(Progress(item=blob.digest, step="download", current=0, total=blob.size))
        with self._layers.staging() as stage:
            try:
                async with asyncio.TaskGroup() as group:
                    for n in range(len(chain)):
                        group.create_task(store(n, stage))
            except BaseExceptionGroup as errors:
                # the first failure cancelled the other layers, and is the one that callers expect
                raise errors.exceptions[0] from errors

    @contextlib.asynccontextmanager
    async def _for_a_while(self, place: contextlib.AbstractAsyncContextManager[None]) -> AsyncIterator[None]:
        """Wait for a place and hold it; after `share_s` go on without: what the others wait for may drip."""
        async with contextlib.AsyncExitStack() as stack:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._options.timing.share_s):
                    await stack.enter_async_context(place)
            yield

    async def _download(
        self, source: Source, blob: Descriptor, path: Path, host: str, report: Report
    ) -> None:
        def report_written(written: int) -> None:
            self._layers.space.check("downloading", blob.size - written)
            report(Progress(item=blob.digest, step="download", current=written, total=blob.size))

        async with self._downloads.share(host, str(id(source))) as within_limit:
            self._layers.space.check("downloading", blob.size)
            writer = await asyncio.to_thread(BlobWriter, path, blob, report_written)
            try:
                await source.blob(blob, writer, parallel=within_limit)
            finally:
                writer.close()

    async def _unpack(
        self,
        source: Source,
        blob: Descriptor,
        diff_id: str,
        chain: Sequence[str],
        path: Path,
        host: str,
        report: Report,
        *,
        alone: bool = False,
    ) -> bool:
        """Make the last layer of a chain, `alone` without those below; return whether it is stored."""
        async with self._unpacks.share(host, str(id(source))):
            report(Progress(item=blob.digest, step="unpack", current=0, total=blob.size))
            if self._layers.find(chain[-1]) is None:  # the pull of another image may have made it meanwhile
                below = None if alone else chain[:-1]
                if await self._layers.unpack(chain[-1], diff_id, below, path) is None:
                    return False
            report(Progress(item=blob.digest, step="unpack", current=blob.size, total=blob.size))
        return True


def _forget_documents(error: BaseException) -> None:
    """Clear the local variables in an error's tracebacks: documents of megabytes would stay in memory with
    it, as long as the garbage collector does not find the cycle."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
