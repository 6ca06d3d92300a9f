"""The index: which images are stored, and by which names.

    ROOT/images/ID.json    one file per image, replaced atomically

An image's id is the digest of its configuration, so the same content under two names is one image with two
names. A tag belongs to one image: a pull that gives it to another removes it from the first. An image whose
file cannot be read, or that is above a limit, is set aside, and the others are loaded. Losing a file loses
the image, which is pulled again, so nothing here waits for the disk.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from image import tree_ops
from image.blobs import storage_error
from image.budget import Limits
from image.errors import ImageNotFound, ImagePinned, InvalidReference, bounded
from image.manifest import RunDefaults, find_excess
from image.reference import is_digest, parse
from sandbox.host.files import write_json

log = logging.getLogger(__name__)

_HEX = re.compile(r"[a-f0-9]{3,64}")  # an id or its beginning
_FILE = re.compile(r"(sha512:[a-f0-9]{128}|[a-f0-9]{64})\.json")
_FILE_LIMIT = 16 << 20  # bytes


class Image(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One image, as its file in the index holds it."""

    id: str  # "sha256:...", the configuration's digest
    repo_tags: tuple[str, ...] = ()  # full names, "docker.io/library/busybox:latest"
    repo_digests: tuple[str, ...] = ()  # "docker.io/library/busybox@sha256:..."
    size: int  # bytes that its unpacked layers occupy, and its configuration; more than 0 (the kubelet's GC)
    chain_ids: tuple[str, ...] = ()  # bottom first
    config: RunDefaults = RunDefaults()
    created: str = ""  # RFC 3339, as the builder wrote it
    pinned: bool = False  # by the configuration in force, whatever the file says


class _References:
    """Finds the id that a reference means: an id, its beginning, a tag, digest or name (with :latest)."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.names: dict[str, str] = {}  # every tag and repo digest -> id

    def add(self, image: Image) -> None:
        """Add an image with its names."""
        self.ids.add(image.id)
        for name in (*image.repo_tags, *image.repo_digests):
            self.names[name] = image.id

    def discard(self, id: str) -> None:
        """Remove an image with its names. Idempotent."""
        self.ids.discard(id)
        self.names = {name: owner for name, owner in self.names.items() if owner != id}

    def by_name(self, ref: str) -> str | None:
        """Return the image of a whole id or a name."""
        if is_digest(ref) and ref in self.ids:
            return ref
        try:
            reference = parse(ref)
        except InvalidReference:
            return None
        # name:tag@digest means the digest, as it does in a pull
        return self.names.get(reference.digested or reference.tagged)

    def by_prefix(self, ref: str) -> list[str]:
        """Return the images whose ids begin so."""
        prefix = ref.removeprefix("sha256:")
        if not _HEX.fullmatch(prefix):
            return []
        return [id for id in self.ids if id.startswith(f"sha256:{prefix}")]


def _only(ref: str, found: Collection[str]) -> str | None:
    if len(found) > 1:
        raise ImageNotFound(ref, f"the id is ambiguous: those of {len(found)} images begin with it")
    return next(iter(found), None)


class Index:
    """All images of one store. Belongs to one event loop; each change writes one or two small files.

    Changes raise DiskFull and StorageFailed. `set_aside` says by id why a stored image cannot be used, with
    its names: it is not listed, and its file stays until it is pulled again or removed.
    """

    def __init__(self, root: Path, limits: Limits | None = None, pinned: Sequence[str] = ()) -> None:
        """`pinned` are patterns (fnmatch) of full names, whose images are not removed."""
        self._folder = root / "images"
        self._limits = limits or Limits()
        self._pinned = pinned
        self._images: dict[str, Image] = {}
        self._known = _References()
        self._aside = _References()
        self.set_aside: dict[str, str] = {}

    def load(self, complete: Callable[[Image], bool] = lambda image: True) -> None:
        """Read all images; drop those that are not `complete` any more, set those aside that cannot be used.

        Blocking. Raises OSError for the directory; never because of an image.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in sorted(self._folder.iterdir()):
            name = _FILE.fullmatch(file.name)
            if name is None:
                log.warning("dropping %s, which is not an image's entry", file)
                _drop(file)
                continue
            image = Image(id=name[1] if ":" in name[1] else f"sha256:{name[1]}", size=1)
            try:
                image = self._read(file, image.id)
                problem = find_excess(image.config, self._limits)
            except (OSError, msgspec.DecodeError, ValueError, RecursionError) as error:
                problem = f"its entry {file} cannot be read: {error}"
            if problem:
                self._set_aside(image, problem)
            elif complete(image):
                self._insert(image)
            else:
                log.warning("dropping image %s, which must be pulled again: a layer is missing", image.id)
                _drop(file)

    def _read(self, file: Path, id: str) -> Image:
        """Raises OSError, msgspec.DecodeError, ValueError, RecursionError."""
        if not file.is_file() or file.stat().st_size > _FILE_LIMIT:
            raise ValueError(f"not a file of at most {_FILE_LIMIT} bytes")
        image = msgspec.json.decode(file.read_bytes(), type=Image)
        if image.id != id or image.size <= 0:
            raise ValueError("its content does not match its name")
        return image

    def _set_aside(self, image: Image, problem: str) -> None:
        self._aside.add(image)
        names = bounded(", ".join((*image.repo_tags, *image.repo_digests)))
        reason = f"{names}: {problem}" if names else problem
        self.set_aside[image.id] = reason
        log.error("setting image %s aside, pull it again or remove it: %s", image.id, reason)

    def list(self) -> tuple[Image, ...]:
        """Return all images."""
        return tuple(self._images.values())

    def get(self, id: str) -> Image | None:
        """Return the image with this whole id; None if there is none."""
        return self._images.get(id)

    def find(self, ref: str) -> Image:
        """Return the image of an id, the beginning of an id, a tag, a digest, or a name (with :latest).

        A name wins over the beginning of an id: "cafe" may be either. Raises ImageNotFound, also for an
        ambiguous beginning.
        """
        id = self._known.by_name(ref) or _only(ref, self._known.by_prefix(ref))
        if id is None:
            raise ImageNotFound(ref)
        return self._images[id]

    # ------------------------------------------------------------------------------ changes

    def add(self, image: Image) -> Image:
        """Add an image, or its names to the stored one of the same id; return what is stored now."""
        known = self._images.get(image.id)
        if known is not None:
            image = msgspec.structs.replace(
                image,
                repo_tags=_union(known.repo_tags, image.repo_tags),
                repo_digests=_union(known.repo_digests, image.repo_digests),
            )
        self._write(image)
        for tag in image.repo_tags:
            owner = self._known.names.get(tag)
            if owner is not None and owner != image.id:
                self.untag(tag)
        return self._insert(image)

    def untag(self, tag: str) -> None:
        """Remove a name from its image, which stays. An unknown name is ignored."""
        image = self._images.get(self._known.names.get(tag, ""))
        if image is None:
            return
        del self._known.names[tag]
        left = msgspec.structs.replace(
            image,
            repo_tags=tuple(t for t in image.repo_tags if t != tag),
            repo_digests=tuple(d for d in image.repo_digests if d != tag),
        )
        self._write(left)
        self._insert(left)

    def remove(self, ref: str) -> Image | None:
        """Remove and return the image of `ref`, with all its names; None for an unknown reference, and for an
        image that was set aside, which is removed too.

        Raises ImagePinned, and ImageNotFound for an ambiguous beginning of an id.
        """
        known, aside = self._known, self._aside
        id = known.by_name(ref) or aside.by_name(ref)
        id = id or _only(ref, {*known.by_prefix(ref), *aside.by_prefix(ref)})
        if id is None:
            return None
        image = self._images.get(id)
        if image is not None and (pin := self._pin_of(image)):
            raise ImagePinned(ref, *pin)
        _unlink(self._file(id))
        self._images.pop(id, None)
        self._known.discard(id)
        self._aside.discard(id)
        self.set_aside.pop(id, None)
        return image

    def _insert(self, image: Image) -> Image:
        image = msgspec.structs.replace(image, pinned=self._pin_of(image) is not None)
        self._images[image.id] = image
        self._known.add(image)
        self._aside.discard(image.id)
        self.set_aside.pop(image.id, None)
        return image

    def _pin_of(self, image: Image) -> tuple[str, str] | None:
        """Return the first name of an image that is pinned, and the pattern; None if it may be removed."""
        pairs = (
            (name, pattern) for name in (*image.repo_tags, *image.repo_digests) for pattern in self._pinned
        )
        return next(((name, pattern) for name, pattern in pairs if fnmatchcase(name, pattern)), None)

    def _file(self, id: str) -> Path:
        return self._folder / f"{id.removeprefix('sha256:')}.json"

    def _write(self, image: Image) -> None:
        file = self._file(image.id)
        try:
            write_json(file, image)
        except OSError as error:
            raise storage_error(error, file, "writing the image index") from error


def _unlink(path: Path) -> None:
    """Delete an entry, whatever lies in its place. Raises OSError."""
    try:
        path.unlink(missing_ok=True)
    except IsADirectoryError:
        tree_ops.remove(path)


def _drop(path: Path) -> None:
    """Delete an entry; one that cannot be deleted must not prevent a start."""
    try:
        _unlink(path)
    except OSError as error:
        log.warning("cannot delete %s, which is tried again at the next start: %s", path, error)


def _union(old: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*old, *new)))
