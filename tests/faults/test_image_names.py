"""Pulls by the less usual names and digests, and of images with very many layers."""

from __future__ import annotations

import hashlib

import pytest

from image.errors import DigestMismatch, ManifestInvalid
from image.image_store import ImageStore
from tests.fakes.registry import FakeRegistry, make_layer
from tests.kit.pulls import BASE, pull_error


async def test_pull_by_tag_and_digest_takes_the_digest(registry: FakeRegistry, store: ImageStore) -> None:
    digest = registry.put_image("a", "1", [BASE])
    registry.put_image("a", "1", [make_layer({"moved": b"on"})])
    image = await store.pull(f"{registry.address}/a:1@{digest}")
    assert image.repo_digests == (f"{registry.address}/a@{digest}",) and image.repo_tags == ()
    await store.close()


async def test_pull_from_a_host_in_upper_case_succeeds(registry: FakeRegistry, store: ImageStore) -> None:
    registry.put_image("a", "1", [BASE])
    port = registry.address.rpartition(":")[2]
    assert (await store.pull(f"LOCALHOST:{port}/a:1")).repo_tags == (f"LOCALHOST:{port}/a:1",)
    await store.close()


async def test_pull_by_sha512_digest_is_verified(registry: FakeRegistry, store: ImageStore) -> None:
    registry.put_image("a", "1", [BASE])
    data, kind = registry.manifests["a", "1"]
    digest = f"sha512:{hashlib.sha512(data).hexdigest()}"
    registry.manifests["a", digest] = data, kind
    image = await store.pull(f"{registry.address}/a@{digest}")
    assert image.repo_digests == (f"{registry.address}/a@{digest}",)
    await store.close()


async def test_pull_by_wrong_sha512_digest_is_rejected(registry: FakeRegistry, store: ImageStore) -> None:
    registry.put_image("a", "1", [BASE])
    digest = "sha512:" + "0" * 128
    registry.manifests["a", digest] = registry.manifests["a", "1"]
    error = await pull_error(store, f"{registry.address}/a@{digest}")
    assert isinstance(error, DigestMismatch)


@pytest.mark.parametrize("count", [127, 500])
async def test_image_of_many_layers_is_pulled(registry: FakeRegistry, store: ImageStore, count: int) -> None:
    registry.put_image("a", "1", [make_layer({f"f{n}": b"x"}) for n in range(count)])
    assert len((await store.pull(f"{registry.address}/a:1")).chain_ids) == count
    await store.close()


async def test_image_of_501_layers_is_rejected(registry: FakeRegistry, store: ImageStore) -> None:
    registry.put_image("a", "1", [BASE] * 501)
    error = await pull_error(store, f"{registry.address}/a:1")
    assert isinstance(
        error, ManifestInvalid
    ) and "layers: 501 is above the limit of 500 (registry.limits.layers)" in str(error)


async def test_layer_with_names_that_are_not_utf8_is_unpacked(
    registry: FakeRegistry, store: ImageStore
) -> None:
    registry.put_image("a", "1", [make_layer({"caf\udce9": b"latin"})])
    image = await store.pull(f"{registry.address}/a:1")
    assert (store.layers.path(image.chain_ids[0]) / "caf\udce9").read_bytes() == b"latin"
    await store.close()
