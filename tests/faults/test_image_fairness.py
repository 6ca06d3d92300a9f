"""What a hostile image or a dripping registry must not hold up: the pulls of others."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from image.errors import ImageError, RegistryUnavailable
from image.image_store import ImageStore
from sandbox.host.limiter import FairLimiter
from tests.fakes.registry import Drip, FakeRegistry, StallAfter, make_layer
from tests.kit.eventually import eventually
from tests.kit.pulls import BASE, QUICK, TOP, leftovers, open_store, pull_error

SLOW = Drip(1, 0.05)
STEADY = Drip(100, 0.02)  # some 5,000 bytes per second


@pytest.fixture
def honest() -> Iterator[FakeRegistry]:
    with FakeRegistry().serving() as serving:
        yield serving


@pytest.fixture
def hostile() -> Iterator[FakeRegistry]:
    with FakeRegistry().serving() as serving:
        yield serving


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
    for each in hostile.layer_digests("a", "1"):
        hostile.fail(f"/v2/a/blobs/{each}", SLOW, times=9)
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


async def test_four_dripping_layers_of_one_registry_do_not_hold_up_another_registry(
    honest: FakeRegistry, hostile: FakeRegistry, store: ImageStore
) -> None:
    honest.put_image("a", "1", [BASE, TOP])
    hostile.put_image("a", "1", [make_layer({"f": os.urandom(5000)}) for _ in range(6)])
    for blob in hostile.layer_digests("a", "1"):
        hostile.fail(blob, SLOW, times=9)
    downloads = store.limiters()[0]
    pull: asyncio.Task[object] = asyncio.create_task(store.pull(f"{hostile.address}/a:1"))
    await eventually(lambda: downloads.active == downloads.limit and downloads.waiting == 2)
    async with asyncio.timeout(10):
        await store.pull(f"{honest.address}/a:1")
    assert not pull.done()
    await cancelled(pull)
    await store.close()
    assert downloads.active == downloads.waiting == 0


async def test_manifests_that_drip_do_not_hold_up_the_same_registry(
    hostile: FakeRegistry, tmp_path: Path
) -> None:
    """No pull waits for another's documents: they are on the disk while they arrive."""
    store = open_store(tmp_path, timing=msgspec.structs.replace(QUICK, answer_s=60.0, stall_s=60.0))
    for n in range(20):
        hostile.put_image("slow", str(n), [TOP])
    hostile.put_image("a", "1", [TOP])
    hostile.fail("slow/manifests", SLOW, times=99)
    pulls: list[asyncio.Task[object]] = [
        asyncio.create_task(store.pull(f"{hostile.address}/slow:{n}")) for n in range(20)
    ]
    await eventually(lambda: sum("slow/manifests" in each.path for each in hostile.seen) == 20)
    async with asyncio.timeout(10):
        await store.pull(f"{hostile.address}/a:1")
    assert not any(pull.done() for pull in pulls)
    for pull in pulls:
        await cancelled(pull)
    await store.close()
    assert leftovers(store) == []


async def test_layer_below_the_rate_after_10_s_is_retried_and_then_fails(
    hostile: FakeRegistry, tmp_path: Path
) -> None:
    timing = msgspec.structs.replace(QUICK, slow_s=0.2, slow_rate=1024, low_s=60.0)
    hostile.put_image("a", "1", [TOP])
    hostile.fail("/blobs/" + hostile.layer_digests("a", "1")[0], SLOW, times=99)
    async with asyncio.timeout(10):
        error = await pull_error(open_store(tmp_path, timing=timing), f"{hostile.address}/a:1")
    assert isinstance(error, RegistryUnavailable) and error.attempts == QUICK.attempts
    assert "the limit is 1024 bytes/s" in str(error)


async def test_layer_below_the_rate_after_a_minute_fails_without_retry(
    hostile: FakeRegistry, tmp_path: Path
) -> None:
    timing = msgspec.structs.replace(QUICK, slow_s=0.2, slow_rate=1024, low_s=0.5, low_rate=64 << 10)
    hostile.put_image("a", "1", [TOP])
    blob = hostile.layer_digests("a", "1")[0]
    hostile.fail(blob, STEADY, times=99)
    error = await pull_error(open_store(tmp_path, timing=timing), f"{hostile.address}/a:1")
    assert isinstance(error, RegistryUnavailable) and "the limit is 65536 bytes/s" in str(error)
    assert sum(path.endswith(blob) for path in hostile.paths()) == 1


async def test_layer_that_drips_below_the_rate_and_breaks_each_time_fails(
    hostile: FakeRegistry, tmp_path: Path
) -> None:
    timing = msgspec.structs.replace(QUICK, low_s=0.5, low_rate=64 << 10)
    hostile.put_image("a", "1", [TOP])
    hostile.fail(hostile.layer_digests("a", "1")[0], StallAfter(2000), times=999)
    async with asyncio.timeout(10):
        error = await pull_error(open_store(tmp_path, timing=timing), f"{hostile.address}/a:1")
    assert isinstance(error, RegistryUnavailable)


async def test_layer_fails_at_the_deadline_of_a_blob(hostile: FakeRegistry, tmp_path: Path) -> None:
    timing = msgspec.structs.replace(QUICK, blob_s=0.5)
    hostile.put_image("a", "1", [TOP])
    hostile.fail(hostile.layer_digests("a", "1")[0], STEADY, times=99)
    error: ImageError = await pull_error(open_store(tmp_path, timing=timing), f"{hostile.address}/a:1")
    assert isinstance(error, RegistryUnavailable) and "in 0.5 s, the limit of a blob" in str(error)


async def test_same_layer_that_drips_for_one_repository_does_not_hold_up_another(
    hostile: FakeRegistry, tmp_path: Path
) -> None:
    """Equal layers of one registry are downloaded once, but waited for only so long."""
    store = open_store(tmp_path, timing=msgspec.structs.replace(QUICK, share_s=0.3))
    for repository in ("evil", "good"):
        hostile.put_image(repository, "1", [TOP])
    hostile.fail("/v2/evil/blobs/" + hostile.layer_digests("evil", "1")[0], SLOW, times=9)
    pull: asyncio.Task[object] = asyncio.create_task(store.pull(f"{hostile.address}/evil:1"))
    await eventually(
        lambda: any("/evil/blobs/" + hostile.layer_digests("evil", "1")[0] in p for p in hostile.paths())
    )
    async with asyncio.timeout(10):
        assert (await store.pull(f"{hostile.address}/good:1")).chain_ids
    assert not pull.done()
    await cancelled(pull)
    await store.close()
    assert leftovers(store) == []


async def test_places_for_unpacking_are_shared_among_registries(store: ImageStore) -> None:
    unpacks = store.puller.limiters[1]
    assert isinstance(unpacks, FairLimiter)
    async with unpacks.share("hostile", "a"), unpacks.share("hostile", "b"):
        assert unpacks.active == unpacks.limit
        async with asyncio.timeout(5), unpacks.share("honest", "c"):
            assert unpacks.active == unpacks.limit + 1
    await store.close()
