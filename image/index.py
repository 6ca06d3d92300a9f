"""Which images are here, and by what names.

    ROOT/images/ID.json    one file per image, replaced as a whole

An image's id is the digest of its configuration, so the same content under two names is one image
with two names. A tag belongs to one image: adding another takes it away. A file that cannot be
read is reported and left out; the others are loaded. Losing a file loses the image, which is
pulled again: nothing here waits for the disk.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import msgspec

from image.blobs import storage_error
from image.errors import ImageNotFound, InvalidReference
from image.manifest import RunConfig
from image.reference import is_digest, parse
from sandbox.host.files import write_json

log = logging.getLogger(__name__)

_HEX = re.compile(r"[a-f0-9]{3,64}")  # an id, whole or cut short


class RunDefaults(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an image wants to be run (OCI image-spec, config.md)."""

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
    id: str  # "sha256:...", the configuration's digest
    repo_tags: tuple[str, ...] = ()  # full names, "docker.io/library/busybox:latest"
    repo_digests: tuple[str, ...] = ()  # "docker.io/library/busybox@sha256:..."
    size: int  # bytes that its layers take here, and its configuration; more than 0
    chain_ids: tuple[str, ...] = ()  # bottom first
    config: RunDefaults = RunDefaults()
    created: str = ""  # RFC 3339, as the builder wrote it
    pinned: bool = False


class Index:
    """Belongs to one event loop; every change is one short write."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "images"
        self._images: dict[str, Image] = {}
        self._names: dict[str, str] = {}  # every tag and repo digest -> id

    def load(self, complete: Callable[[Image], bool] = lambda image: True) -> None:
        """Read all images; forget those that are not `complete` any more."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in sorted(self._folder.iterdir()):
            try:
                image = msgspec.json.decode(file.read_bytes(), type=Image)
                if self._file(image.id) != file or image.size <= 0:
                    raise ValueError("does not fit its name")
            except (OSError, msgspec.DecodeError, ValueError) as error:
                log.warning("image entry %s is dropped: %s", file.name, error)
                file.unlink(missing_ok=True)
                continue
            if complete(image):
                self._take(image)
            else:
                log.warning("image %s is dropped: some of its layers are gone", image.id)
                file.unlink(missing_ok=True)

    def list(self) -> tuple[Image, ...]:
        return tuple(self._images.values())

    def get(self, id: str) -> Image | None:
        return self._images.get(id)

    def find(self, ref: str) -> Image:
        """By id, by the beginning of an id, by tag, by digest, or by name alone (its :latest).

        A name wins over the beginning of an id: "cafe" is a good name of either kind.
        Raises ImageNotFound.
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
            raise ImageNotFound(ref, f"the id is ambiguous, {len(found)} images begin with it")
        return found[0] if found else None

    # ------------------------------------------------------------------------------ changes

    def add(self, image: Image) -> Image:
        """Add an image, or more names to one that is here; gives what is here now."""
        known = self._images.get(image.id)
        if known is not None:
            image = msgspec.structs.replace(
                image,
                repo_tags=_union(known.repo_tags, image.repo_tags),
                repo_digests=_union(known.repo_digests, image.repo_digests),
                pinned=known.pinned or image.pinned,
            )
        self._write(image)
        for tag in image.repo_tags:
            owner = self._names.get(tag)
            if owner is not None and owner != image.id:
                self.untag(tag)
        self._take(image)
        return image

    def untag(self, tag: str) -> None:
        """Take a name away from its image, which stays. Unknown names are fine."""
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
        self._images[left.id] = left

    def remove(self, ref: str) -> Image | None:
        """Remove the image that answers to `ref`, with all its names, at once; None: not here."""
        try:
            image = self.find(ref)
        except ImageNotFound:
            return None
        self._file(image.id).unlink(missing_ok=True)
        del self._images[image.id]
        self._names = {name: id for name, id in self._names.items() if id != image.id}
        return image

    def _take(self, image: Image) -> None:
        self._images[image.id] = image
        for name in (*image.repo_tags, *image.repo_digests):
            self._names[name] = image.id

    def _file(self, id: str) -> Path:
        return self._folder / f"{id.removeprefix('sha256:')}.json"

    def _write(self, image: Image) -> None:
        file = self._file(image.id)
        try:
            write_json(file, image)
        except OSError as error:
            raise storage_error(error, file, "writing the image index") from error


def _union(old: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*old, *new)))
