"""The daemon's memory under many hostile pulls at once, a daemon for each kind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cri.cli.client import CallFailed, Client
from cri.proto import husk_v1_pb2 as husk
from cri.proto import runtime_v1_pb2 as pb
from tests.fakes.registry import OCI, FakeRegistry, StallAfter, Status
from tests.kit.eventually import eventually_sync
from tests.kit.image_daemon import ImageDaemon, image_daemon
from tests.kit.layers import archive, entry, file, padded, raw_header, raw_header_gnu

BOUND_MIB = 150
MIB = 1 << 20
IMAGES = husk.DESCRIPTOR.services_by_name["Images"]
IMAGE_SERVICE = pb.DESCRIPTOR.services_by_name["ImageService"]
PLATFORM = {"architecture": "amd64", "os": "linux"}
BIG = {f"note{n}": "x" * 1000 for n in range(3800)}
"""A map of 3.8 MiB, below the limit of a document."""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[ImageDaemon]:
    with image_daemon(tmp_path) as daemon:
        yield daemon


def pull_all(daemon: ImageDaemon, names: Sequence[str]) -> list[str]:
    """Pull all at once; return each one's error, or nothing."""

    def pull(name: str) -> str:
        with Client(daemon.socket) as client:
            try:
                request = pb.PullImageRequest(image=pb.ImageSpec(image=name))
                client.call(IMAGE_SERVICE, "PullImage", request, timeout_s=120)
            except CallFailed as error:
                return error.details
        return ""

    daemon.forget_peak()
    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(pull, names))


def check_peak(daemon: ImageDaemon) -> None:
    """Compare the most memory that the daemon had since the pulls began with the bound."""
    assert daemon.peak_mib() < BOUND_MIB


@contextlib.contextmanager
def registries(count: int) -> Iterator[list[FakeRegistry]]:
    """Yield so many registries, each with its own address."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(FakeRegistry().serving()) for _ in range(count)]


def descriptor(registry: FakeRegistry, blob: bytes, kind: str) -> dict[str, object]:
    """Put a blob and describe it."""
    return {"mediaType": f"{OCI}.{kind}", "digest": registry.put_blob(blob), "size": len(blob)}


def put(registry: FakeRegistry, tag: str, layer: bytes, *, large: bool = True) -> dict[str, object]:
    """Put an image of one layer that is none, with large documents; return its descriptor."""
    rootfs = {"type": "layers", "diff_ids": ["sha256:" + f"{int.from_bytes(tag.encode()):064x}"[-64:]]}
    config = {**PLATFORM, "config": {"Labels": BIG if large else {}}, "rootfs": rootfs}
    value = {
        "schemaVersion": 2,
        "config": descriptor(registry, json.dumps(config).encode(), "config.v1+json"),
        "layers": [descriptor(registry, layer, "layer.v1.tar")],
        "annotations": BIG if large else {},
    }
    digest = registry.put_manifest("a", tag, value, f"{OCI}.manifest.v1+json")
    return {"mediaType": f"{OCI}.manifest.v1+json", "digest": digest, "size": len(json.dumps(value))}


@pytest.mark.parametrize("count", [1, 40])
def test_memory_under_forty_pulls_of_large_documents_is_bounded(daemon: ImageDaemon, count: int) -> None:
    with registries(count) as serving:
        names = []
        for n in range(40):
            put(serving[n % count], f"n{n}", b"none")
            names.append(f"{serving[n % count].address}/a:n{n}")
        errors = pull_all(daemon, names)
    assert all("layer rejected" in error for error in errors), errors
    check_peak(daemon)


def index(registry: FakeRegistry, entry: dict[str, object], tag: str) -> None:
    """Put an index of an entry that is for another platform, and of one without any."""
    put(registry, f"{tag}i", b"none")
    other = put(registry, f"{tag}o", b"none", large=False)
    value = {"schemaVersion": 2, "manifests": [other | entry, other | {"artifactType": "x" * 1000}]}
    registry.put_manifest("a", tag, value, f"{OCI}.index.v1+json")


LONG = {"platform": {"architecture": "x" * (39 * MIB // 10), "os": "y"}}
LAYER_PLATFORM = {"platform": {"architecture": "amd64", "os": "linux", "variant": "v" * (39 * MIB // 10)}}


@pytest.mark.parametrize("entry", [LONG, LAYER_PLATFORM], ids=["other", "variant"])
def test_memory_under_forty_indexes_with_long_platforms_is_bounded(
    daemon: ImageDaemon, registry: FakeRegistry, entry: dict[str, object]
) -> None:
    for n in range(40):
        index(registry, entry, f"n{n}")
    errors = pull_all(daemon, [f"{registry.address}/a:n{n}" for n in range(40)])
    assert all("layer rejected" in error for error in errors), errors
    check_peak(daemon)


@pytest.mark.parametrize("what", ["manifests", "blobs"])
def test_memory_under_forty_documents_that_never_end_is_bounded(daemon: ImageDaemon, what: str) -> None:
    """All have arrived but for their last bytes, and wait for them."""
    with registries(40) as serving, ThreadPoolExecutor(1) as pool:
        for n, registry in enumerate(serving):
            put(registry, f"n{n}", b"none")
            registry.fail(what, StallAfter(3 * MIB), times=99)
        pulls = pool.submit(pull_all, daemon, [f"{each.address}/a:n{n}" for n, each in enumerate(serving)])
        eventually_sync(lambda: nameless_bytes(daemon), until=lambda size: size > 119 * MIB, timeout_s=60)
        check_peak(daemon)
        daemon.kill()
        assert all(pulls.result())


def nameless_bytes(daemon: ImageDaemon) -> int:
    """Return the size of all files that the daemon holds open below its root, but that have no name."""
    total = 0
    for each in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(daemon.root) in (target := str(each.readlink())) and target.endswith("(deleted)"):
                total += each.stat().st_size
    return total


def test_memory_under_forty_large_tokens_is_bounded(daemon: ImageDaemon) -> None:
    with registries(40) as serving:
        for registry in serving:
            registry.sign_in, registry.open_tokens = "bearer", True
            registry.fail("token", Status(200, {}, b"[" * 1_000_000), times=99)
        errors = pull_all(daemon, [f"{each.address}/a:1" for each in serving])
    assert all("not a token" in error for error in errors), errors
    check_peak(daemon)


def test_memory_under_twenty_registries_with_large_layers_is_bounded(daemon: ImageDaemon) -> None:
    """Each layer may come in parts over several connections."""
    layer = random.Random(1).randbytes(34 * MIB)
    with registries(20) as serving:
        for n, registry in enumerate(serving):
            put(registry, f"n{n}", layer, large=False)
        errors = pull_all(daemon, [f"{each.address}/a:n{n}" for n, each in enumerate(serving)])
    assert all("layer rejected" in error for error in errors), errors
    check_peak(daemon)


def import_error(daemon: ImageDaemon, path: Path) -> str:
    """Import an archive; return the error, or nothing."""
    with Client(daemon.socket) as client:
        try:
            list(client.stream(IMAGES, "Import", husk.ImportRequest(path=str(path))))
        except CallFailed as error:
            return error.details
    return ""


def long_member(kind: str, number: int) -> bytes:
    """Return an entry with a name, or the target of a link, of 4,000 bytes."""
    name = f"{number:05}".encode() + b"n" * 3995
    if kind == "name":
        header = raw_header(entry("long", tarfile.GNUTYPE_LONGNAME, size=len(name) + 1))
        return header + padded(name + b"\0") + raw_header_gnu(entry("f"))
    header = raw_header(entry("long", tarfile.GNUTYPE_LONGLINK, size=len(name) + 1))
    return header + padded(name + b"\0") + raw_header_gnu(entry(f"l{number}", tarfile.SYMTYPE))


@pytest.mark.parametrize("kind", ["name", "target"])
def test_memory_under_an_archive_of_long_names_is_bounded(
    daemon: ImageDaemon, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "long.tar"
    with path.open("wb") as out:
        for number in range(19_000):
            out.write(long_member(kind, number))
    daemon.forget_peak()
    error = import_error(daemon, path)
    assert "archive names bytes: " in error and "is above the limit of 4194304" in error
    assert "at 010" in error if kind == "name" else "at l10" in error
    check_peak(daemon)


def test_memory_under_twenty_imports_at_once_is_bounded(daemon: ImageDaemon, tmp_path: Path) -> None:
    """Each archive has many members, and an index and a manifest of nearly 4 MiB each."""
    value = {"schemaVersion": 2, "config": {}, "layers": [], "annotations": BIG}
    manifest = json.dumps(value).encode()
    digits = hashlib.sha256(manifest).hexdigest()
    index = {
        "schemaVersion": 2,
        "manifests": [{"mediaType": f"{OCI}.manifest.v1+json", "digest": f"sha256:{digits}", "size": 1}],
        "annotations": BIG,
    }
    members = [file(f"blobs/{n:04}" + "n" * 200, b"") for n in range(6000)]
    documents = [file("index.json", json.dumps(index).encode()), file(f"blobs/sha256/{digits}", manifest)]
    path = tmp_path / "large.tar"
    path.write_bytes(archive(*members, *documents))
    daemon.forget_peak()
    with ThreadPoolExecutor(20) as pool:
        errors = list(pool.map(lambda _: import_error(daemon, path), range(20)))
    assert all("sha256" in error for error in errors), errors
    check_peak(daemon)


def test_memory_under_an_archive_of_many_manifests_with_many_names_is_bounded(
    daemon: ImageDaemon, tmp_path: Path
) -> None:
    """Each manifest of the index would get all names that manifest.json has for its configuration."""
    config = "sha256:" + hashlib.sha256(b"{}").hexdigest()
    described = {"mediaType": f"{OCI}.config.v1+json", "digest": config, "size": 2}
    manifests = [
        json.dumps({"schemaVersion": 2, "config": described, "layers": [], "n": n}).encode()
        for n in range(5000)
    ]
    digests = [hashlib.sha256(each).hexdigest() for each in manifests]
    index = {
        "schemaVersion": 2,
        "manifests": [{"digest": f"sha256:{each}", "size": 1} for each in digests],
    }
    member = f"blobs/sha256/{config.removeprefix('sha256:')}"
    docker = [{"Config": member, "Layers": [], "RepoTags": [f"a:{n}" for n in range(90_000)]}]
    blobs = [file(f"blobs/sha256/{each}", data) for each, data in zip(digests, manifests, strict=True)]
    path = tmp_path / "names.tar"
    path.write_bytes(
        archive(
            file("index.json", json.dumps(index).encode()),
            file("manifest.json", json.dumps(docker).encode()),
            file(member, b"{}"),
            *blobs,
        )
    )
    daemon.forget_peak()
    assert "archive_images" in import_error(daemon, path)
    check_peak(daemon)
