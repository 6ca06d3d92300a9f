"""The index: which images are stored, and by which names.

    ROOT/images/ID.json    one file per image, replaced atomically

An image's id is the digest of its configuration, so the same content under two names is one image with two
names. A tag belongs to one image: a pull that gives it to another removes it from the first. A file that
cannot be read is logged and dropped, an image above a limit is set aside, and the others are loaded. Losing
a file loses the image, which is pulled again, so nothing here waits for the disk.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from image.blobs import storage_error
from image.errors import ImageNotFound, ImagePinned, InvalidReference
from image.manifest import USER_LIMIT, RunConfig
from image.reference import is_digest, parse
from sandbox.host.files import write_json

log = logging.getLogger(__name__)

_HEX = re.compile(r"[a-f0-9]{3,64}")  # an id or its beginning


class RunDefaults(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a container of the image runs unless the client says otherwise: `config` of the image's
    configuration (OCI image-spec, config.md)."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    labels: dict[str, str] = {}


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
        labels=given.labels or {},
    )


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


class Index:
    """All images of one store. Belongs to one event loop; each change writes one or two small files.

    Changes raise DiskFull and StorageFailed. `set_aside` says by id why a stored image cannot be used: it is
    not listed, and its file stays until it is pulled again or removed by its id.
    """

    def __init__(self, root: Path, pinned: Sequence[str] = ()) -> None:
        """`pinned` are patterns (fnmatch) of full names, whose images are not removed."""
        self._folder = root / "images"
        self._pinned = pinned
        self._images: dict[str, Image] = {}
        self.set_aside: dict[str, str] = {}
        self._names: dict[str, str] = {}  # every tag and repo digest -> id

    def load(self, complete: Callable[[Image], bool] = lambda image: True) -> None:
        """Read all images; drop those that are not `complete` any more, or whose file is broken. Blocking."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in sorted(self._folder.iterdir()):
            try:
                image = msgspec.json.decode(file.read_bytes(), type=Image)
                if self._file(image.id) != file or image.size <= 0:
                    raise ValueError("its content does not match its name")
            except (OSError, msgspec.DecodeError, ValueError) as error:
                log.warning("dropping image entry %s, the image must be pulled again: %s", file.name, error)
                _drop(file)
                continue
            if problem := _find_problem(image):
                log.error("setting image %s %s aside: %s", image.id, ", ".join(image.repo_tags), problem)
                self.set_aside[image.id] = problem
            elif complete(image):
                self._insert(image)
            else:
                log.warning("dropping image %s, which must be pulled again: a layer is missing", image.id)
                _drop(file)

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
        if is_digest(ref) and (image := self._images.get(ref)):
            return image
        if image := self._by_name(ref) or self._by_prefix(ref):
            return image
        raise ImageNotFound(ref)

    def _by_name(self, ref: str) -> Image | None:
        try:
            reference = parse(ref)
        except InvalidReference:
            return None
        # name:tag@digest means the digest, as it does in a pull
        id = self._names.get(reference.digested or reference.tagged)
        return self._images[id] if id else None

    def _by_prefix(self, ref: str) -> Image | None:
        prefix = ref.removeprefix("sha256:")
        if not _HEX.fullmatch(prefix):
            return None
        found = [image for id, image in self._images.items() if id.startswith(f"sha256:{prefix}")]
        if len(found) > 1:
            raise ImageNotFound(ref, f"the id is ambiguous: those of {len(found)} images begin with it")
        return found[0] if found else None

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
            owner = self._names.get(tag)
            if owner is not None and owner != image.id:
                self.untag(tag)
        return self._insert(image)

    def untag(self, tag: str) -> None:
        """Remove a name from its image, which stays. An unknown name is ignored."""
        image = self._images.get(self._names.get(tag, ""))
        if image is None:
            return
        del self._names[tag]
        left = msgspec.structs.replace(
            image,
            repo_tags=tuple(t for t in image.repo_tags if t != tag),
            repo_digests=tuple(d for d in image.repo_digests if d != tag),
        )
        self._write(left)
        self._insert(left)

    def remove(self, ref: str) -> Image | None:
        """Remove and return the image of `ref`, with all its names; None for an unknown reference.

        Raises ImagePinned.
        """
        try:
            image = self.find(ref)
        except ImageNotFound:
            if self.set_aside.pop(ref, None) is not None:
                self._file(ref).unlink(missing_ok=True)
            return None
        if pin := self._pin_of(image):
            raise ImagePinned(ref, *pin)
        self._file(image.id).unlink(missing_ok=True)
        del self._images[image.id]
        self._names = {name: id for name, id in self._names.items() if id != image.id}
        return image

    def _insert(self, image: Image) -> Image:
        image = msgspec.structs.replace(image, pinned=self._pin_of(image) is not None)
        self._images[image.id] = image
        self.set_aside.pop(image.id, None)
        for name in (*image.repo_tags, *image.repo_digests):
            self._names[name] = image.id
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


def _find_problem(image: Image) -> str:
    """Return why a stored image cannot be used; empty if it can. An older version may have stored it."""
    if len(image.config.user) > USER_LIMIT:
        return f"its User has {len(image.config.user)} characters, the limit is {USER_LIMIT}"
    return ""


def _drop(file: Path) -> None:
    """Delete an entry; one that cannot be deleted must not prevent a start."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        log.warning("cannot delete %s, which is tried again at the next start: %s", file, error)


def _union(old: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*old, *new)))
