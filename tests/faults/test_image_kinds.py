"""Pulls of what registries hold besides plain images: attestations, artifacts, odd layers and names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import zstandard

from image.errors import ManifestInvalid, ManifestNotFound, UnsupportedMedia
from image.image_store import ImageStore
from image.reference import parse
from tests.fakes.registry import DOCKER, OCI, FakeRegistry
from tests.kit.pulls import BASE, TOP, credentials, open_store, pull_error

AMD64 = {"architecture": "amd64", "os": "linux"}
UNKNOWN = {"architecture": "unknown", "os": "unknown"}
EMPTY = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": "sha256:" + "4" * 64, "size": 2}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1", "docker.io/library/busybox:1"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
        ("team/app", "docker.io/team/app:latest"),
        ("docker.io/team/app:1", "docker.io/team/app:1"),
        ("localhost/app", "localhost/app:latest"),
        ("HOST/app", "HOST/app:latest"),
        ("[::1]:5000/x", "[::1]:5000/x:latest"),
        ("[2001:db8::1]/x/y:1", "[2001:db8::1]/x/y:1"),
    ],
)
def test_short_and_unusual_names_mean_what_the_kubelet_means(text: str, name: str) -> None:
    assert parse(text).tagged == name


@pytest.mark.parametrize("sign_in", ["", "basic", "bearer"])
async def test_image_of_an_ipv6_host_is_pulled(store: ImageStore, sign_in: str) -> None:
    with FakeRegistry(sign_in=sign_in).serving("::1") as registry:
        digest = registry.put_image("team/app", "1", [BASE])
        image = await store.pull(f"{registry.address}/team/app:1", credentials(registry, "password"))
        assert image.repo_tags == (f"{registry.address}/team/app:1",)
        assert registry.address.startswith("[::1]:")
        assert store.find(f"{registry.address}/team/app@{digest}").id == image.id
    await store.close()


async def test_index_with_attestations_gives_the_image(registry: FakeRegistry, store: ImageStore) -> None:
    image = registry.put_image("a", "", [BASE])
    attestation = registry.put_manifest(
        "a", "", {"schemaVersion": 2, "config": EMPTY, "layers": []}, f"{OCI}.manifest.v1+json"
    )
    registry.put_index("a", "1", [(attestation, UNKNOWN), (image, AMD64), (attestation, None)])
    assert len((await store.pull(f"{registry.address}/a:1")).chain_ids) == 1
    await store.close()


async def test_index_of_attestations_only_has_no_image(registry: FakeRegistry, store: ImageStore) -> None:
    attestation = registry.put_manifest(
        "a", "", {"schemaVersion": 2, "config": EMPTY, "layers": []}, f"{OCI}.manifest.v1+json"
    )
    registry.put_index("a", "1", [(attestation, UNKNOWN)])
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, ManifestNotFound) and "unknown/unknown" in str(error)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("application/vnd.cncf.helm.config.v1+json", "an artifact, not a container image"),
        ("application/vnd.oci.empty.v1+json", "an artifact, not a container image"),
        ("", "an artifact, not a container image"),
    ],
)
async def test_artifact_is_refused_by_its_type(
    registry: FakeRegistry, store: ImageStore, kind: str, problem: str
) -> None:
    value = {"schemaVersion": 2, "config": EMPTY | {"mediaType": kind}, "layers": []}
    registry.put_manifest("a", "1", value, f"{OCI}.manifest.v1+json")
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, UnsupportedMedia) and error.media_type == kind and problem in str(error)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (f"{DOCKER}.image.rootfs.foreign.diff.tar.gzip", "stored outside the registry"),
        (f"{OCI}.layer.nondistributable.v1.tar+gzip", "stored outside the registry"),
        (f"{OCI}.layer.v1.tar+gzip+encrypted", "encrypted layers are not supported"),
        ("application/vnd.wasm.content.layer.v1+wasm", "not a supported kind of layer"),
    ],
)
async def test_layer_of_an_unusual_type_is_refused_by_name(
    registry: FakeRegistry, store: ImageStore, kind: str, problem: str
) -> None:
    registry.put_image("a", "1", [BASE])
    value = json.loads(registry.manifests["a", "1"][0])
    value["layers"][0] |= {"mediaType": kind, "urls": ["https://layers.invalid/x"]}
    registry.put_manifest("a", "1", value, f"{OCI}.manifest.v1+json")
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, UnsupportedMedia) and kind in str(error) and problem in str(error)


async def test_layer_with_urls_is_fetched_from_the_registry(
    registry: FakeRegistry, store: ImageStore
) -> None:
    """What the registry has is not fetched from elsewhere (image-spec, descriptor.md, "urls")."""
    registry.put_image("a", "1", [BASE])
    value = json.loads(registry.manifests["a", "1"][0])
    value["layers"][0]["urls"] = ["https://layers.invalid/x"]
    registry.put_manifest("a", "1", value, f"{OCI}.manifest.v1+json")
    assert (await store.pull(f"{registry.address}/a:1")).chain_ids
    await store.close()


async def test_zstd_chunked_layer_is_pulled(registry: FakeRegistry, store: ImageStore) -> None:
    """One frame for each part, and the table of contents in skippable frames (containers/storage)."""
    compress = zstandard.ZstdCompressor().compress
    frames = b"".join(compress(TOP[at : at + 7000]) for at in range(0, len(TOP), 7000))
    toc = compress(b'{"version":1,"entries":[]}')
    packed = frames + b"\x50\x2a\x4d\x18" + len(toc).to_bytes(4, "little") + toc
    registry.put_image("a", "1", [TOP], compression="zstd")
    value = json.loads(registry.manifests["a", "1"][0])
    value["layers"][0] |= {
        "digest": registry.put_blob(packed),
        "size": len(packed),
        "annotations": {"io.github.containers.zstd-chunked.manifest-position": "1:2:3:4"},
    }
    registry.put_manifest("a", "1", value, f"{OCI}.manifest.v1+json")
    assert (await store.pull(f"{registry.address}/a:1")).chain_ids == (
        f"sha256:{hashlib.sha256(TOP).hexdigest()}",
    )
    await store.close()


async def test_layers_with_sha512_digests_are_pulled_and_verified(
    registry: FakeRegistry, store: ImageStore
) -> None:
    registry.put_image("a", "1", [BASE, TOP])
    value = json.loads(registry.manifests["a", "1"][0])
    for described in (value["config"], *value["layers"]):
        blob = registry.blobs[described["digest"]]
        described["digest"] = f"sha512:{hashlib.sha512(blob).hexdigest()}"
        registry.blobs[described["digest"]] = blob
    registry.put_manifest("a", "1", value, f"{OCI}.manifest.v1+json")
    image = await store.pull(f"{registry.address}/a:1")
    assert len(image.chain_ids) == 2 and image.id.startswith("sha512:")
    assert store.find(image.id) == image
    await store.close()
    again = open_store(Path(store.fs_usage().mountpoint).parents[1])
    assert [each.id for each in again.list()] == [image.id]
    assert await again.remove(image.id) == image
    await again.close()


@pytest.mark.parametrize("algorithm", ["md5", "sha384", "sha256+b64u", "SHA256", "blake3"])
async def test_digest_of_another_algorithm_is_refused(
    registry: FakeRegistry, store: ImageStore, algorithm: str
) -> None:
    registry.put_image("a", "1", [BASE])
    value = json.loads(registry.manifests["a", "1"][0])
    value["layers"][0]["digest"] = f"{algorithm}:" + "0" * 64
    registry.put_manifest("a", "1", value, f"{OCI}.manifest.v1+json")
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(error, ManifestInvalid) and f"bad digest '{algorithm}:" in str(error)


async def test_indexes_nested_too_deep_are_refused_with_the_limit(
    registry: FakeRegistry, store: ImageStore
) -> None:
    digest = registry.put_image("a", "", [BASE])
    for level in range(4):
        digest = registry.put_index("a", f"{level}", [(digest, AMD64)])
    assert (await store.pull(f"{registry.address}/a:2")).chain_ids
    await store.remove(f"{registry.address}/a:2")
    error = await pull_error(store, f"{registry.address}/a:3")
    assert "index depth: 4 is above the limit of 3 (registry.limits.index_depth)" in str(error)
