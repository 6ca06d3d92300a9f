"""Pull one repository's content from the hosts that are configured for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from image import manifest
from image.auth import Auth
from image.blobs import BlobWriter, Fetched
from image.budget import Budget, Limits, OverLimit
from image.errors import (
    DigestMismatch,
    ImageError,
    ManifestInvalid,
    ManifestNotFound,
    RegistryUnavailable,
    Unauthorized,
)
from image.hosts import Host
from image.manifest import Descriptor
from image.reference import Reference, is_digest
from image.registry.endpoint import Endpoint
from image.registry.timing import Timing

T = TypeVar("T")

_HOSTS_FAULT = (ManifestNotFound, ManifestInvalid, Unauthorized, RegistryUnavailable, DigestMismatch)


class Registry:
    """The `Source` of one pull from a registry. Close it.

    Asks `hosts` in order: mirrors first, the registry itself last. Each method raises ManifestNotFound,
    ManifestInvalid (above a limit), Unauthorized, RegistryUnavailable or DigestMismatch: the last host's
    error, with the mirrors' as notes.
    """

    def __init__(
        self,
        reference: Reference,
        hosts: Sequence[Host],
        auths: Sequence[Auth | None],
        timing: Timing,
        limits: Limits,
        scratch: Path,
    ) -> None:
        """`auths` are the credentials for each of `hosts`; documents arrive in nameless files in the
        directory `scratch`."""
        self._reference = reference
        self._timing = timing
        self._limits = limits
        self._endpoints = [
            Endpoint(host, reference, auth, timing, limits, scratch)
            for host, auth in zip(hosts, auths, strict=True)
        ]

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        for endpoint in self._endpoints:
            await endpoint.close()

    async def manifest(self, target: str, size: int | None = None) -> Fetched:
        """Fetch the manifest or index of a tag or digest (distribution-spec, "Pulling manifests").

        Checked against the digest in `target`, else against Docker-Content-Digest where the registry sends
        it, and against `size` in bytes if it is known.
        """

        async def fetch(endpoint: Endpoint) -> Fetched:
            data, headers = await endpoint.read(f"manifests/{target}", "manifest_bytes")
            announced = headers.get("docker-content-digest", "")
            expected = target if is_digest(target) else announced if is_digest(announced) else ""
            if expected:
                manifest.check(f"manifest {self._reference.name} {target}", data, expected, size)
            return Fetched(
                data=data,
                digest=expected or manifest.digest_of(data),
                media_type=headers.get("content-type", ""),
            )

        return await self._first("pull" if is_digest(target) else "resolve", fetch)

    async def referrers(self, digest: str) -> Fetched:
        """Fetch the index of what refers to this manifest (distribution-spec, "Listing Referrers"). Raises
        ManifestNotFound also where the registry does not list any."""

        async def fetch(endpoint: Endpoint) -> Fetched:
            data, headers = await endpoint.read(f"referrers/{digest}", "manifest_bytes")
            return Fetched(
                data=data, digest=manifest.digest_of(data), media_type=headers.get("content-type", "")
            )

        return await self._first("resolve", fetch)

    async def small_blob(self, descriptor: Descriptor, key: str) -> bytes:
        """Fetch a blob into memory and check it. `key` names the limit of its size. Raises ManifestInvalid
        above it."""
        try:
            Budget(self._limits, key).check(descriptor.size)
        except OverLimit as error:
            raise ManifestInvalid(f"blob {descriptor.digest}", error.reason) from error

        async def fetch(endpoint: Endpoint) -> bytes:
            data, _ = await endpoint.read(f"blobs/{descriptor.digest}", key)
            manifest.check(f"blob {descriptor.digest}", data, descriptor.digest, descriptor.size)
            return data

        return await self._first("pull", fetch)

    async def blob(self, descriptor: Descriptor, into: BlobWriter, *, parallel: bool = True) -> None:
        """Append to `into` what it still lacks, from wherever it continues, and check the whole.

        The next host continues what the last one sent, unless that had the wrong digest.
        """

        async def fetch(endpoint: Endpoint) -> None:
            try:
                await endpoint.download(f"blobs/{descriptor.digest}", into, parallel=parallel)
                await into.finish()
            except DigestMismatch:
                into.restart()
                raise

        limit_s = self._timing.blob_s or None
        deadline = asyncio.timeout(limit_s)
        try:
            async with deadline:
                await self._first("pull", fetch)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            problem = f"{into.written} of {descriptor.size} bytes in {limit_s:g} s, the limit of a blob"
            raise RegistryUnavailable(self._reference.domain, into.what, problem) from error

    async def _first(self, capability: str, fetch: Callable[[Endpoint], Awaitable[T]]) -> T:
        """Return the first host's success. `capability` is hosts.toml's: "pull" or "resolve"."""
        able = [e for e in self._endpoints if capability in e.host.capabilities]
        if not able:
            problem = f"no configured host has the capability {capability!r}"
            raise RegistryUnavailable(self._reference.domain, capability, problem)
        failures: list[ImageError] = []
        for endpoint in able:
            try:
                return await fetch(endpoint)
            except _HOSTS_FAULT as error:
                failures.append(error)
        last = failures[-1]
        for mirror in failures[:-1]:
            last.add_note(f"a mirror failed before: {mirror}")
        raise last
