"""Exports: which mounts of a pod's containers share one, and how long it lives, also after failures."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from sandbox.container import Container
from sandbox.errors import GuestError, GuestUnreachable
from sandbox.host import mount_flags, mounts, syscalls
from sandbox.records import VolumePart, VolumeUse
from sandbox.spec import ContainerId, MountSpec, Propagation
from sandbox.store import Unwritten
from sandbox.vm_pods.volumes import find_sources, release_unused
from tests.fakes.exporter import Site, exporting

A, B, C = (letter * 64 for letter in "abc")


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with exporting() as made:
        yield made


@pytest.fixture
def folder(site: Site) -> Iterator[Path]:
    """A volume with a part; what a test mounts there is unmounted."""
    path = site.root / "volume"
    (path / "sub/deep").mkdir(parents=True)
    (path / "file").touch()
    yield path
    mounts.unmount_tree(path)


def of(path: Path, **fields: object) -> MountSpec:
    return msgspec.convert({"container_path": "/x", "host_path": str(path), **fields}, MountSpec)


async def up(site: Site, id: str, *specs: MountSpec) -> Container:
    container = site.container(*specs, id=id)
    await site.step.up(container)
    return container


def places(container: Container) -> list[str]:
    """Where the container's mounts are found: "a0/path" is mount 0 of container A."""
    found = [(use.export, use.path) for use in container.record.volumes]
    return [f"{key[0]}{key.rpartition('-')[2]}/{path}".rstrip("/") for key, path in found]


async def test_tree_of_two_containers_is_exported_once(site: Site, folder: Path) -> None:
    first, second = await up(site, A, of(folder)), await up(site, B, of(folder), of(folder / "sub/deep"))
    assert (places(first), places(second)) == (["a0"], ["a0", "a0/sub/deep"])
    assert site.mounted() == ["a0"]
    assert [source.path for source in find_sources(second)] == [
        f"/run/husk/volumes/{A}-0",
        f"/run/husk/volumes/{A}-0/sub/deep",
    ]
    assert {source.within for source in find_sources(second)} == {f"/run/husk/volumes/{A}-0"}


async def test_part_that_the_host_binds_elsewhere_is_recognised(site: Site, folder: Path) -> None:
    (folder / "a b\\c").mkdir()
    (site.root / "elsewhere").mkdir()
    mounts.bind(folder / "a b\\c", site.root / "elsewhere")
    try:
        await up(site, A, of(folder))
        assert places(await up(site, B, of(site.root / "elsewhere"))) == ["a0/a b\\c"]
    finally:
        mounts.unmount_tree(site.root / "elsewhere")


async def test_file_of_a_volume_is_part_of_it(site: Site, folder: Path) -> None:
    await up(site, A, of(folder))
    assert places(await up(site, B, of(folder / "file"))) == ["a0/file"]
    await site.step.down(site.inventory.container(B))
    alone = await up(site, C, of(folder / "file"), of(folder / "file", readonly=True))
    assert places(alone) == ["a0/file", "a0/file"]


async def test_file_alone_is_exported_once_and_not_mounted_in_the_guest(site: Site, folder: Path) -> None:
    await up(site, A, of(folder / "file"))
    assert places(await up(site, B, of(folder / "file"))) == ["a0"]
    assert site.guest.mounted == {}


async def test_export_lives_as_long_as_its_last_container(site: Site, folder: Path) -> None:
    first, second = await up(site, A, of(folder)), await up(site, B, of(folder))
    await site.step.down(first)
    assert (site.mounted(), list(site.guest.mounted)) == (["a0"], [f"{A}-0"])
    site.inventory.forget_container(first)
    third = await up(site, C, of(folder))
    assert places(third) == ["a0"]
    for container in (second, third, second):
        await site.step.down(container)
    assert (site.mounted(), site.guest.mounted) == ([], {})
    assert (folder / "sub/deep").is_dir()


async def test_exports_are_counted_by_records_after_a_restart(site: Site, folder: Path) -> None:
    await up(site, A, of(folder))
    await up(site, B, of(folder))
    first, second = sorted(site.restart(), key=lambda container: container.id)
    await site.step.down(first)
    assert site.mounted() == ["a0"]
    assert places(await up(site, C, of(folder / "sub"))) == ["a0/sub"]
    for container in (second, site.inventory.container(C)):
        await site.step.down(container)
    assert site.mounted() == []


# ----------------------------------------------------------------------------- whole and part


async def test_part_exported_before_the_whole_is_mounted_over_its_place(site: Site, folder: Path) -> None:
    deep = await up(site, A, of(folder / "sub/deep"))
    part, whole = await up(site, B, of(folder / "sub")), await up(site, C, of(folder))
    parts = [VolumePart(path="sub", export=f"{B}-0"), VolumePart(path="sub/deep", export=f"{A}-0")]
    assert list(whole.record.volumes[0].parts) == parts
    assert [(each.path, Path(each.source).name) for each in site.guest.mounted[f"{C}-0"].parts] == [
        (each.path, each.export) for each in parts
    ]
    assert find_sources(whole)[0].parts == ("sub", "sub/deep")
    for container in (deep, part):
        await site.step.down(container)
        site.inventory.forget_container(container)
    assert site.mounted() == ["a0", "b0", "c0"]  # for as long as the whole has them
    await site.step.down(whole)
    assert site.mounted() == []


async def test_whole_and_part_of_one_container_are_one_export(site: Site, folder: Path) -> None:
    assert places(await up(site, A, of(folder / "sub"), of(folder))) == ["a1/sub", "a1"]
    assert site.mounted() == ["a1"]
    assert list(site.pod.back_of(site.pod.volumes_share).glob("a*-0")) == []


async def test_part_that_a_mount_covers_is_exported_by_itself(site: Site, folder: Path) -> None:
    (site.root / "elsewhere").mkdir()
    mounts.bind(folder / "sub", site.root / "elsewhere")
    syscalls.mount("cover", folder / "sub", "tmpfs")
    try:
        await up(site, A, of(folder))
        other = await up(site, B, of(site.root / "elsewhere"), of(folder / "sub"))
        assert places(other) == ["b0", "a0/sub"]
    finally:
        mounts.unmount_tree(site.root / "elsewhere")


async def test_other_directory_of_the_same_path_is_another_tree(site: Site, folder: Path) -> None:
    await up(site, A, of(folder / "sub/deep"))
    (folder / "sub/deep").rename(folder / "moved")
    (folder / "sub/deep").mkdir()
    assert places(await up(site, B, of(folder / "sub/deep"))) == ["b0"]
    assert places(await up(site, C, of(folder / "moved"))) == ["a0"]


# ----------------------------------------------------------------------------- what must differ


def is_readonly(site: Site, point: str) -> bool:
    return "ro" in site.options()[point].split(",")


async def test_export_is_read_only_until_a_mount_is_writable(site: Site, folder: Path) -> None:
    first = await up(site, A, of(folder, readonly=True))
    await up(site, B, of(folder, readonly=True))
    assert is_readonly(site, f"/{A}-0")
    third = await up(site, C, of(folder / "sub"))
    assert not is_readonly(site, f"/{A}-0")
    for container in (first, third):
        await site.step.down(container)
    assert not is_readonly(site, f"/{A}-0"), "it is in use"


@pytest.mark.parametrize("recursive", [True, False])
async def test_mount_beneath_becomes_writable_where_that_is_asked_for(
    site: Site, folder: Path, recursive: bool
) -> None:
    for name, flags in (("sub", 0), ("locked", mount_flags.MS_RDONLY)):
        (folder / name).mkdir(exist_ok=True)
        syscalls.mount("beneath", folder / name, "tmpfs")
        if flags:
            mounts.make_readonly(folder / name)
    await up(site, A, of(folder, readonly=True, recursive_readonly=True))
    assert all(is_readonly(site, f"/{A}-0{place}") for place in ("", "/sub", "/locked"))
    await up(site, B, of(folder, readonly=True, recursive_readonly=recursive))
    assert [is_readonly(site, f"/{A}-0{place}") for place in ("", "/sub", "/locked")] == [
        True,
        recursive,
        True,
    ]
    await up(site, C, of(folder))
    assert [is_readonly(site, f"/{A}-0{place}") for place in ("", "/sub", "/locked")] == [False, False, True]


async def test_part_of_a_read_only_whole_becomes_writable_with_it(site: Site, folder: Path) -> None:
    await up(site, A, of(folder / "sub", readonly=True))
    await up(site, B, of(folder, readonly=True))
    assert is_readonly(site, f"/{A}-0")
    await up(site, C, of(folder))
    assert not is_readonly(site, f"/{A}-0")
    assert not is_readonly(site, f"/{B}-0")


async def test_mount_that_the_host_has_read_only_is_never_made_writable(site: Site, folder: Path) -> None:
    (site.root / "elsewhere").mkdir()
    mounts.bind(folder, site.root / "elsewhere")
    mounts.make_readonly(site.root / "elsewhere")
    try:
        await up(site, A, of(site.root / "elsewhere"))
        assert places(await up(site, B, of(folder))) == ["b0"]
        assert places(await up(site, C, of(site.root / "elsewhere/sub"))) == ["a0/sub"]
        assert is_readonly(site, f"/{A}-0")
    finally:
        mounts.unmount_tree(site.root / "elsewhere")


async def test_mount_that_receives_later_mounts_has_a_separate_export(site: Site, folder: Path) -> None:
    await up(site, A, of(folder))
    slave, both = Propagation.HOST_TO_CONTAINER, Propagation.BIDIRECTIONAL
    second = await up(site, B, of(folder, propagation=slave), of(folder / "sub", propagation=both))
    assert places(second) == ["b0", "b0/sub"]


# ----------------------------------------------------------------------------- failures and crashes


async def test_export_that_the_guest_cannot_mount_is_released(site: Site, folder: Path) -> None:
    first = await up(site, A, of(folder / "sub"))
    site.guest.fault = GuestError("export", errno.EIO, "Input/output error")
    container = site.container(of(folder), of(folder / "sub"), id=B)
    with pytest.raises(GuestError):
        await site.step.up(container)
    assert site.mounted() == ["a0", "b0"]
    await site.step.down(container)
    assert site.mounted() == ["a0"]
    await site.step.down(first)
    assert site.mounted() == []


async def test_older_agent_that_knows_no_exports_is_no_failure(site: Site, folder: Path) -> None:
    site.guest.fault = GuestError("request", errno.EOPNOTSUPP, "body 18 is unknown to this agent")
    container = await up(site, A, of(folder))
    await site.step.down(container)
    assert site.mounted() == []


async def test_unreachable_guest_keeps_nothing_from_being_released(site: Site, folder: Path) -> None:
    container = await up(site, A, of(folder))
    site.guest.fault = GuestUnreachable("no connection to its agent")
    await site.step.down(container)
    assert site.mounted() == []
    site.guest.fault = None
    await release_unused(site.inventory, site.pod)
    assert site.guest.mounted == {}


@pytest.mark.parametrize("made", [False, True])
async def test_export_of_a_creation_that_was_cut_short_is_released_by_its_record(
    site: Site, folder: Path, made: bool
) -> None:
    first = await up(site, A, of(folder / "sub"))
    container = site.container(of(folder), id=B)
    container.update(volumes=(VolumeUse(mount=0, export=f"{B}-0"),))  # the intent
    if made:
        (site.pod.back_of(site.pod.volumes_share) / f"{B}-0").mkdir()
    (_, again) = sorted(site.restart(), key=lambda each: each.id)
    for _ in range(2):
        await site.step.down(again)
    assert site.mounted() == ["a0"]
    assert [each.name for each in site.pod.back_of(site.pod.volumes_share).glob(f"{B}*")] == []
    await site.step.down(first)


async def test_quarantined_container_keeps_all_exports(site: Site, folder: Path) -> None:
    first = await up(site, A, of(folder))
    await up(site, B, of(folder))
    site.inventory.containers.pop(site.inventory.container(B).id)
    record = msgspec.structs.replace(first.record, id=ContainerId(B), volumes=())
    store = Unwritten(site.inventory.container_store)
    site.inventory.add_container(site.inventory.make_container(record, site.pod, store))
    await site.step.down(first)
    assert (site.mounted(), list(site.guest.mounted)) == (["a0"], [f"{A}-0"])
