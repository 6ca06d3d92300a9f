"""Check cosign's signatures of an image by public keys.

A signature lies in the image's repository, in one of two forms:

- the tag sha256-HEX.sig has a manifest whose layers are signed documents (containers/image, "simple
  signing"), each with its signature as an annotation: cosign up to version 2
- an artifact that refers to the image (distribution-spec, "Listing Referrers", or its tag sha256-HEX) is a
  Sigstore bundle with a DSSE envelope around an in-toto statement: cosign from version 3

Both name the digest that they are about. Certificates, transparency logs and time stamps are not checked: a
key of the node's own needs none of them.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import msgspec

from image.blobs import Fetched
from image.budget import Limits, OverLimit
from image.errors import DigestMismatch, ManifestInvalid, ManifestNotFound, bounded
from image.manifest import Descriptor, bare_descriptor, check_descriptor, check_shape
from image.reference import Reference, is_digest
from image.trust import keys
from image.trust.keys import Verify

SIMPLE = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE = "dev.cosignproject.cosign/signature"
BUNDLE = "application/vnd.dev.sigstore.bundle"  # followed by its version
STATEMENT = "application/vnd.in-toto+json"
SIGNED = "https://sigstore.dev/cosign/sign/v1"  # the statement's predicate; other kinds attest something else
COUNT_LIMIT = 64  # signatures of one image that are read
SIGNATURE_CHARACTERS = 8192  # of one in an annotation; RSA with 4,096 bits needs 684

T = TypeVar("T")


class Refused(Exception):
    """The image may not be pulled; the text says why."""


class SignatureSource(Protocol):
    """Where signatures are read from: the registry of the image."""

    async def manifest(self, target: str, size: int | None = None) -> Fetched:
        """Return a manifest of the image's repository. Raises ManifestNotFound."""

    async def small_blob(self, descriptor: Descriptor, key: str) -> bytes:
        """Return a blob of the image's repository, verified."""

    async def referrers(self, digest: str) -> Fetched:
        """Return the index of what refers to a manifest. Raises ManifestNotFound."""


class _Artifact(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A manifest of signatures."""

    layers: list[Descriptor] | None = None


class _Entry(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    digest: str
    artifact_type: str | None = None


class _Referrers(msgspec.Struct, frozen=True, kw_only=True):
    manifests: list[_Entry] | None = None


class _SignedImage(msgspec.Struct, frozen=True, rename="kebab"):
    docker_manifest_digest: str


class _Identity(msgspec.Struct, frozen=True, rename="kebab"):
    docker_reference: str = ""


class _Critical(msgspec.Struct, frozen=True):
    image: _SignedImage
    identity: _Identity = _Identity()


class _SimpleSigning(msgspec.Struct, frozen=True):
    critical: _Critical


class _Signature(msgspec.Struct, frozen=True):
    sig: str


class _Envelope(msgspec.Struct, frozen=True, rename="camel"):
    payload: str
    payload_type: str
    signatures: list[_Signature]


class _Bundle(msgspec.Struct, frozen=True, rename="camel"):
    dsse_envelope: _Envelope


class _Subject(msgspec.Struct, frozen=True):
    digest: dict[str, str]


class _Statement(msgspec.Struct, frozen=True, rename="camel"):
    subject: list[_Subject]
    predicate_type: str = ""


class _Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What one signature says, which may be forged: `signed` are the bytes that `signatures` are of."""

    signed: bytes
    signatures: tuple[bytes, ...]
    digests: frozenset[str]
    repository: str


_Reader = Callable[[], Awaitable[_Claim]]


async def check(
    source: SignatureSource,
    reference: Reference,
    digest: str,
    key_files: Sequence[str],
    match: Literal["digest", "repository"],
    limits: Limits,
) -> None:
    """Return if one of the keys signed this digest. Raises Refused, and what `source` raises."""
    try:
        trusted = [await asyncio.to_thread(keys.load, Path(path)) for path in key_files]
    except keys.KeyUnusable as error:
        raise Refused(str(error)) from error
    problems: list[str] = []
    async for claim in _Signatures(source, digest, limits, problems).claims():
        problem = _find_problem(claim, reference, digest, trusted, match)
        if not problem:
            return
        problems.append(bounded(problem))
    raise Refused("; ".join(dict.fromkeys(problems)) or "it has no signature")


def _find_problem(
    claim: _Claim, reference: Reference, digest: str, trusted: Sequence[Verify], match: str
) -> str:
    if not any(verify(signature, claim.signed) for verify in trusted for signature in claim.signatures):
        return "a signature is by none of the configured keys"
    if digest not in claim.digests:
        return f"a signature is of {', '.join(sorted(claim.digests)) or 'nothing'}"
    if match == "repository" and claim.repository != reference.name:
        return f"a signature names the repository {claim.repository or 'nothing'!r}"
    return ""


class _Signatures:
    """Reads the signatures of one digest. A document may have megabytes, so that each is decoded before the
    next await, and only what is needed of it is kept. `problems` gets why one cannot be read."""

    def __init__(self, source: SignatureSource, digest: str, limits: Limits, problems: list[str]) -> None:
        self._source = source
        self._digest = digest
        self._limits = limits
        self._problems = problems

    async def claims(self) -> AsyncIterator[_Claim]:
        """Yield every signature of both forms."""
        for find in (self._find_simple, self._find_bundles):
            try:
                readers = await find()
            except ManifestInvalid as error:
                self._problems.append(f"signatures cannot be read: {error.problem}")
                continue
            for read in readers:
                try:
                    yield await read()
                except (ManifestInvalid, ManifestNotFound, DigestMismatch) as error:
                    self._problems.append(bounded(f"a signature cannot be read: {error}"))

    async def _find_simple(self) -> Sequence[_Reader]:
        try:
            fetched = await self._source.manifest(f"{self._digest.replace(':', '-')}.sig")
        except ManifestNotFound:
            return ()
        layers = self._decode(fetched.data, _Artifact).layers or ()
        return [
            partial(self._read_simple, bare_descriptor(layer), _signature_of(layer))
            for layer in layers[:COUNT_LIMIT]
            if layer.media_type == SIMPLE
        ]

    async def _read_simple(self, layer: Descriptor, signature: str) -> _Claim:
        payload = await self._blob(layer)
        critical = self._decode(payload, _SimpleSigning).critical
        return _Claim(
            signed=payload,
            signatures=(_decode64(signature),),
            digests=frozenset((critical.image.docker_manifest_digest,)),
            repository=critical.identity.docker_reference,
        )

    async def _find_bundles(self) -> Sequence[_Reader]:
        try:
            fetched = await self._source.referrers(self._digest)
        except ManifestNotFound:
            try:
                fetched = await self._source.manifest(self._digest.replace(":", "-"))
            except ManifestNotFound:
                return ()
        entries = self._decode(fetched.data, _Referrers).manifests or ()
        return [
            partial(self._read_bundle, entry.digest)
            for entry in entries[:COUNT_LIMIT]
            if (entry.artifact_type or BUNDLE).startswith(BUNDLE) and is_digest(entry.digest)
        ]

    async def _read_bundle(self, digest: str) -> _Claim:
        layer = self._bundle_layer(digest, (await self._source.manifest(digest)).data)
        envelope = self._decode(await self._blob(layer), _Bundle).dsse_envelope
        payload = _decode64(envelope.payload)
        statement = self._decode(payload, _Statement)
        if envelope.payload_type != STATEMENT or statement.predicate_type != SIGNED:
            problem = f"it is about {statement.predicate_type or envelope.payload_type}"
            raise ManifestInvalid("bundle", problem)
        return _Claim(
            signed=_pre_authentication(envelope.payload_type.encode(), payload),
            signatures=tuple(_decode64(each.sig) for each in envelope.signatures),
            digests=frozenset(
                f"{kind}:{hex}" for one in statement.subject for kind, hex in one.digest.items()
            ),
            repository="",  # cosign names none there
        )

    def _bundle_layer(self, digest: str, data: bytes) -> Descriptor:
        layers = self._decode(data, _Artifact).layers or []
        if len(layers) != 1 or not layers[0].media_type.startswith(BUNDLE):
            raise ManifestInvalid(digest, "has no bundle")
        return bare_descriptor(layers[0])

    async def _blob(self, layer: Descriptor) -> bytes:
        check_descriptor("signature", layer)
        return await self._source.small_blob(layer, "signature_bytes")

    def _decode(self, data: bytes, shape: type[T]) -> T:
        try:
            check_shape(data, self._limits)
            return msgspec.json.decode(data, type=shape)
        except OverLimit as error:
            raise ManifestInvalid("signature", error.reason) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ManifestInvalid("signature", str(error)) from error


def _signature_of(layer: Descriptor) -> str:
    """Return a layer's annotation; empty, which no key accepts, if it is too long to be a signature."""
    text = (layer.annotations or {}).get(SIGNATURE, "")
    return text if len(text) <= SIGNATURE_CHARACTERS else ""


def _pre_authentication(kind: bytes, payload: bytes) -> bytes:
    """Return what a DSSE signature is of (secure-systems-lab/dsse, protocol.md, "PAE")."""
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _decode64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ManifestInvalid("signature", "is not base64") from error
