"""The step that mounts a container's volumes: failures half-way, repeated undo, and undo after a crash.

A process with a mount namespace takes the place of virtiofsd.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sandbox.errors import InvalidSpec, VmmGone
from sandbox.host import mounts, syscalls
from sandbox.host.ids import IdRange
from sandbox.host.mounts import mounts_below
from sandbox.records import ImageVolume
from sandbox.spec import MountSpec, UserNamespace
from sandbox.vm_pods.volumes import find_sources
from tests.fakes.exporter import ID, Site, exporting
from tests.fakes.host import Broken


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with exporting() as made:
        yield made


async def test_volumes_are_mounted_in_the_exporters_namespace_alone(site: Site) -> None:
    (site.root / "single").write_text("a file")
    single = MountSpec(container_path="/y", host_path=str(site.root / "single"))
    container = site.container(site.volume(), single)
    before = mounts_below(site.root)
    await site.step.up(container)
    assert site.mounted() == ["c0", "c1"]
    assert mounts_below(site.root) == before
    assert [source.is_directory for source in find_sources(container)] == [True, False]
    await site.step.down(container)
    assert site.mounted() == []


async def test_missing_second_volume_undoes_the_first(site: Site) -> None:
    gone = MountSpec(container_path="/y", host_path=str(site.root / "gone"))
    container = site.container(site.volume(), gone)
    with pytest.raises(InvalidSpec, match="does not exist"):
        await site.step.up(container)
    await site.step.down(container)
    assert (site.mounted(), (site.root / "volume").is_dir()) == ([], True)


async def test_down_is_idempotent_also_without_up(site: Site) -> None:
    container = site.container(site.volume())
    await site.step.down(container)
    await site.step.up(container)
    (site.root / "volume/kept").write_text("of the host")
    for _ in range(2):
        await site.step.down(container)
    assert (site.root / "volume/kept").read_text() == "of the host"


async def test_down_after_restart_needs_the_record_alone(site: Site) -> None:
    await site.step.up(site.container(site.volume()))
    (container,) = site.restart()
    await site.step.down(container)
    assert site.mounted() == []


async def test_down_after_the_exporters_end_succeeds(site: Site) -> None:
    container = site.container(site.volume())
    await site.step.up(container)
    site.exporter.kill()
    site.exporter.wait()
    await site.step.down(container)
    assert list(site.pod.back_of(site.pod.volumes_share).iterdir()) == [
        site.pod.back_of(site.pod.volumes_share) / "old"
    ]
    with pytest.raises(VmmGone):
        await site.step.up(container)
    await site.step.down(container)


async def test_image_that_cannot_be_mounted_leaves_no_mounts(site: Site) -> None:
    images = tuple(ImageVolume(mount=n, image_id="i", chain_ids=()) for n in (0, 1))
    specs = [MountSpec(container_path=f"/{n}", host_path="", image="i", readonly=True) for n in (0, 1)]
    container = site.container(*specs, images=images)
    site.ledger.faults["rootfs.up"] = "after"
    with pytest.raises(Broken):
        await site.step.up(container)
    await site.step.down(container)
    assert site.ledger.held == set()
    assert not (site.pod.run_dir / "images" / ID).exists()


@pytest.fixture
def huge(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "huge"
    path.mkdir()
    syscalls.mount("huge", path, "hugetlbfs", 0, "pagesize=2M,mode=1750,uid=7,gid=8")
    yield path
    mounts.unmount_tree(path)


async def test_huge_page_volume_is_requested_of_the_guest_and_not_attached(site: Site, huge: Path) -> None:
    """A hugetlbfs of the host cannot be exported: its files are only mapped."""
    spec = MountSpec(container_path="/huge", host_path=str(huge))
    container = site.container(spec, site.volume())
    (directory,) = await site.step._attach(container)
    assert (directory.mode, directory.uid, directory.gid) == (0o1750, 7, 8)
    sources = find_sources(container)
    assert sources[0].path == f"/run/husk/huge/{directory.name}"
    assert sources[1].path.endswith(f"{ID}-1")
    assert [path.name for path in site.pod.back_of(site.pod.volumes_share).glob("c*")] == [f"{ID}-1"]
    assert site.container(spec).record.spec.mounts[0] == spec
    await site.step.down(container)


@pytest.mark.parametrize("problem", ["is a file on huge pages", "are not shifted"])
async def test_unusable_huge_page_volume_is_rejected(site: Site, huge: Path, problem: str) -> None:
    (huge / "file").touch()
    ids = UserNamespace(uids=(IdRange(inside=0, outside=1000, length=10),), gids=())
    spec = MountSpec(container_path="/huge", host_path=str(huge), ids=ids)
    if "file" in problem:
        spec = MountSpec(container_path="/huge", host_path=str(huge / "file"))
    container = site.container(spec)
    with pytest.raises(InvalidSpec, match=problem):
        await site.step.up(container)
    await site.step.down(container)
