"""Decode manifests, indexes and image configurations: OCI image-spec 1.1 and Docker image manifest v2, schema
2.

The caller has verified digest and size of the bytes. What cannot run is rejected here by name: schema 1,
artifacts, foreign and encrypted layers. Pure.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from image.budget import Budget, Limits, OverLimit
from image.errors import DigestMismatch, ManifestInvalid, UnsupportedMedia
from image.reference import is_digest

T = TypeVar("T")

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEXES = (OCI_INDEX, DOCKER_LIST)
SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1"
CONFIGS = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
    "application/octet-stream",  # Docker configurations in old registries
)
_MAPS = frozenset(("Volumes", "ExposedPorts", "Labels", "annotations"))  # fields whose keys are content
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_LAYER = re.compile(
    r"application/vnd\.oci\.image\.layer\.v1\.tar(\+gzip|\+zstd)?"
    r"|application/vnd\.docker\.image\.rootfs\.diff\.tar(\.gzip|\.zstd)?"
)


class Platform(msgspec.Struct, frozen=True, kw_only=True):
    """`platform` of an index entry (image-spec, image-index.md); names as Go's GOOS and GOARCH."""

    architecture: str = ""
    os: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A reference to a blob or manifest (image-spec, descriptor.md); `size` is in bytes."""

    media_type: str = ""
    digest: str
    size: int
    platform: Platform | None = None
    annotations: dict[str, str] | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An image manifest (image-spec, manifest.md); layers bottom first."""

    schema_version: int
    media_type: str = ""
    artifact_type: str = ""
    config: Descriptor
    layers: list[Descriptor] = []


class ImageIndex(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An image index or Docker manifest list (image-spec, image-index.md)."""

    schema_version: int
    media_type: str = ""
    manifests: list[Descriptor] = []


class _Probe(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The fields that distinguish the kinds of documents where no media type is given."""

    schema_version: int = 0
    media_type: str = ""
    manifests: object = None


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """`config` of an image configuration (image-spec, config.md)."""

    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    env: list[str] | None = None
    working_dir: str | None = None
    user: str | None = None
    stop_signal: str | None = None
    volumes: dict[str, object] | None = None
    exposed_ports: dict[str, object] | None = None


class RunDefaults(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a container of the image runs unless the client says otherwise: `config` of the image's
    configuration (OCI image-spec, config.md). Labels are not kept: nothing needs them."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()


def run_defaults(config: RunConfig | None) -> RunDefaults:
    """Return the index's form of an image configuration's `config`; absent and null fields are empty."""
    given = config or RunConfig()
    return RunDefaults(
        entrypoint=tuple(given.entrypoint or ()),
        cmd=tuple(given.cmd or ()),
        env=tuple(given.env or ()),
        working_dir=given.working_dir or "",
        user=given.user or "",
        stop_signal=given.stop_signal or "",
        volumes=tuple(sorted(given.volumes or ())),
        exposed_ports=tuple(sorted(given.exposed_ports or ())),
    )


class RootFs(msgspec.Struct, frozen=True, kw_only=True):
    """`rootfs` of an image configuration; diff ids bottom first."""

    type: str = "layers"
    diff_ids: list[str] = []


TEXT_BYTES = 50  # what each text takes beside its characters
CREATED_CHARACTERS = 64  # RFC 3339 needs 35


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """An image configuration (image-spec, config.md); `created` is RFC 3339 as the builder wrote it."""

    architecture: str = ""
    os: str = ""
    variant: str = ""
    created: str | None = None
    config: RunConfig | None = None
    rootfs: RootFs = RootFs()

    @property
    def created_at(self) -> str:
        """`created`; empty if it is too long to be a time."""
        return (self.created or "") if len(self.created or "") <= CREATED_CHARACTERS else ""


def digest_of(data: bytes, like: str = "sha256:") -> str:
    """Return the digest of `data`, with the algorithm of the digest `like`."""
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def check(what: str, data: bytes, digest: str, size: int | None = None) -> None:
    """Raise DigestMismatch unless `data`, named `what`, has this digest and size in bytes."""
    if size is not None and len(data) != size:
        raise DigestMismatch(f"{what}: size", str(size), str(len(data)))
    if (actual := digest_of(data, digest)) != digest:
        raise DigestMismatch(what, digest, actual)


def decode(
    what: str, data: bytes, media_type: str = "", limits: Limits | None = None
) -> Manifest | ImageIndex:
    """Decode what a registry sent as `media_type`; the document's own `mediaType` takes precedence.

    `what` names it in errors. Raises UnsupportedMedia, ManifestInvalid.
    """
    limits = limits or Limits()
    document = _document(what, data, limits, "manifest_bytes")
    probe = _convert(what, document, _Probe)
    kind = probe.media_type or media_type.partition(";")[0].strip()
    if kind.startswith(SCHEMA_1) or probe.schema_version == 1:
        raise UnsupportedMedia(
            what, kind or "schema 1", "Docker schema 1 is obsolete; push the image with a newer client"
        )
    if kind in INDEXES or (kind not in MANIFESTS and probe.manifests is not None):
        return _checked_index(what, _convert(what, document, ImageIndex))
    if kind in MANIFESTS or not probe.media_type:
        return _checked_manifest(what, _convert(what, document, Manifest), limits)
    raise UnsupportedMedia(what, kind, "not an image")


def bare(found: Manifest) -> Manifest:
    """Return a manifest's version, configuration and layers: what else it has may be megabytes."""
    return Manifest(
        schema_version=found.schema_version,
        config=bare_descriptor(found.config),
        layers=[bare_descriptor(each) for each in found.layers],
    )


def bare_descriptor(found: Descriptor) -> Descriptor:
    """Return a descriptor without its platform and annotations."""
    return Descriptor(media_type=found.media_type, digest=found.digest, size=found.size)


def decode_index(what: str, data: bytes, limits: Limits | None = None) -> ImageIndex:
    """Decode an index. Raises ManifestInvalid."""
    document = _document(what, data, limits or Limits(), "manifest_bytes")
    return _checked_index(what, _convert(what, document, ImageIndex))


def decode_config(what: str, data: bytes, manifest: Manifest, limits: Limits | None = None) -> ImageConfig:
    """Decode an image configuration. Raises ManifestInvalid, also when it does not match the manifest's
    layers."""
    limits = limits or Limits()
    config = _convert(what, _document(what, data, limits, "config_bytes"), ImageConfig)
    if config.rootfs.type != "layers":
        raise ManifestInvalid(what, f"rootfs type {config.rootfs.type!r} is not 'layers'")
    if len(config.rootfs.diff_ids) != len(manifest.layers):
        raise ManifestInvalid(
            what, f"{len(manifest.layers)} layers, but {len(config.rootfs.diff_ids)} diff ids"
        )
    if over := find_excess(run_defaults(config.config), limits):
        raise ManifestInvalid(what, over)
    for diff_id in config.rootfs.diff_ids:
        if not diff_id.startswith("sha256:") or not is_digest(diff_id):
            raise ManifestInvalid(what, f"diff id {diff_id!r} is not a sha256 digest")
    return config


def find_excess(config: RunDefaults, limits: Limits) -> str:
    """Return which limit the texts of a configuration exceed, with the field; empty: none.

    Each image's are in memory, the user is part of ListImages, and all go into a guest in one message.
    """
    total = Budget(limits, "run_bytes")
    field = "User"
    try:
        Budget(limits, "user_characters").check(len(config.user))
        fields: dict[str, Sequence[str]] = {
            "User": (config.user,),
            "WorkingDir": (config.working_dir,),
            "StopSignal": (config.stop_signal,),
            "Entrypoint": config.entrypoint,
            "Cmd": config.cmd,
            "Env": config.env,
            "Volumes": config.volumes,
            "ExposedPorts": config.exposed_ports,
        }
        for field, texts in fields.items():  # noqa: B007 (names the field in the error)
            for text in texts:
                total.spend(len(text) + TEXT_BYTES)
    except OverLimit as error:
        return f"{field}: {error.reason}"
    return ""


def chain_ids(diff_ids: Sequence[str]) -> tuple[str, ...]:
    """Return the chain id of each layer, bottom first (image-spec, config.md, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return tuple(chain)


# ------------------------------------------------------------------------------------- checks


def _document(what: str, data: bytes, limits: Limits, size_key: str) -> object:
    """Parse JSON; a null field of an object counts as absent, as Go's encoding/json reads it."""
    try:
        Budget(limits, size_key).check(len(data))
        check_shape(data, limits)
        return _without_nulls(msgspec.json.decode(data))
    except OverLimit as error:
        raise ManifestInvalid(what, error.reason) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestInvalid(what, str(error)) from error


def check_shape(data: bytes, limits: Limits) -> None:
    """Raise OverLimit for JSON with too many values or levels, before any of it is made an object.

    A megabyte of "[],[],..." takes some thirty in memory.
    """
    values = Budget(limits, "json_values")
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    values.check(bare.count(b'"') // 2)
    outside = b"".join(bare.split(b'"')[::2])  # what is not in a string
    values.check(outside.count(b",") + outside.count(b"[") + outside.count(b"{"))
    depth = Budget(limits, "json_depth")
    level = 0
    for character in outside.translate(None, _NOT_BRACKETS):
        level += 1 if character in b"[{" else -1
        depth.check(level)


def _without_nulls(value: object, *, is_map: bool = False) -> object:
    if isinstance(value, dict):
        # the keys of a map are content, and Go reads their null values as empty
        return {
            key: "" if each is None else _without_nulls(each, is_map=key in _MAPS)
            for key, each in value.items()
            if is_map or each is not None
        }
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value


def _convert(what: str, document: object, kind: type[T]) -> T:
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise ManifestInvalid(what, str(error)) from error


def check_descriptor(what: str, descriptor: Descriptor) -> None:
    """Raise ManifestInvalid unless the digest can be verified and the size is one."""
    if not is_digest(descriptor.digest):
        raise ManifestInvalid(what, f"bad digest {descriptor.digest!r}")
    if descriptor.size < 0:
        raise ManifestInvalid(what, f"negative size of {descriptor.digest}")


def _checked_index(what: str, index: ImageIndex) -> ImageIndex:
    for entry in index.manifests:
        check_descriptor(what, entry)
    return index


def _checked_manifest(what: str, manifest: Manifest, limits: Limits) -> Manifest:
    check_descriptor(what, manifest.config)
    if manifest.config.media_type not in CONFIGS:
        raise UnsupportedMedia(what, manifest.config.media_type, "an artifact, not a container image")
    try:
        Budget(limits, "layers").check(len(manifest.layers))
    except OverLimit as error:
        raise ManifestInvalid(what, error.reason) from error
    for layer in manifest.layers:
        check_descriptor(what, layer)
        _checked_layer(what, layer.media_type)
    return manifest


def _checked_layer(what: str, media_type: str) -> None:
    if _LAYER.fullmatch(media_type):
        return
    if "encrypted" in media_type:
        problem = "encrypted layers are not supported"
    elif "foreign" in media_type or "nondistributable" in media_type:
        problem = "layers that are stored outside the registry are not supported"
    else:
        problem = "not a supported kind of layer"
    raise UnsupportedMedia(what, media_type, problem)
