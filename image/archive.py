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
import io
import os
import posixpath
import stat
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

import msgspec

from image import manifest, tar
from image.blobs import BATCH, BlobWriter, Fetched, storage_error
from image.budget import Budget, Limits, OverLimit, Watch
from image.compression import LargeWindows, broken_stream, inflate, is_compressed
from image.errors import ArchiveInvalid, InvalidReference, ManifestInvalid, bounded
from image.manifest import Descriptor
from image.reference import parse

T = TypeVar("T")

_NAME = "io.containerd.image.name"
_REF_NAME = "org.opencontainers.image.ref.name"
_LINKS_MAX = 8  # from one member to the next
_PIECE = 64 << 10
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

    def open(self, name: str) -> io.RawIOBase:
        """Return a reader of a file, which the caller closes."""

    def close(self) -> None:
        """Close the archive."""


class _Folder:
    """The files of a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, name: str) -> io.RawIOBase:
        if ".." in name.split("/") or name.startswith("/"):
            raise KeyError(name)
        try:
            # without O_NONBLOCK, a FIFO would block until a process writes to it
            fd = os.open(self._path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise KeyError(name) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise KeyError(name)
        return io.FileIO(fd)

    def close(self) -> None:
        return


class _Seeking(tar.Chunks):
    """The chunks of a file, in which data that is skipped is not read."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(iter(lambda: file.read(_PIECE), b""))
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    @property
    def position(self) -> int:
        """The offset in the file of what is read next."""
        return self._file.tell() - (len(self._chunk) - self._at)

    def skip(self, size: int) -> None:
        """Move on by `size` bytes. Raises TarError beyond the file's end."""
        if size <= len(self._chunk) - self._at:
            self._at += size
            return
        target = self.position + size
        if target > self._size:
            raise tar.TarError("the archive ends in the middle of an entry")
        self._file.seek(target)
        self._chunk, self._at = b"", 0


class _Slice(io.RawIOBase):
    """A part of a file. Several may be read at once, as it uses no file position."""

    def __init__(self, file: BinaryIO, begin: int, size: int) -> None:
        self._fd = file.fileno()
        self._begin = begin
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        size = min(len(buffer), self._size - self._at)
        read = os.preadv(self._fd, [memoryview(buffer)[:size]], self._begin + self._at) if size else 0
        self._at += read
        return read


class _Tar:
    """The members of a tar, found in one pass over its headers."""

    def __init__(self, path: Path, limits: Limits, watch: Watch) -> None:
        self._members: dict[str, tuple[int, int]] = {}  # offset and size
        self._links: dict[str, str] = {}
        self._file = path.open("rb")
        try:
            self._find_members(path, limits, watch)
        except BaseException:
            self._file.close()
            raise

    def _find_members(self, path: Path, limits: Limits, watch: Watch) -> None:
        entries, names = Budget(limits, "archive_entries"), Budget(limits, "archive_names_bytes")
        chunks = _Seeking(self._file)
        for entry in tar.entries(chunks, limits):
            watch.check()
            try:
                entries.spend()
                names.spend(len(entry.name) + len(entry.link))
            except OverLimit as error:
                shown = bounded(os.fsdecode(entry.name))
                raise ArchiveInvalid(str(path), f"{error.reason}, at {shown}") from error
            name = posixpath.normpath(os.fsdecode(entry.name))
            target = os.fsdecode(entry.link)
            if entry.kind == tar.REGULAR and entry.segments is None:
                self._members[name] = chunks.position, entry.stored
            elif entry.kind == tar.HARD_LINK:
                self._links[name] = posixpath.normpath(target)
            elif entry.kind == tar.SYMLINK:
                self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
            chunks.skip(entry.stored)
            tar.skip_padding(chunks, entry.stored)

    def open(self, name: str) -> io.RawIOBase:
        name = posixpath.normpath(name)
        # links between members are followed inside the archive (old versions of `docker save` write them)
        for _ in range(_LINKS_MAX):
            if (member := self._members.get(name)) is not None:
                return _Slice(self._file, *member)
            name = self._links[name]
        raise KeyError(name)

    def close(self) -> None:
        self._file.close()


class Archive:
    """The `Source` that reads an archive. Made by `open_archive`; close it.

    Its methods raise ArchiveInvalid, DigestMismatch, DiskFull and StorageFailed.
    """

    def __init__(self, path: Path, members: _Members, limits: Limits, watch: Watch) -> None:
        self._path = path
        self._members = members
        self._limits = limits
        self._watch = watch
        self._made: dict[str, bytes] = {}  # manifests generated here, by digest
        self._names: dict[str, str] = {}  # digest -> member of a docker-archive
        self.images: tuple[Archived, ...] = ()

    async def close(self) -> None:
        """Close the file."""
        self.abandon()

    def abandon(self) -> None:
        """Close the file, from any thread."""
        self._members.close()

    async def manifest(self, target: str, size: int | None = None) -> Fetched:
        """Return a manifest or index by its digest."""
        data = self._made.get(target)
        if data is None:
            data = await asyncio.to_thread(self._read, self._member(target), "manifest_bytes")
            manifest.check(f"manifest {target}", data, target, size)
        return Fetched(data=data, digest=target)

    async def small_blob(self, descriptor: Descriptor, key: str) -> bytes:
        """Return a whole blob, verified. `key` names the limit of its size."""
        data = await asyncio.to_thread(self._read, self._member(descriptor.digest), key)
        manifest.check(f"blob {descriptor.digest}", data, descriptor.digest, descriptor.size)
        return data

    async def blob(self, descriptor: Descriptor, into: BlobWriter, *, parallel: bool = True) -> None:
        """Copy a blob and verify it."""
        await into.append(self._chunks(self._member(descriptor.digest)))
        await into.finish()

    async def _chunks(self, name: str) -> AsyncIterator[bytes]:
        file = await asyncio.to_thread(self._open, name)
        try:
            while chunk := await asyncio.to_thread(file.read, BATCH):
                yield chunk
        except OSError as error:
            raise self._invalid(f"{name} cannot be read: {error}") from error
        finally:
            file.close()

    # ------------------------------------------------------------------------------ reading

    def find_images(self) -> None:
        """Read the archive's index into `images`. Blocking. Raises ArchiveInvalid, ManifestInvalid."""
        if (docker := self._optional("manifest.json")) is not None and not self._has("index.json"):
            self.images = tuple(
                self._docker_image(image) for image in self._decode(docker, list[_DockerImage])
            )
        elif (index := self._optional("index.json")) is not None:
            extra = self._docker_names(docker) if docker is not None else {}
            entries = manifest.decode_index("index.json", index, self._limits).manifests
            self.images = tuple(
                Archived(target=entry.digest, names=_oci_names(entry) or extra.get(entry.digest, ()))
                for entry in entries
            )
        else:
            raise self._invalid("has neither index.json (OCI layout) nor manifest.json (docker-archive)")
        if not self.images:
            raise self._invalid("holds no image")
        self._check("archive_images", len(self.images))
        for image in self.images:
            self._check("image_names", len(image.names))

    def _docker_image(self, image: _DockerImage) -> Archived:
        self._check("layers", len(image.layers))
        config = self._read(image.config, "config_bytes")
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
                while chunk := file.read(BATCH):
                    self._watch.check()
                    digest.update(chunk)
                    size += len(chunk)
        except OSError as error:
            raise self._invalid(f"{name} cannot be read: {error}") from error
        found = Descriptor(media_type=_LAYER, digest=f"sha256:{digest.hexdigest()}", size=size)
        self._names[found.digest] = name
        return found

    def _docker_names(self, docker: bytes) -> Mapping[str, tuple[str, ...]]:
        """Return full names by manifest digest: `docker save` since version 25 writes both formats, and full
        names only in manifest.json."""
        images = self._decode(docker, list[_DockerImage])
        index = self._read("index.json", "manifest_bytes")
        entries = manifest.decode_index("index.json", index, self._limits).manifests
        self._check("archive_images", len(entries))
        names: dict[str, tuple[str, ...]] = {}
        for entry in entries:
            data = self._optional(self._member(entry.digest))
            if data is None:
                continue
            try:
                found = manifest.decode(entry.digest, data, limits=self._limits)
            except ManifestInvalid:
                continue
            if isinstance(found, manifest.Manifest):
                wanted = self._member(found.config.digest)
                tags = [tag for image in images if image.config == wanted for tag in image.repo_tags or ()]
                self._check("image_names", len(tags))
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
        return self._read(name, "manifest_bytes") if self._has(name) else None

    def _open(self, name: str) -> io.RawIOBase:
        try:
            return self._members.open(name)
        except (KeyError, OSError) as error:
            raise self._invalid(f"{name} is missing") from error

    def _read(self, name: str, key: str) -> bytes:
        """Read a whole file; `key` names the limit of its size."""
        self._watch.check()
        budget = Budget(self._limits, key)
        data = bytearray()
        try:
            with self._open(name) as file:
                while piece := file.read(_PIECE):
                    budget.spend(len(piece))
                    data += piece
        except OSError as error:
            raise self._invalid(f"{name} cannot be read: {error}") from error
        except OverLimit as error:
            raise self._invalid(f"{name}: {error.reason}") from error
        return bytes(data)

    def _check(self, key: str, value: int) -> None:
        try:
            Budget(self._limits, key).check(value)
        except OverLimit as error:
            raise self._invalid(error.reason) from error

    def _decode(self, data: bytes, kind: type[T]) -> T:
        try:
            manifest.check_shape(data, self._limits)
            return msgspec.json.decode(data, type=kind)
        except OverLimit as error:
            raise self._invalid(f"manifest.json: {error.reason}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._invalid(f"manifest.json: {error}") from error

    def _invalid(self, problem: str) -> ArchiveInvalid:
        return ArchiveInvalid(str(self._path), problem)


class Opening(msgspec.Struct, frozen=True, kw_only=True):
    """How an archive is opened. `scratch` is an empty directory that outlives the archive; `check_space` is
    called with the number of bytes before they are written there, and raises DiskFull."""

    scratch: Path
    limits: Limits
    watch: Watch
    large: LargeWindows
    check_space: Callable[[int], None] = lambda size: None


def open_archive(path: Path, opening: Opening) -> Archive:
    """Open an archive. Blocking.

    Raises ArchiveInvalid, ManifestInvalid, DiskFull, StorageFailed, Stopped.
    """
    limits, watch = opening.limits, opening.watch
    members: _Members
    try:
        members = _Folder(path) if path.is_dir() else _Tar(_decompressed(path, opening), limits, watch)
    except tar.TarError as error:
        raise ArchiveInvalid(str(path), f"is not a tar archive: {error.reason}") from error
    except OverLimit as error:
        raise ArchiveInvalid(str(path), error.reason) from error
    except OSError as error:
        if error.filename == str(path):
            raise ArchiveInvalid(str(path), error.strerror or str(error)) from error
        raise storage_error(error, opening.scratch, "decompressing an archive") from error
    archive = Archive(path, members, limits, watch)
    try:
        archive.find_images()
    except OverLimit as error:
        members.close()
        raise ArchiveInvalid(str(path), error.reason) from error
    except BaseException:
        members.close()
        raise
    return archive


def _decompressed(path: Path, opening: Opening) -> Path:
    """Return `path`, or a decompressed copy: in a compressed tar no member can be read without all before
    it."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ArchiveInvalid(str(path), "is neither a file nor a directory")
    with path.open("rb") as file:
        if not is_compressed(file.read(4)):
            return path
        plain = opening.scratch / "archive.tar"
        size = Budget(opening.limits, "archive_bytes")
        try:
            with plain.open("wb") as out:
                for chunk in inflate(file, opening.limits, opening.watch.check, opening.large):
                    size.spend(len(chunk))
                    opening.check_space(len(chunk))
                    out.write(chunk)
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
