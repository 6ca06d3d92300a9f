"""What a hostile image or a dripping registry must not hold up: the pulls of others."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from image.image_store import ImageStore
from tests.fakes.registry import Drip, FakeRegistry, make_layer
from tests.kit.eventually import eventually
from tests.kit.pulls import BASE, TOP, leftovers, open_store

SLOW = Drip(1, 0.05)


@pytest.fixture
def honest() -> Iterator[FakeRegistry]:
    with FakeRegistry().serving() as serving:
        yield serving


@pytest.fixture
def hostile() -> Iterator[FakeRegistry]:
    with FakeRegistry().serving() as serving:
        yield serving


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return open_store(tmp_path)


async def cancelled(*pulls: asyncio.Task[object]) -> None:
    """Cancel pulls and wait for their end."""
    for pull in pulls:
        pull.cancel()
    await asyncio.gather(*pulls, return_exceptions=True)


def digest(layer: bytes) -> str:
    """Return a layer's diff id."""
    return f"sha256:{hashlib.sha256(layer).hexdigest()}"


async def test_dripping_image_that_names_anothers_diff_ids_does_not_hold_up_the_honest_one(
    honest: FakeRegistry, hostile: FakeRegistry, store: ImageStore
) -> None:
    honest.put_image("a", "1", [BASE, TOP])
    fake = [make_layer({"evil": b"x"}), make_layer({"evil": b"y"})]
    hostile.put_image("a", "1", fake, diff_ids=[digest(BASE), digest(TOP)])
    first = f"/v2/a/blobs/{hostile.layer_digests('a', '1')[0]}"
    hostile.fail(first, SLOW, times=9)
    pull: asyncio.Task[object] = asyncio.create_task(store.pull(f"{hostile.address}/a:1"))
    await eventually(
        lambda: any("/blobs/" + hostile.layer_digests("a", "1")[0] in p for p in hostile.paths())
    )
    async with asyncio.timeout(10):
        image = await store.pull(f"{honest.address}/a:1")
    assert len(image.chain_ids) == 2 and not pull.done()
    await cancelled(pull)
    await store.close()
    assert leftovers(store) == []


async def test_pulls_of_the_same_layers_from_two_registries_store_them_once(
    honest: FakeRegistry, hostile: FakeRegistry, store: ImageStore
) -> None:
    for registry in (honest, hostile):
        registry.put_image("a", "1", [BASE, TOP])
    images = await asyncio.gather(*(store.pull(f"{r.address}/a:1") for r in (honest, hostile)))
    assert images[0].chain_ids == images[1].chain_ids
    assert len(store.layers.chain_ids()) == 2
    assert store.layers.usage.bytes == sum(
        layer.bytes for chain in images[0].chain_ids if (layer := store.layers.find(chain))
    )
    await store.close()
    assert leftovers(store) == []
