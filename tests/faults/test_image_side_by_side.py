"""Layers that are unpacked before those below them: when that is possible, and what a failure leaves."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from image.blobs import Progress
from image.errors import RegistryUnavailable
from image.image_store import ImageStore
from tests.fakes.registry import FakeRegistry, Hang, Status, make_layer
from tests.kit.eventually import eventually
from tests.kit.layers import archive, file, folder, hard
from tests.kit.pulls import leftovers

BELOW = make_layer({"etc": None, "etc/os": b"below"})


def hold_first_layer(registry: FakeRegistry, upper: bytes) -> list[str]:
    """Make an image of BELOW and `upper`; the first layer does not come yet. Returns the layers' digests."""
    registry.put_image("a", "1", [BELOW, upper], compression="plain")
    digests = registry.layer_digests("a", "1")
    registry.fail(digests[0], Hang())  # until the request is sent again
    return digests


def is_unpacked(seen: list[Progress], digest: str) -> bool:
    return any(p.item == digest and p.step == "unpack" and p.current == p.total for p in seen)


async def test_layer_is_unpacked_while_one_below_is_downloaded(
    registry: FakeRegistry, store: ImageStore
) -> None:
    upper = make_layer({"etc": None, "etc/.wh.os": b"", "usr": None, "usr/app": b"upper"})
    below, above = hold_first_layer(registry, upper)
    seen: list[Progress] = []
    pull = asyncio.create_task(store.pull(f"{registry.address}/a:1", on_progress=seen.append))
    await eventually(lambda: is_unpacked(seen, above))
    assert not is_unpacked(seen, below)
    assert store.list() == ()
    image = await pull
    top = store.layers.path(image.chain_ids[1])
    assert (top / "usr/app").read_bytes() == b"upper"
    assert (top / "etc/os").is_char_device()
    await store.close()
    assert leftovers(store) == []


@pytest.mark.parametrize("needs", ["a hard link to a file below", "the directory of a file"])
async def test_layer_that_needs_those_below_waits_for_them(
    registry: FakeRegistry, store: ImageStore, needs: str
) -> None:
    directory = folder("etc", mode=0o711)
    upper = archive(directory, hard("etc/twin", "etc/os")) if "link" in needs else archive(file("etc/new"))
    below, above = hold_first_layer(registry, upper)
    seen: list[Progress] = []
    image = await store.pull(f"{registry.address}/a:1", on_progress=seen.append)
    done = [p.item for p in seen if p.step == "unpack" and p.current == p.total]
    assert done == [below, above]
    top = store.layers.path(image.chain_ids[1])
    if "link" in needs:
        assert (top / "etc/twin").read_bytes() == b"below"
    else:
        assert (top / "etc").stat().st_mode == (store.layers.path(image.chain_ids[0]) / "etc").stat().st_mode
    await store.close()
    assert leftovers(store) == []


async def test_pull_under_way_is_listed_with_its_layers(
    registry: FakeRegistry, store: ImageStore, tmp_path: Path
) -> None:
    _, above = hold_first_layer(registry, make_layer({"usr": None}))
    name = f"{registry.address}/a:1"
    seen: list[Progress] = []
    pull = asyncio.create_task(store.pull(name, on_progress=seen.append))
    await eventually(lambda: is_unpacked(seen, above))
    (transfer,) = store.transfers()
    assert (transfer.name, transfer.stored, transfer.layers) == (name, 1, 2)
    assert 0 < transfer.bytes_received < transfer.bytes_total
    await pull
    assert store.transfers() == ()
    await store.close()


async def test_layer_above_one_that_never_comes_is_collected(
    registry: FakeRegistry, store: ImageStore
) -> None:
    registry.put_image("a", "1", [BELOW, make_layer({"usr": None})], compression="plain")
    registry.fail(registry.layer_digests("a", "1")[0], Status(500), times=99)
    with pytest.raises(RegistryUnavailable):
        await store.pull(f"{registry.address}/a:1")
    await store.collect()
    assert not store.layers.chain_ids()
    registry.forget_faults()
    image = await store.pull(f"{registry.address}/a:1")
    assert len(image.chain_ids) == 2
    await store.close()


async def test_five_layers_of_which_the_middle_one_needs_others_are_as_in_order(
    registry: FakeRegistry, store: ImageStore
) -> None:
    layers = [
        BELOW,
        archive(folder("etc"), file("etc/os", b"second")),
        archive(folder("etc"), hard("etc/twin", "etc/os")),
        archive(folder("etc"), file("etc/last", b"x")),
        archive(file("opt/deep/f")),
    ]
    registry.put_image("a", "1", layers, compression="plain")
    for digest in registry.layer_digests("a", "1")[:2]:
        registry.fail(digest, Hang())
    image = await store.pull(f"{registry.address}/a:1")
    assert (store.layers.path(image.chain_ids[2]) / "etc/twin").read_bytes() == b"second"
    assert (store.layers.path(image.chain_ids[4]) / "opt/deep/f").exists()
    await store.close()
    assert leftovers(store) == []
