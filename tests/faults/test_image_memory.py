"""The daemon's memory under hostile images and registries: measured by the kernel, and bounded."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from cri.cli.client import CallFailed, Client
from cri.proto import husk_v1_pb2 as husk
from cri.proto import runtime_v1_pb2 as pb
from tests.fakes.registry import OCI, FakeRegistry, Status
from tests.kit.image_daemon import ImageDaemon, image_daemon
from tests.kit.layers import archive, entry, file, folder, hard, link, padded, raw_header, raw_header_gnu

BOUND_MIB = 150
MIB = 1 << 20
IMAGE_SERVICE = pb.DESCRIPTOR.services_by_name["ImageService"]
IMAGES = husk.DESCRIPTOR.services_by_name["Images"]
CONFIG: dict[str, object] = {"architecture": "amd64", "os": "linux"}
Put = Callable[[FakeRegistry], None]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageDaemon]:
    """One daemon for all tests: what one leaves in memory counts for the next ones."""
    with image_daemon(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: ImageDaemon) -> Iterator[Client]:
    with Client(daemon.socket) as client:
        yield client


def pull(client: Client, registry: FakeRegistry, name: str = "a:1") -> str:
    """Pull and remove an image; return the error, or nothing."""
    spec = pb.ImageSpec(image=f"{registry.address}/{name}")
    try:
        client.call(IMAGE_SERVICE, "PullImage", pb.PullImageRequest(image=spec), timeout_s=120)
    except CallFailed as error:
        return error.details
    client.call(IMAGE_SERVICE, "RemoveImage", pb.RemoveImageRequest(image=spec), timeout_s=120)
    return ""


def records(count: int, prefix: str = "SCHILY.xattr.user.") -> bytes:
    """Return pax records with distinct keys."""
    body = b""
    for n in range(count):
        record = f" {prefix}{n:09}=x\n".encode()
        body += str(len(record) + 2).encode() + record
    return body


def extension(kind: bytes, body: bytes) -> bytes:
    """Return an extension entry."""
    return raw_header(entry("pax", kind, size=len(body))) + padded(body)


def put_layer(registry: FakeRegistry, blob: bytes, plain: bytes = b"", tag: str = "1") -> None:
    """Put an image with one layer that is packed already; `plain` gives its diff id."""
    config = CONFIG | {"rootfs": {"type": "layers", "diff_ids": [digest(plain)]}}
    put_image(registry, json.dumps(config).encode(), [blob], tag)


def put_image(registry: FakeRegistry, config: bytes, blobs: list[bytes], tag: str = "1") -> None:
    """Put an image of any configuration and layers."""
    layers = [descriptor(registry, blob, f"{OCI}.layer.v1.tar+gzip") for blob in blobs]
    value = {
        "schemaVersion": 2,
        "config": descriptor(registry, config, f"{OCI}.config.v1+json"),
        "layers": layers,
    }
    registry.put_manifest("a", tag, value, f"{OCI}.manifest.v1+json")


def descriptor(registry: FakeRegistry, blob: bytes, kind: str) -> dict[str, object]:
    """Put a blob and describe it."""
    return {"mediaType": kind, "digest": registry.put_blob(blob), "size": len(blob)}


def digest(data: bytes) -> str:
    """Return a sha256 digest."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def tar_of(*parts: bytes) -> Callable[[FakeRegistry], None]:
    """Put a layer of these bytes."""
    return lambda registry: put_layer(registry, gzip.compress(b"".join(parts), 1), b"".join(parts))


def zstd_bomb(window_log: int, size: int) -> bytes:
    """Return a zstd frame of zeros."""
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    head = compressor.compress(raw_header_gnu(entry("f", size=size)))
    return head + b"".join(compressor.compress(bytes(MIB)) for _ in range(size // MIB)) + compressor.flush()


def many(count: int, make: Callable[[int], tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """Return an archive of so many entries."""
    return b"".join(raw_header_gnu(info) + padded(data) for info, data in map(make, range(count))) + bytes(
        1024
    )


def long_name(number: int, size: int) -> str:
    """Return a path of about `size` bytes, in directories of 250."""
    parts = [f"{number:06}" + "n" * 244] * (size // 251) + [str(number)]
    return "/".join(parts)


def long_names(count: int, size: int) -> bytes:
    """Return directories with different long names, each in a GNU header."""
    out = io.BytesIO()
    for number in range(count):
        name = long_name(number, size).encode()
        out.write(extension(tarfile.GNUTYPE_LONGNAME, name + b"\0") + raw_header(entry("d", tarfile.DIRTYPE)))
    return out.getvalue()


def old_sparse(blocks: int) -> bytes:
    """Return a sparse file of the old GNU format with this many extension blocks of empty segments."""
    header = bytearray(raw_header(entry("holes", b"S")))
    header[257:265] = b"ustar  \0"
    header[482] = 1
    header[483:495] = b"%011o\0" % 0
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    block = (b"%011o\0%011o\0" % (0, 0)) * 21 + b"\1" + bytes(7)
    return bytes(header) + block * blocks


def configured(config: dict[str, object] | bytes) -> Put:
    """Put an image without layers, with this configuration."""
    data = config if isinstance(config, bytes) else json.dumps(CONFIG | config).encode()
    return lambda registry: put_image(registry, data, [])


def manifest_of(data: bytes) -> Put:
    """Put any manifest."""
    return lambda registry: _put(registry, data)


def _put(registry: FakeRegistry, data: bytes) -> None:
    registry.put_manifest("a", "1", data, f"{OCI}.manifest.v1+json")


EXTENSIONS = b"".join(extension(tarfile.XHDTYPE, records(4000)) for _ in range(100))
GLOBALS = b"".join(
    extension(tarfile.XGLTYPE, records(4000, "VENDOR.")) + raw_header(entry(f"f{n}")) for n in range(50)
)
SPARSE_MAP = b",".join([b"0,0"] * 200_000)
LAYERS: dict[str, tuple[Put, str]] = {
    "tree of 256 levels, 8 times": (tar_of(many(8, lambda n: folder("/".join([f"d{n}"] * 256)))), ""),
    "links to a deep tree": (tar_of(archive(link("l", "/".join(["d"] * 1990)), file("l/f"))), "layer_depth"),
    "endless pax headers": (tar_of(EXTENSIONS), "extensions_bytes"),
    "endless global headers": (tar_of(GLOBALS), "global_bytes"),
    "one huge pax header": (tar_of(raw_header(entry("x", tarfile.XHDTYPE, size=1 << 30))), "extension_bytes"),
    "gzip bomb": (tar_of(raw_header_gnu(entry("f", size=200 * MIB)), bytes(200 * MIB)), ""),
    "zeros after the end": (tar_of(archive(file("f")), bytes(80 * MIB)), "layer_tail_bytes"),
    "zstd with a window of 128 MiB": (lambda r: put_layer(r, zstd_bomb(27, 4 * MIB)), "window_bytes"),
    "zstd bomb with a window of 32 MiB": (lambda r: put_layer(r, zstd_bomb(25, 200 * MIB)), "diff id"),
    "8,000 directories": (tar_of(many(8_000, lambda n: folder(f"{n // 999}/{n}" + "x" * 80))), ""),
    "30,000 files": (tar_of(many(30_000, lambda n: file(f"{n // 999}/{n}", b""))), ""),
    "paths of 4 KiB": (tar_of(long_names(100, 3800)), ""),
    "paths above PATH_MAX": (tar_of(long_names(2, 5000)), "4096 bytes"),
    "chain of 15,000 hard links": (
        tar_of(raw_header(entry("h0")), many(15_000, lambda n: hard(f"h{n + 1}", f"h{n}"))), "",
    ),
    "old sparse file with a million segments": (tar_of(old_sparse(60_000)), "layer_segments"),
    "sparse map of a megabyte": (
        tar_of(extension(tarfile.XHDTYPE, b"%d GNU.sparse.map=%b\n" % (len(SPARSE_MAP) + 23, SPARSE_MAP)
               + b"21 GNU.sparse.size=0\n"), raw_header(entry("f"))), "",
    ),
    "flood of extended attributes": (
        tar_of(extension(tarfile.XHDTYPE, records(9000)), raw_header(entry("f"))),
        "9000 extended attributes",
    ),
    "large extended attribute": (
        tar_of(extension(tarfile.XHDTYPE, b"900031 SCHILY.xattr.user.x=" + b"v" * 900_003 + b"\n"),
               raw_header(entry("f"))), "'f'",
    ),
}  # fmt: skip
LISTS = b"[" + b"[]," * 1_300_000 + b"[]]"
STRING = b'{"schemaVersion":2,"mediaType":"' + b"x" * (4 * MIB - 100) + b'"}'
ODD = {"schemaVersion": 2, "config": {"digest": "md5:" + "0" * (3 * MIB), "size": 1}}


def labels(count: int) -> Put:
    """Put an image with many labels."""
    return configured({"config": {"Labels": {f"label{n}": "x" * 30 for n in range(count)}}})


DOCUMENTS: dict[str, tuple[Put, str]] = {
    "manifest of a million lists": (manifest_of(LISTS), "json_values"),
    "manifest of a million strings": (manifest_of(b'["",' * 1_000_000), "json_values"),
    "manifest with deep lists": (manifest_of(b"[" * 50_000), "json_depth"),
    "manifest with deep objects": (manifest_of(b'{"a":' * 50_000), "json_depth"),
    "manifest of 40 MiB": (manifest_of(b" " * (40 * MIB)), "manifest_bytes"),
    "string of 4 MiB": (manifest_of(STRING), "not an image"),
    "configuration of 40 MiB": (configured(b" " * (40 * MIB)), "config_bytes"),
    "configuration of a million lists": (configured(LISTS), "json_values"),
    "User of 3 MiB": (configured({"config": {"User": "1" * (3 * MIB)}}), "user_characters"),
    "Env of 3 MiB": (configured({"config": {"Env": ["A=" + "x" * (3 * MIB)]}}), "run_bytes"),
    "6,000 empty arguments": (configured({"config": {"Cmd": [""] * 6000}}), "run_bytes"),
    "90,000 variables": (configured({"config": {"Env": ["A=xy"] * 90_000}}), "run_bytes"),
    "80,000 labels": (labels(80_000), "json_values"),
    "20,000 labels": (labels(20_000), ""),
    "time of 3 MiB": (configured({"created": "2" * (3 * MIB)}), ""),
    "architecture of 3 MiB": (configured({"architecture": "x" * (3 * MIB)}), "no image for linux/"),
    "thousands of layers": (lambda r: put_image(r, b"{}", [b"x"] * 5000), "registry.limits.layers"),
    "digest of another algorithm": (manifest_of(json.dumps(ODD).encode()), "bad digest"),
}


def check(daemon: ImageDaemon, error: str, expected: str) -> None:
    """Compare an error with the limit that it must name, and the daemon's peak with the bound."""
    peak_mib = daemon.peak_mib()
    assert expected in error and bool(error) == bool(expected), error[:500]
    assert len(error) < 4000 and peak_mib < BOUND_MIB


@pytest.mark.parametrize("kind", LAYERS)
def test_memory_under_a_hostile_layer_is_bounded(
    daemon: ImageDaemon, client: Client, registry: FakeRegistry, kind: str
) -> None:
    put, expected = LAYERS[kind]
    put(registry)
    daemon.forget_peak()
    check(daemon, pull(client, registry), expected)


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_memory_under_a_hostile_document_is_bounded(
    daemon: ImageDaemon, client: Client, registry: FakeRegistry, kind: str
) -> None:
    put, expected = DOCUMENTS[kind]
    put(registry)
    daemon.forget_peak()
    check(daemon, pull(client, registry), expected)


@pytest.mark.parametrize(
    ("path", "status", "expected"),
    [
        ("manifests", Status(200, {f"X-{n}": "x" for n in range(300)}), "registry.limits.headers"),
        ("manifests", Status(200, {f"X-{n}": "x" * 900 for n in range(80)}), "header_bytes"),
        ("manifests", Status(401, {"WWW-Authenticate": "Basic a=b, " * 2000}), "challenge_bytes"),
        ("manifests", Status(401, {"WWW-Authenticate": "Basic, " * 200}), "registry.limits.challenges"),
        ("manifests", Status(500, {}, b"[" * (20 * MIB)), "500"),
        ("token", Status(200, {}, b" " * (20 * MIB)), "token_answer_bytes"),
        ("token", Status(200, {}, json.dumps({"token": "x" * 900_000}).encode()), "token_bytes"),
        ("token", Status(200, {}, b"[" * 900_000), "not a token"),
    ],
)
def test_memory_under_a_hostile_registry_is_bounded(
    daemon: ImageDaemon, client: Client, registry: FakeRegistry, path: str, status: Status, expected: str
) -> None:
    registry.sign_in, registry.open_tokens = ("bearer", True) if path == "token" else ("", False)
    registry.fail(path, status, times=99)
    daemon.forget_peak()
    check(daemon, pull(client, registry), expected)


def test_memory_under_many_hostile_pulls_at_once_is_bounded(
    daemon: ImageDaemon, client: Client, registry: FakeRegistry
) -> None:
    """Two places for unpacking, and each layer wants 32 MiB to be decompressed."""
    for n in range(4):
        put_layer(registry, zstd_bomb(25, (60 + n) * MIB), tag=f"z{n}")
    for n in range(4):
        config = json.dumps(CONFIG | {"x": "y" * (3 * MIB), "n": n, "rootfs": {"diff_ids": []}}).encode()
        put_image(registry, config, [], tag=f"c{n}")
    daemon.forget_peak()
    names = [f"a:{kind}{n}" for n in range(4) for kind in "zc"]
    with ThreadPoolExecutor(8) as pool:
        errors = dict(zip(names, pool.map(lambda name: pull(client, registry, name), names), strict=True))
    assert all(("diff id" in error) == name.startswith("a:z") for name, error in errors.items()), errors
    assert daemon.peak_mib() < BOUND_MIB


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (many(30_000, lambda n: file(f"f{n}", b"")), "archive_entries"),
        (EXTENSIONS, "extensions_bytes"),
        (archive(file("manifest.json", b"[" * 9000)), "json_depth"),
        (archive(file("manifest.json", b"[" + b"{}," * MIB + b"{}]")), "json_values"),
        (archive(file("index.json", b" " * (5 * MIB))), "manifest_bytes"),
        (zstd_bomb(27, 4 * MIB), "window_bytes"),
    ],
    ids=["entries", "extensions", "deep json", "many values", "large index", "window"],
)
def test_memory_under_a_hostile_archive_is_bounded(
    daemon: ImageDaemon, client: Client, tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "archive"
    path.write_bytes(content)
    daemon.forget_peak()
    with pytest.raises(CallFailed) as caught:
        list(client.stream(IMAGES, "Import", husk.ImportRequest(path=str(path))))
    check(daemon, caught.value.details, expected)
