"""Read images from files: an OCI layout (directory or tar), or a docker-archive (what `docker save` writes).

Members are read in place, not extracted (a compressed archive is first decompressed into the scratch
directory), and no name inside the archive becomes a path of the host. Digests are verified as for a registry.
A docker-archive states none for its layers, so they are computed here, and the diff ids of its configuration
verify the content.

Formats: OCI image-spec, image-layout.md; Docker image-spec v1.2, "Combined Image JSON + Filesystem Changeset
Format".
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tarfile
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar, cast

import msgspec

from image import manifest
from image.blobs import BATCH, BlobWriter, Fetched, storage_error
from image.compression import GZIP_MAGIC, ZSTD_MAGIC, broken_stream, open_plain
from image.errors import ArchiveInvalid, InvalidReference, ManifestInvalid
from image.manifest import CONFIG_LIMIT, MANIFEST_LIMIT, Descriptor
from image.reference import parse

T = TypeVar("T")

_NAME = "io.containerd.image.name"
_REF_NAME = "org.opencontainers.image.ref.name"
_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_CONFIG = "application/vnd.docker.container.image.v1+json"


class Archived(msgspec.Struct, frozen=True, kw_only=True):
    """One image of an archive: its digest there, and the names that the archive gives it."""

    target: str  # digest of its manifest or index
    names: tuple[str, ...] = ()
    has_digest: bool = True  # false: the manifest was generated here, so no registry knows its digest


class _DockerImage(msgspec.Struct, frozen=True, rename="pascal"):
    """An element of a docker-archive's manifest.json."""

    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class _Members(Protocol):
    """Files by name, relative to the archive's root. `open` raises KeyError for a missing one."""

    def open(self, name: str) -> BinaryIO:
        """Return a reader of a file, which the caller closes."""

    def close(self) -> None:
        """Close the archive."""


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, name: str) -> BinaryIO:
        if ".." in name.split("/") or name.startswith("/"):
            raise KeyError(name)
        try:
            return (self._path / name).open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise KeyError(name) from error

    def close(self) -> None:
        return


class _Tar:
    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path, "r:")  # noqa: SIM115 (closed by close)
        self._members = {os.path.normpath(m.name): m for m in self._tar.getmembers()}

    def open(self, name: str) -> BinaryIO:
        # links between members are followed inside the archive (old versions of `docker save` write them)
        file = self._tar.extractfile(self._members[os.path.normpath(name)])
        if file is None:
            raise KeyError(name)
        return cast(BinaryIO, file)

    def close(self) -> None:
        self._tar.close()


class Archive:
    """The `Source` that reads an archive. Made by `open_archive`; close it.

    Its methods raise ArchiveInvalid, DigestMismatch, DiskFull and StorageFailed.
    """

    def __init__(self, path: Path, members: _Members) -> None:
        self._path = path
        self._members = members
        # the members of a tar share one file position, and layers are read concurrently
        self._reading = threading.Lock()
        self._made: dict[str, bytes] = {}  # manifests generated here, by digest
        self._names: dict[str, str] = {}  # digest -> member of a docker-archive
        self.images: tuple[Archived, ...] = ()

    async def close(self) -> None:
        """Close the file."""
        self._members.close()

    async def manifest(self, target: str, size: int | None = None) -> Fetched:
        """Return a manifest or index by its digest."""
        data = self._made.get(target)
        if data is None:
            data = await asyncio.to_thread(self._read, self._member(target), MANIFEST_LIMIT)
            manifest.check(f"manifest {target}", data, target, size)
        return Fetched(data=data, digest=target)

    async def small_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        """Return a blob of at most `limit` bytes, verified."""
        data = await asyncio.to_thread(self._read, self._member(descriptor.digest), limit)
        manifest.check(f"blob {descriptor.digest}", data, descriptor.digest, descriptor.size)
        return data

    async def blob(self, descriptor: Descriptor, into: BlobWriter) -> None:
        """Copy a blob and verify it."""
        await into.append(self._chunks(self._member(descriptor.digest)))
        await into.finish()

    async def _chunks(self, name: str) -> AsyncIterator[bytes]:
        file = await asyncio.to_thread(self._open, name)
        try:
            while chunk := await asyncio.to_thread(self._read_part, file, BATCH):
                yield chunk
        except (OSError, tarfile.TarError) as error:
            raise self._invalid(f"{name} cannot be read: {error}") from error
        finally:
            file.close()

    # ------------------------------------------------------------------------------ reading

    def _read_part(self, file: BinaryIO, size: int) -> bytes:
        with self._reading:
            return file.read(size)

    def find_images(self) -> None:
        """Read the archive's index into `images`. Blocking. Raises ArchiveInvalid, ManifestInvalid."""
        if (docker := self._optional("manifest.json")) is not None and not self._has("index.json"):
            self.images = tuple(
                self._docker_image(image) for image in self._decode(docker, list[_DockerImage])
            )
        elif (index := self._optional("index.json")) is not None:
            extra = self._docker_names(docker) if docker is not None else {}
            entries = manifest.decode_index("index.json", index).manifests
            self.images = tuple(
                Archived(target=entry.digest, names=_oci_names(entry) or extra.get(entry.digest, ()))
                for entry in entries
            )
        else:
            raise self._invalid("has neither index.json (OCI layout) nor manifest.json (docker-archive)")
        if not self.images:
            raise self._invalid("holds no image")

    def _docker_image(self, image: _DockerImage) -> Archived:
        config = self._read(image.config, CONFIG_LIMIT)
        built = manifest.Manifest(
            schema_version=2,
            media_type=manifest.DOCKER_MANIFEST,
            config=Descriptor(media_type=_CONFIG, digest=manifest.digest_of(config), size=len(config)),
            layers=[self._measure(layer) for layer in image.layers],
        )
        self._names[built.config.digest] = image.config
        data = msgspec.json.encode(built)
        digest = manifest.digest_of(data)
        self._made[digest] = data
        return Archived(target=digest, names=tuple(image.repo_tags or ()), has_digest=False)

    def _measure(self, name: str) -> Descriptor:
        digest, size = hashlib.sha256(), 0
        try:
            with self._open(name) as file:
                while chunk := self._read_part(file, BATCH):
                    digest.update(chunk)
                    size += len(chunk)
        except (OSError, tarfile.TarError) as error:
            raise self._invalid(f"{name} cannot be read: {error}") from error
        found = Descriptor(media_type=_LAYER, digest=f"sha256:{digest.hexdigest()}", size=size)
        self._names[found.digest] = name
        return found

    def _docker_names(self, docker: bytes) -> Mapping[str, tuple[str, ...]]:
        """Return full names by manifest digest: `docker save` since version 25 writes both formats, and full
        names only in manifest.json."""
        images = self._decode(docker, list[_DockerImage])
        entries = manifest.decode_index("index.json", self._read("index.json", MANIFEST_LIMIT)).manifests
        names: dict[str, tuple[str, ...]] = {}
        for entry in entries:
            data = self._optional(self._member(entry.digest))
            if data is None:
                continue
            try:
                found = manifest.decode(entry.digest, data)
            except ManifestInvalid:
                continue
            if isinstance(found, manifest.Manifest):
                wanted = self._member(found.config.digest)
                tags = [tag for image in images if image.config == wanted for tag in image.repo_tags or ()]
                names[entry.digest] = tuple(tags)
        return names

    def _member(self, digest: str) -> str:
        algorithm, _, hexadecimal = digest.partition(":")
        return self._names.get(digest) or f"blobs/{algorithm}/{hexadecimal}"

    def _has(self, name: str) -> bool:
        try:
            self._members.open(name).close()
        except KeyError:
            return False
        return True

    def _optional(self, name: str) -> bytes | None:
        return self._read(name, MANIFEST_LIMIT) if self._has(name) else None

    def _open(self, name: str) -> BinaryIO:
        try:
            return self._members.open(name)
        except (KeyError, OSError, tarfile.TarError) as error:
            raise self._invalid(f"{name} is missing") from error

    def _read(self, name: str, limit: int) -> bytes:
        try:
            with self._open(name) as file:
                data = self._read_part(file, limit + 1)
        except (OSError, tarfile.TarError) as error:
            raise self._invalid(f"{name} cannot be read: {error}") from error
        if len(data) > limit:
            raise self._invalid(f"{name} is larger than {limit} bytes")
        return data

    def _decode(self, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._invalid(f"manifest.json: {error}") from error

    def _invalid(self, problem: str) -> ArchiveInvalid:
        return ArchiveInvalid(str(self._path), problem)


def open_archive(path: Path, scratch: Path) -> Archive:
    """Open an archive; `scratch` is an empty directory that outlives the result. Blocking.

    Raises ArchiveInvalid, ManifestInvalid, DiskFull, StorageFailed.
    """
    try:
        members = _Folder(path) if path.is_dir() else _Tar(_decompressed(path, scratch))
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ArchiveInvalid(str(path), f"is not a tar archive: {error}") from error
    except OSError as error:
        if error.filename == str(path):
            raise ArchiveInvalid(str(path), error.strerror or str(error)) from error
        raise storage_error(error, scratch, "decompressing an archive") from error
    archive = Archive(path, members)
    try:
        archive.find_images()
    except BaseException:
        members.close()
        raise
    return archive


def _decompressed(path: Path, scratch: Path) -> Path:
    """Return `path`, or a decompressed copy: in a compressed tar no member can be read without all before
    it."""
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if not magic.startswith(GZIP_MAGIC) and magic != ZSTD_MAGIC:
            return path
        plain = scratch / "archive.tar"
        try:
            with plain.open("wb") as out:
                shutil.copyfileobj(open_plain(file), out, BATCH)
        except broken_stream() as error:
            raise ArchiveInvalid(str(path), f"the compressed stream is broken: {error}") from error
    return plain


def _oci_names(entry: Descriptor) -> tuple[str, ...]:
    """Return an entry's full name: containerd's annotation holds one, OCI's often only a tag, which is not a
    name (image-layout.md, "index.json file")."""
    annotations = entry.annotations or {}
    for text in (annotations.get(_NAME, ""), annotations.get(_REF_NAME, "")):
        if ":" not in text and "/" not in text:
            continue
        try:
            return (parse(text).tagged or text,)
        except InvalidReference:
            continue
    return ()
