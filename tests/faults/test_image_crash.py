"""The image store after kill -9 and on full disks, at whatever point these come."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from image.errors import DiskFull
from image.image_store import ImageStore
from tests.fakes.disk import small_disk
from tests.fakes.registry import FakeRegistry, make_layer
from tests.kit.eventually import eventually_sync
from tests.kit.pulls import BASE, leftovers, open_store

KIB = 1 << 10
FILES = 400
WIDE = make_layer({f"d{n // 50}/f{n}": b"x" * 100 for n in range(FILES)})
WORK = """
import asyncio, sys
from pathlib import Path
from tests.kit.pulls import open_store

async def work():
    store = open_store(Path(sys.argv[1]))
    print("loaded", flush=True)
    while True:
        await store.pull(sys.argv[2])
        await store.remove(sys.argv[2])

asyncio.run(work())
"""


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry().serving() as serving:
        serving.put_image("a", "1", [BASE, WIDE])
        yield serving


def entries(root: Path) -> int:
    """Return how much lies in the store."""
    return sum(1 for _ in root.rglob("*"))


def is_whole(store: ImageStore) -> bool:
    """Return whether every image has all the files of its layers."""
    for image in store.list():
        found = [len(list(store.layers.path(chain).rglob("f[0-9]*"))) for chain in image.chain_ids]
        if found != [0, FILES]:
            return False
    return True


def work_and_be_killed(registry: FakeRegistry, root: Path, ref: str, delay_s: float) -> None:
    """Run WORK, and kill it so long after its first request for a blob."""
    command = [sys.executable, "-c", WORK, str(root), ref]
    with subprocess.Popen(
        command, cwd=Path(__file__).resolve().parents[2], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"loaded\n"
        eventually_sync(lambda: len(registry.seen) > 2)
        time.sleep(delay_s)  # the point of the crash is what is under test
        process.kill()


@pytest.mark.parametrize("delay_ms", [0, 5, 10, 20, 40, 80, 120, 160])
async def test_store_is_whole_after_kill_while_pulling_and_removing(
    registry: FakeRegistry, tmp_path: Path, delay_ms: int
) -> None:
    """Unpacking and deleting take turns; the kill hits one of them."""
    ref = f"{registry.address}/a:1"
    work_and_be_killed(registry, tmp_path, ref, delay_ms / 1000)
    store = open_store(tmp_path)
    assert is_whole(store) and leftovers(store) == []
    assert (await store.pull(ref)).chain_ids and is_whole(store)
    await store.remove(ref)
    await store.close()
    assert store.layers.chain_ids() == () and leftovers(store) == []


async def test_pull_on_a_disk_that_fills_at_any_point_leaves_nothing(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    """From a disk on which not even a directory can be made to one that is large enough."""
    with small_disk(tmp_path / "disk", 4096 * KIB) as disk:
        store = open_store(disk)
        ref, pulled, refused = f"{registry.address}/a:1", 0, set()
        for free in (0, 4, 8, 12, 20, 40, 80, 160, 400, 800, 1200, 1600, 1700, 1760, 1800, 2400):
            leave_free(disk, free * KIB)
            before = entries(disk)
            try:
                await store.pull(ref)
            except DiskFull as error:
                refused.add(error.what)
                assert str(disk) in str(error) and "bytes and" in str(error)
                await store.collect()
                assert store.list() == () and leftovers(store) == []
                assert store.layers.chain_ids() == () and entries(disk) == before
            else:
                pulled += 1
                assert is_whole(store)
                await store.remove(ref)
            (disk / "ballast").unlink()
        await store.close()
    assert pulled and {"downloading", "unpacking a layer"} <= refused


def leave_free(disk: Path, free: int) -> None:
    """Fill the disk up to so many bytes."""
    found = os.statvfs(disk)
    with (disk / "ballast").open("wb") as file:
        file.write(bytes(found.f_bavail * found.f_frsize - free))
