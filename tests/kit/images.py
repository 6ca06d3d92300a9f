"""Test images made from Debian packages: a busybox userland, a web server, users, helpers.

Their bytes depend only on the installed packages and this file, so digests are stable on one machine. An
image can be written as an OCI layout or a docker-archive, or pushed (see `kit.registry`).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path

import zstandard

from tests.kit.scratch import scratch_root

HELPERS = Path(__file__).parent / "helpers"
EPOCH = "2020-01-01T00:00:00Z"
PATH_VARIABLE = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

type_oci = "application/vnd.oci.image"
type_docker = "application/vnd.docker"


class Form(Enum):
    """Media types of manifest, configuration, layer and index."""

    OCI = (
        f"{type_oci}.manifest.v1+json",
        f"{type_oci}.config.v1+json",
        f"{type_oci}.layer.v1.tar",
        f"{type_oci}.index.v1+json",
    )
    DOCKER = (
        f"{type_docker}.distribution.manifest.v2+json",
        f"{type_docker}.container.image.v1+json",
        f"{type_docker}.image.rootfs.diff.tar",
        f"{type_docker}.distribution.manifest.list.v2+json",
    )

    @property
    def manifest(self) -> str:
        """Media type of manifests."""
        return self.value[0]

    @property
    def config(self) -> str:
        """Media type of configurations."""
        return self.value[1]

    @property
    def index(self) -> str:
        """Media type of indexes."""
        return self.value[3]

    def layer(self, packing: Packing) -> str:
        """Return the media type of layers with this compression."""
        separator = "." if self is Form.DOCKER else "+"
        return self.value[2] + (separator + packing.value if packing.value else "")


class Packing(Enum):
    """Compression of a layer."""

    PLAIN = ""
    GZIP = "gzip"
    ZSTD = "zstd"


def digest_of(data: bytes) -> str:
    """Return the sha256 digest."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------------------------ layers


@dataclass
class Layer:
    """A tar archive whose bytes depend only on its contents."""

    packing: Packing = Packing.GZIP
    entries: dict[str, tuple[tarfile.TarInfo, bytes]] = field(default_factory=dict)
    _made: dict[str, bytes] = field(default_factory=dict)  # tar and packed bytes, until the next add

    def add(
        self,
        path: str,
        data: bytes | str = b"",
        *,
        mode: int = 0o644,
        kind: bytes = tarfile.REGTYPE,
        link: str = "",
        uid: int = 0,
        gid: int = 0,
        xattrs: Mapping[str, bytes] | None = None,
    ) -> Layer:
        """Add an entry, and its missing parents; returns self. A later entry of one path replaces the
        earlier."""
        path = path.strip("/")
        parent = path.rpartition("/")[0]
        if parent and parent not in self.entries:
            self.directory(parent)
        content = data.encode() if isinstance(data, str) else data
        info = tarfile.TarInfo(path)
        info.type, info.mode, info.linkname, info.uid, info.gid = kind, mode, link, uid, gid
        info.size = len(content) if kind == tarfile.REGTYPE else 0
        # bytes of a pax header that are not UTF-8 are written as they are
        values = {key: value.decode(errors="surrogateescape") for key, value in (xattrs or {}).items()}
        info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in values.items()}
        self.entries[path] = (info, content)
        self._made.clear()
        return self

    def directory(self, path: str, mode: int = 0o755, uid: int = 0, gid: int = 0) -> Layer:
        """Add a directory; returns self."""
        return self.add(path, mode=mode, kind=tarfile.DIRTYPE, uid=uid, gid=gid)

    def symlink(self, path: str, target: str) -> Layer:
        """Add a symbolic link; returns self."""
        return self.add(path, kind=tarfile.SYMTYPE, link=target, mode=0o777)

    def hardlink(self, path: str, target: str) -> Layer:
        """Add a hard link to an entry of this layer; returns self."""
        return self.add(path, kind=tarfile.LNKTYPE, link=target, mode=0o755)

    def tar(self) -> bytes:
        """Return the plain tar."""
        if "tar" not in self._made:
            self._made["tar"] = self._tar()
        return self._made["tar"]

    def packed(self) -> bytes:
        """Return the tar, compressed."""
        if "packed" not in self._made:
            self._made["packed"] = self._packed()
        return self._made["packed"]

    def _tar(self) -> bytes:
        raw = io.BytesIO()
        plain = not any(info.pax_headers for info, _ in self.entries.values())
        form = tarfile.GNU_FORMAT if plain else tarfile.PAX_FORMAT
        with tarfile.open(fileobj=raw, mode="w", format=form) as archive:
            # a hard link must follow its target
            for path in sorted(self.entries, key=lambda name: (self.entries[name][0].islnk(), name)):
                info, data = self.entries[path]
                archive.addfile(info, io.BytesIO(data) if info.size else None)
        return raw.getvalue()

    def _packed(self) -> bytes:
        raw = self.tar()
        match self.packing:
            case Packing.PLAIN:
                return raw
            case Packing.GZIP:
                return gzip.compress(raw, compresslevel=6, mtime=0)
            case Packing.ZSTD:
                return zstandard.ZstdCompressor(level=3).compress(raw)


# ------------------------------------------------------------------------------------ images


@dataclass(frozen=True)
class Image:
    """A single-platform image, without a name."""

    layers: tuple[Layer, ...]
    form: Form = Form.OCI
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = (PATH_VARIABLE,)
    user: str = ""
    working_dir: str = ""
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    architecture: str = "amd64"

    def config(self) -> bytes:
        """Return the image configuration."""
        run: dict[str, object] = {"Env": list(self.env)}
        run |= {"Entrypoint": list(self.entrypoint)} if self.entrypoint else {}
        run |= {"Cmd": list(self.cmd)} if self.cmd else {}
        run |= {"User": self.user} if self.user else {}
        run |= {"WorkingDir": self.working_dir} if self.working_dir else {}
        run |= {"StopSignal": self.stop_signal} if self.stop_signal else {}
        run |= {"Volumes": {volume: {} for volume in self.volumes}} if self.volumes else {}
        run |= {"Labels": dict(self.labels)} if self.labels else {}
        document = {
            "architecture": self.architecture,
            "os": "linux",
            "created": EPOCH,
            "config": run,
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer.tar()) for layer in self.layers]},
            "history": [{"created": EPOCH} for _ in self.layers],
        }
        return to_json(document)

    def manifest(self) -> bytes:
        """Return the manifest."""
        config = self.config()
        document = {
            "schemaVersion": 2,
            "mediaType": self.form.manifest,
            "config": descriptor(self.form.config, config),
            "layers": [descriptor(self.form.layer(layer.packing), layer.packed()) for layer in self.layers],
        }
        return to_json(document)

    def blobs(self) -> Iterator[bytes]:
        """Yield everything that the manifest names: configuration and compressed layers."""
        yield self.config()
        for layer in self.layers:
            yield layer.packed()

    @property
    def id(self) -> str:
        """The configuration's digest, which is the image's id in the CRI."""
        return digest_of(self.config())


def to_json(document: object) -> bytes:
    """Return JSON with sorted keys."""
    return json.dumps(document, indent=1, sort_keys=True).encode()


def descriptor(media_type: str, data: bytes) -> dict[str, object]:
    """Return the descriptor of these bytes."""
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}


def index_of(images: Sequence[Image], form: Form = Form.OCI) -> bytes:
    """Return an image index (manifest list) of images for several platforms."""
    members = [
        descriptor(form.manifest, image.manifest())
        | {"platform": {"architecture": image.architecture, "os": "linux"}}
        for image in images
    ]
    return to_json({"schemaVersion": 2, "mediaType": form.index, "manifests": members})


def write_oci_layout(archive: Path, images: Mapping[str, Image]) -> None:
    """Write a tar of an OCI image layout (image-spec, image-layout.md) with one entry per full name."""
    files = {"oci-layout": to_json({"imageLayoutVersion": "1.0.0"})}
    members = []
    for name, image in images.items():
        manifest = image.manifest()
        for blob in (manifest, *image.blobs()):
            files["blobs/" + digest_of(blob).replace(":", "/")] = blob
        notes = {"annotations": {"org.opencontainers.image.ref.name": name}}
        members.append(descriptor(image.form.manifest, manifest) | notes)
    files["index.json"] = to_json({"schemaVersion": 2, "manifests": members})
    write_tar(archive, files)


def write_docker_archive(archive: Path, images: Mapping[str, Image]) -> None:
    """Write a tar in the format of `docker save`: manifest.json and plain layer tars."""
    files: dict[str, bytes] = {}
    members = []
    for name, image in images.items():
        config_name = image.id.removeprefix("sha256:") + ".json"
        layers = {f"{digest_of(tar)[7:]}/layer.tar": tar for tar in (each.tar() for each in image.layers)}
        files |= {config_name: image.config(), **layers}
        members.append({"Config": config_name, "RepoTags": [name], "Layers": list(layers)})
    files["manifest.json"] = to_json(members)
    write_tar(archive, files)


def write_tar(archive: Path, files: Mapping[str, bytes]) -> None:
    """Write a tar of these files."""
    content = Layer(packing=Packing.PLAIN)
    for path, data in files.items():
        content.add(path, data)
    archive.write_bytes(content.tar())


# ----------------------------------------------------------------------- what the tests pull

PASSWD = """root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
worker:x:1000:1000:worker:/home/worker:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
"""
GROUP = """root:x:0:
daemon:x:1:
www-data:x:33:
worker:x:1000:
helpers:x:50000:worker
nogroup:x:65534:
"""


@cache
def base_layer() -> Layer:
    """Return busybox from the package busybox-static with its commands, users and groups.

    Raises FileNotFoundError without that package.
    """
    program = shutil.which("busybox")
    if program is None:
        raise FileNotFoundError("busybox (Debian package busybox-static)")
    names = subprocess.run([program, "--list"], check=True, capture_output=True, text=True).stdout.split()
    layer = Layer().add("bin/busybox", Path(program).read_bytes(), mode=0o755)
    for name in names:
        if name != "busybox":
            layer.symlink(f"bin/{name}", "busybox")
    layer.add("etc/passwd", PASSWD).add("etc/group", GROUP)
    for folder in ("dev", "proc", "sys", "root", "run", "mnt", "var/log", "usr/bin", "home/worker"):
        layer.directory(folder)
    return layer.directory("tmp", 0o1777).symlink("var/run", "/run")


@cache
def helper(name: str) -> bytes:
    """Compile kit/helpers/NAME.c and return the static program. Raises CalledProcessError."""
    target = scratch_root() / f"helper-{name}"
    # no build id and no temporary names in it: the same bytes from every build
    flags = ["-static", "-Os", "-s", "-Wall", "-Wextra", "-Werror", "-Wl,--build-id=none"]
    subprocess.run(["cc", *flags, "-o", str(target), str(HELPERS / f"{name}.c")], check=True)
    return target.read_bytes()


def mark(word: str) -> Layer:
    """Return a small layer that makes an image differ from every other one."""
    return Layer().add("etc/image-mark", word + "\n")


def busybox(word: str = "busybox", **changes: object) -> Image:
    """Return an image of busybox, marked by `word`, with these other fields of `Image`."""
    return Image((base_layer(), mark(word)), cmd=("sh",), **changes)  # type: ignore[arg-type]


def web(page: str = "hello from the pod\n") -> Image:
    """Return an image whose web server listens on port 80 and logs each request."""
    layer = Layer().add("www/index.html", page)
    return Image((base_layer(), layer), cmd=("httpd", "-f", "-vv", "-p", "80", "-h", "/www"))


def setuid() -> Image:
    """Return an image whose /bin/effective is set-user-id root and prints its effective user."""
    layer = Layer().add("bin/effective", helper("effective"), mode=0o4755)
    return Image((base_layer(), layer), cmd=("effective",), user="worker")


def meet(volume: str = "/kept") -> Image:
    """Return busybox with /bin/meet, and a VOLUME that has a file and an owner."""
    layer = Layer().add("bin/meet", helper("meet"), mode=0o755)
    layer.directory(volume.lstrip("/"), mode=0o2750, uid=1000, gid=2000)
    layer.add(f"{volume.lstrip('/')}/file", b"of the image\n", uid=1000, gid=2000)
    return Image((base_layer(), layer), volumes=(volume,))


def pause() -> Image:
    """Return an image whose only program waits for a signal."""
    return Image((Layer().add("pause", helper("pause"), mode=0o755),), entrypoint=("/pause",))
