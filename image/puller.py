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
from image.blobs import BlobWriter, Fetched, Progress, Source
from image.budget import Budget, Limits, OverLimit, Watch
from image.errors import ImageError, ManifestInvalid, ManifestNotFound, PullDeadline, UnsupportedMedia
from image.hosts import find_hosts
from image.index import Image, Index
from image.layers import STOP_LIMIT_S, LayerStore
from image.manifest import Descriptor, ImageIndex, Manifest, Platform, RunDefaults, run_defaults
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
# Pulls that read manifests and configurations: each may hold two documents of 4 MiB.
RESOLVES = 4
EXTRA_RESOLVES = 4


class _Names(msgspec.Struct, frozen=True, kw_only=True):
    """The names of an image that is being stored, and what it is called in errors."""

    what: str
    host: str
    tags: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()


class _Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """What is needed of the manifest for this host's platform, and of its configuration."""

    id: str
    layers: Sequence[Descriptor]
    diff_ids: Sequence[str]
    config: RunDefaults
    created: str
    config_bytes: int


class _OtherPlatform(Exception):
    """A manifest or index is for other platforms only, "os/architecture" each."""

    def __init__(self, *offered: str) -> None:
        super().__init__(*offered)
        self.offered = frozenset(offered)


class _Choice:
    """Finds the image for one platform, through indexes; `what` is its name in errors."""

    def __init__(self, source: Source, what: str, wanted: Platform, limits: Limits) -> None:
        self._source = source
        self._what = what
        self._wanted = wanted
        self._limits = limits
        self._manifests = Budget(limits, "manifests")
        self._depth = Budget(limits, "index_depth")

    async def make(self, document: Manifest | ImageIndex) -> _Chosen:
        """Return the image of a manifest or index. Raises ImageError, OverLimit, _OtherPlatform."""
        return await self._among(document, 1, vouched=False)

    def decode(self, fetched: Fetched, media_type: str = "") -> Manifest | ImageIndex:
        """Decode a manifest or index, without annotations. Raises ImageError, OverLimit."""
        self._manifests.spend()
        kind = media_type or fetched.media_type
        return manifest.without_annotations(manifest.decode(self._what, fetched.data, kind, self._limits))

    async def _among(self, document: Manifest | ImageIndex, depth: int, *, vouched: bool) -> _Chosen:
        """`vouched`: the index says that it is for this platform, which counts more than a configuration that
        names another one, as builders write there what they run on."""
        if isinstance(document, Manifest):
            return await self._configured(document, vouched=vouched)
        self._depth.check(depth)
        offers = {f"{e.platform.os}/{e.platform.architecture}" for e in document.manifests if e.platform}
        for entry in platforms.candidates(document, self._wanted):
            known = platforms.has_platform(entry)
            try:
                found = self.decode(await self._source.manifest(entry.digest, entry.size), entry.media_type)
                return await self._among(found, depth + 1, vouched=vouched or known)
            except _OtherPlatform as error:
                offers |= error.offered
            except UnsupportedMedia:
                if known:
                    raise
                # without a platform it may be anything, such as a signature or an attestation
        raise _OtherPlatform(*offers)

    async def _configured(self, found: Manifest, *, vouched: bool) -> _Chosen:
        raw = await self._source.small_blob(found.config, "config_bytes")
        config = manifest.decode_config(f"configuration of {self._what}", raw, found, self._limits)
        offered = Platform(os=config.os, architecture=config.architecture)
        if not vouched and not platforms.is_for(offered, self._wanted):
            raise _OtherPlatform(f"{offered.os}/{offered.architecture}")
        return _Chosen(
            id=found.config.digest,
            layers=found.layers,
            diff_ids=config.rootfs.diff_ids,
            config=run_defaults(config.config),
            created=config.created_at,
            config_bytes=len(raw),
        )


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
        self._resolves = FairLimiter("resolve", RESOLVES, EXTRA_RESOLVES)
        self.limiters: tuple[Limiter, ...] = (self._downloads, self._unpacks, self._resolves)
        self.transfers = Transfers()
        self._making = KeyedLock()
        self._credentials = NodeCredentials(options.auth_file)
        self._trust = Trust(options.trust)
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
                return tuple(
                    [await self._import_one(archive, found, tag, path, report) for found in archive.images]
                )
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
        fetched = await archive.manifest(found.target)
        named = [parse(text) for text in ((tag,) if tag else found.names)]
        names = _Names(
            what=found.target,
            host=str(path),
            tags=tuple(reference.tagged for reference in named if reference.tagged),
            digests=tuple(f"{r.name}@{found.target}" for r in named) if found.has_digest else (),
        )
        return await self._store(archive, await self._choose(archive, [fetched], names), names, report)

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
        registry = Registry(reference, hosts, auths, self._options.timing, limits)
        try:
            async with self._for_a_while(self._resolves.share(reference.domain, str(reference))):
                fetched = [await registry.manifest(reference.target)]
                await self._trust.check(registry, reference, fetched[0])
                names = _Names(
                    what=str(reference),
                    host=reference.domain,
                    # by digest: no tag, and the digest as it was asked for
                    tags=() if reference.digest else (reference.tagged,),
                    digests=(f"{reference.name}@{fetched[0].digest}",),
                )
                chosen = await self._choose(registry, fetched, names)
            return await self._store(registry, chosen, names, report)
        finally:
            await registry.close()

    async def _store(self, source: Source, chosen: _Chosen, names: _Names, report: Report) -> Image:
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

    async def _choose(self, source: Source, fetched: list[Fetched], names: _Names) -> _Chosen:
        """Return the image for this host: of the one manifest that is fetched, or of an index.

        The list is emptied: its megabytes are not needed while others are read. Raises ManifestNotFound when
        there is none.
        """
        choice = _Choice(source, names.what, self._platform, self._options.limits)
        try:
            return await choice.make(choice.decode(fetched.pop()))
        except OverLimit as error:
            raise ManifestInvalid(names.what, error.reason) from error
        except _OtherPlatform as error:
            have = ", ".join(sorted(error.offered)) or "none"
            wanted = f"{self._platform.os}/{self._platform.architecture}"
            problem = f"no image for {wanted}, only for {have}"
            raise ManifestNotFound(names.what, names.host, problem) from error

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

        async with self._downloads.share(host, str(id(source))):
            self._layers.space.check("downloading", blob.size)
            writer = await asyncio.to_thread(BlobWriter, path, blob, report_written)
            try:
                await source.blob(blob, writer)
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
