"""Large layers, fetched in parts over several connections: slow, broken and lying servers."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from image.errors import DigestMismatch, DiskFull, RegistryUnavailable
from image.registry import endpoint, parts
from tests.fakes.disk import small_disk
from tests.fakes.registry import Corrupt, Drip, FakeRegistry, Fault, Hang, Status, Truncate, make_layer
from tests.kit.eventually import eventually
from tests.kit.pulls import QUICK, leftovers, open_store, pull_error, write_hosts

PART = 100_000
LAYER = make_layer({"big": os.urandom(10 * PART - 12_345)})


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry().serving() as serving:
        serving.put_image("a", "1", [LAYER], compression="plain")
        yield serving


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", PART)
    monkeypatch.setattr(endpoint, "PARALLEL_BYTES", 2 * PART)


def ranges(registry: FakeRegistry) -> list[tuple[int, int]]:
    """Return the ranges that were asked for, in bytes, without -1 for an open end."""
    found = [re.fullmatch(r"bytes=(\d+)-(\d*)", seen.headers.get("range", "")) for seen in registry.seen]
    return [(int(each[1]), int(each[2] or -1)) for each in found if each]


async def test_large_layer_comes_in_parts_over_several_connections(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    digest = registry.layer_digests("a", "1")[0]
    registry.fail(digest, Hang())  # the first part is asked for again
    store = open_store(tmp_path, timing=msgspec.structs.replace(QUICK, stall_s=1.0))
    await store.pull(f"{registry.address}/a:1")
    await store.close()
    asked = ranges(registry)
    starts = {begin for begin, _ in asked}
    assert starts >= set(range(0, len(LAYER), PART))
    assert all(end - begin < PART for begin, end in asked)


async def test_parts_are_fetched_beside_each_other(registry: FakeRegistry, tmp_path: Path) -> None:
    digest = registry.layer_digests("a", "1")[0]
    store = open_store(tmp_path)
    registry.fail(digest, Drip(PART // 4, 0.2), times=4)
    pull = asyncio.create_task(store.pull(f"{registry.address}/a:1"))
    # the next part is asked for when the first is not there yet
    await eventually(lambda: len(ranges(registry)) >= QUICK.connections)
    assert not pull.done()
    await pull
    await store.close()


@pytest.mark.parametrize("fault", [Truncate(30_000), Status(503), Drip(1, 0.01)], ids=["cut", "503", "drips"])
@pytest.mark.parametrize("part", [0, 3, 9])
async def test_part_that_fails_is_continued_where_it_ended(
    registry: FakeRegistry, tmp_path: Path, fault: Fault, part: int
) -> None:
    digest = registry.layer_digests("a", "1")[0]
    timing = msgspec.structs.replace(QUICK, slow_s=0.2, slow_rate=1000)
    store = open_store(tmp_path, timing=timing)
    registry.fail_part(digest, part * PART, fault)
    image = await store.pull(f"{registry.address}/a:1")
    await store.close()
    assert leftovers(store) == []
    assert image.id == registry.config_id("a", "1")
    if isinstance(fault, Truncate):
        assert part * PART + fault.size in {begin for begin, _ in ranges(registry)}


@pytest.mark.parametrize("kind", ["no ranges", "to the end", "one connection"])
async def test_server_without_parts_is_asked_for_the_whole(
    registry: FakeRegistry, tmp_path: Path, kind: str
) -> None:
    registry.ranges = kind != "no ranges"
    registry.ranges_to_the_end = kind == "to the end"
    timing = msgspec.structs.replace(QUICK, connections=1 if kind == "one connection" else 4)
    store = open_store(tmp_path, timing=timing)
    await store.pull(f"{registry.address}/a:1")
    await store.close()
    asked = ranges(registry)
    assert len(asked) == {"no ranges": 1, "one connection": 0}.get(kind, -(-len(LAYER) // PART))


async def test_ranges_that_are_refused_half_way_are_not_needed(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    digest = registry.layer_digests("a", "1")[0]
    store = open_store(tmp_path)
    registry.fail_part(digest, 4 * PART, Status(200, body=b"nothing of the kind"))
    await store.pull(f"{registry.address}/a:1")
    await store.close()
    # what was left came in one, from the beginning if no part was complete
    last = [seen.headers.get("range", "bytes=0-") for seen in registry.seen if seen.path.endswith(digest)][-1]
    assert last.endswith("-")


async def test_mirror_that_ends_in_the_middle_is_continued_by_the_registry(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    with FakeRegistry(blobs=registry.blobs, manifests=registry.manifests).serving() as mirror:
        hosts = write_hosts(
            tmp_path, "a.test", f'server = "http://{registry.address}"\n[host."http://{mirror.address}"]\n'
        )
        mirror.fail_part(registry.layer_digests("a", "1")[0], 5 * PART, Status(500), times=99)
        store = open_store(tmp_path, config_path=hosts)
        await store.pull("a.test/a:1")
        await store.close()
    starts = [begin for begin, _ in ranges(registry)]
    assert min(starts) > 0  # the beginning was not fetched again


@pytest.mark.parametrize("part", [0, 5])
async def test_part_with_other_bytes_fails_the_layer(
    registry: FakeRegistry, tmp_path: Path, part: int
) -> None:
    registry.fail_part(registry.layer_digests("a", "1")[0], part * PART, Corrupt())
    error = await pull_error(open_store(tmp_path), f"{registry.address}/a:1")
    assert isinstance(error, DigestMismatch)


async def test_part_that_never_comes_fails_the_layer(registry: FakeRegistry, tmp_path: Path) -> None:
    registry.fail_part(registry.layer_digests("a", "1")[0], 5 * PART, Status(500), times=99)
    error = await pull_error(open_store(tmp_path), f"{registry.address}/a:1")
    assert isinstance(error, RegistryUnavailable)


async def test_full_disk_under_a_part_fails_the_layer(registry: FakeRegistry, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 600_000) as disk:
        assert isinstance(await pull_error(open_store(disk), f"{registry.address}/a:1"), DiskFull)


async def test_pull_that_is_cancelled_among_parts_leaves_nothing(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    digest = registry.layer_digests("a", "1")[0]
    registry.fail_part(digest, 3 * PART, Hang())
    store = open_store(tmp_path, timing=msgspec.structs.replace(QUICK, stall_s=30))
    pull = asyncio.create_task(store.pull(f"{registry.address}/a:1"))
    await eventually(lambda: 3 * PART in {begin for begin, _ in ranges(registry)})
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    await store.close()
    assert leftovers(store) == []
