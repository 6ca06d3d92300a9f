"""Pulls that reach the floor of free space: refused with the place and what is missing; nothing is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cri.errors import failure_of
from image.errors import DiskFull
from tests.fakes.disk import small_disk
from tests.fakes.registry import FakeRegistry, make_layer
from tests.kit.pulls import BASE, TOP, open_store, pull_error

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 8 * MIB) as point:
        yield point


async def test_pull_that_would_leave_less_than_the_floor_is_refused_before_the_download(
    registry: FakeRegistry, disk: Path
) -> None:
    registry.put_image("a", "1", [TOP])
    error = await pull_error(open_store(disk, min_free_bytes=8 * MIB - 100_000), f"{registry.address}/a:1")
    assert isinstance(error, DiskFull)
    failure = failure_of(error)
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(disk) in failure.message and "are missing" in failure.message
    assert not any(path.endswith(registry.layer_digests("a", "1")[0]) for path in registry.paths())


async def test_layer_that_unpacks_below_the_floor_is_refused_and_leaves_nothing(
    registry: FakeRegistry, disk: Path
) -> None:
    registry.put_image("a", "1", [make_layer({"big": bytes(6 * MIB)})])
    error = await pull_error(open_store(disk, min_free_bytes=4 * MIB), f"{registry.address}/a:1")
    assert isinstance(error, DiskFull) and error.what == "unpacking a layer"
    assert f"{4 * MIB} must stay free" in str(error)


async def test_pull_above_the_floor_succeeds(registry: FakeRegistry, disk: Path) -> None:
    registry.put_image("a", "1", [BASE, TOP])
    store = open_store(disk, min_free_bytes=4 * MIB)
    assert (await store.pull(f"{registry.address}/a:1")).size > 0
    await store.close()


async def test_error_on_a_full_disk_says_what_is_free(registry: FakeRegistry, tmp_path: Path) -> None:
    with small_disk(tmp_path / "few", MIB, inodes=30) as disk:
        registry.put_image("a", "1", [make_layer({f"f{n}": b"" for n in range(40)})])
        error = await pull_error(open_store(disk), f"{registry.address}/a:1")
    assert isinstance(error, DiskFull) and " inodes are free" in str(error)
