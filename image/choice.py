"""Find the image for one platform: of a manifest, or through indexes.

A document may have megabytes, and many pulls read some at once. So each is decoded before the next await, and
only what a pull needs of it is kept: some kilobytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from image import manifest, platforms
from image.blobs import Fetched, Source
from image.budget import Budget, Limits, OverLimit
from image.errors import ManifestInvalid, ManifestNotFound, UnsupportedMedia
from image.manifest import Descriptor, ImageIndex, Manifest, Platform, RunDefaults, run_defaults

_OFFERS = 32  # other platforms that an error names


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """What is needed of the manifest for this host's platform, and of its configuration."""

    id: str
    layers: Sequence[Descriptor]
    diff_ids: Sequence[str]
    config: RunDefaults
    created: str
    config_bytes: int


class Entry(msgspec.Struct, frozen=True):
    """An entry of an index that may be for the platform; `vouched`: the index says that it is."""

    descriptor: Descriptor
    vouched: bool


class Entries(msgspec.Struct, frozen=True):
    """What is needed of an index: its entries that may be for the platform, the best first; `offered` are
    those it names, "os/architecture" each."""

    able: Sequence[Entry]
    offered: frozenset[str]


class _OtherPlatform(Exception):
    """A manifest or index is for other platforms only, "os/architecture" each."""

    def __init__(self, offered: Iterable[str]) -> None:
        super().__init__()
        self.offered = frozenset(offered)


class Choice:
    """Reads one image's documents from `source`; `what` and `host` name it in errors."""

    def __init__(self, source: Source, what: str, host: str, wanted: Platform, limits: Limits) -> None:
        self._source = source
        self._what = what
        self._host = host
        self._wanted = wanted
        self._limits = limits
        self._manifests = Budget(limits, "manifests")
        self._depth = Budget(limits, "index_depth")

    async def fetch(self, target: str) -> tuple[Descriptor, Manifest | Entries]:
        """Fetch the manifest or index of a tag or digest; return what it is, and what is needed of it.

        Raises ImageError.
        """
        fetched = await self._source.manifest(target)
        return fetched.descriptor, self._decode(fetched)

    async def make(self, document: Manifest | Entries) -> Chosen:
        """Return the image of what was fetched. Raises ManifestNotFound when none is for this platform, and
        any other ImageError."""
        try:
            return await self._among(document, 1, vouched=False)
        except OverLimit as error:
            raise ManifestInvalid(self._what, error.reason) from error
        except _OtherPlatform as error:
            have = ", ".join(sorted(error.offered)[:_OFFERS]) or "none"
            problem = f"no image for {platforms.describe(self._wanted)}, only for {have}"
            raise ManifestNotFound(self._what, self._host, problem) from error

    def _decode(self, fetched: Fetched, media_type: str = "") -> Manifest | Entries:
        self._manifests.spend()
        kind = media_type or fetched.media_type
        found = manifest.decode(self._what, fetched.data, kind, self._limits)
        return manifest.bare(found) if isinstance(found, Manifest) else self._entries(found)

    def _entries(self, index: ImageIndex) -> Entries:
        able = platforms.candidates(index, self._wanted)[: self._manifests.limit + 1]
        offered = {platforms.describe(each.platform) for each in index.manifests if each.platform}
        return Entries(
            [Entry(manifest.bare_descriptor(each), platforms.has_platform(each)) for each in able],
            frozenset(sorted(offered)[:_OFFERS]),
        )

    async def _among(self, document: Manifest | Entries, depth: int, *, vouched: bool) -> Chosen:
        """`vouched`: an index says that it is for this platform, which counts more than a configuration that
        names another one, as builders write there what they run on."""
        if isinstance(document, Manifest):
            return await self._configured(document, vouched=vouched)
        self._depth.check(depth)
        offered = document.offered
        for entry in document.able:
            try:
                found = await self._fetch_entry(entry.descriptor)
                return await self._among(found, depth + 1, vouched=vouched or entry.vouched)
            except _OtherPlatform as error:
                offered |= error.offered
            except UnsupportedMedia:
                if entry.vouched:
                    raise
                # without a platform it may be anything, such as a signature or an attestation
        raise _OtherPlatform(offered)

    async def _fetch_entry(self, entry: Descriptor) -> Manifest | Entries:
        return self._decode(await self._source.manifest(entry.digest, entry.size), entry.media_type)

    async def _configured(self, found: Manifest, *, vouched: bool) -> Chosen:
        return self._decode_config(
            await self._source.small_blob(found.config, "config_bytes"), found, vouched=vouched
        )

    def _decode_config(self, data: bytes, found: Manifest, *, vouched: bool) -> Chosen:
        config = manifest.decode_config(f"configuration of {self._what}", data, found, self._limits)
        offered = Platform(os=config.os, architecture=config.architecture)
        if not vouched and not platforms.is_for(offered, self._wanted):
            raise _OtherPlatform((platforms.describe(offered),))
        return Chosen(
            id=found.config.digest,
            layers=found.layers,
            diff_ids=config.rootfs.diff_ids,
            config=run_defaults(config.config),
            created=config.created_at,
            config_bytes=len(data),
        )
