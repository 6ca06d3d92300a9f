"""Files of the host's kernel are exported by a share that the guest caches nothing of, where its VM can add
one; after failures and kills too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from sandbox.container import Container
from sandbox.errors import GuestUnreachable, VmmError
from sandbox.host import syscalls
from sandbox.host.mounts import mounts_below, unmount_tree
from sandbox.spec import MountSpec
from sandbox.vm_pods.runtime import handle_of
from sandbox.vm_pods.volumes import find_sources
from tests.fakes.exporter import Site, exporting

A, B = (letter * 64 for letter in "ab")
PROC = MountSpec(container_path="/p", host_path="/proc", readonly=True)
FILE = MountSpec(container_path="/f", host_path="/proc/version")


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with exporting() as made:
        yield made


async def up(site: Site, id: str, *specs: MountSpec) -> Container:
    container = site.container(*specs, id=id)
    await site.step.up(container)
    return container


async def test_kernel_files_are_exported_by_the_share_without_a_cache(site: Site) -> None:
    first = await up(site, A, PROC, site.volume(), FILE)
    second = await up(site, B, FILE)
    assert [source.path for source in find_sources(first)] == [
        f"/run/husk/uncached/{A}-0",
        f"/run/husk/volumes/{A}-1",
        # the kind of mount differs: /proc is read-only here, and the file is not
        f"/run/husk/uncached/{A}-0/version",
    ]
    assert [source.within for source in find_sources(second)] == [f"/run/husk/uncached/{A}-0"]
    assert list(site.options()) == [f"/{A}-1"]
    assert list(site.uncached()) == [f"/{A}-0"]
    # the guest mounts the share, and nothing in it
    assert site.guest.shares == {"uncached": "/run/husk/uncached"}
    assert list(site.guest.mounted) == [f"{A}-1"]
    assert len(site.machine.exporters) == 1
    for container in (first, second):
        await site.step.down(container)
        site.inventory.forget_container(container)
    assert (site.options(), site.uncached()) == ({}, {})


async def test_pod_without_kernel_files_has_one_share(site: Site) -> None:
    await up(site, A, site.volume())
    assert (site.machine.exporters, site.guest.shares) == ([], {})
    assert mounts_below(site.pod.uncached_share) == []


@pytest.mark.parametrize("kind", ["sysfs", "tmpfs"])
async def test_share_is_chosen_by_the_file_system_and_not_by_the_path(site: Site, kind: str) -> None:
    folder = site.root / "somewhere"
    folder.mkdir()
    syscalls.mount(kind, folder, kind=kind)
    try:
        await up(site, A, MountSpec(container_path="/x", host_path=str(folder)))
        assert bool(site.machine.exporters) == (kind == "sysfs")
    finally:
        await site.step.down(site.inventory.container(A))
        unmount_tree(folder)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    "later",
    [{}, {"readonly": True}, {"readonly": True, "recursive_readonly": True}],
    ids=["writable", "read-only", "recursively read-only"],
)
async def test_kernel_files_beneath_a_volume_can_be_written_where_a_later_mount_allows_it(
    site: Site, later: dict[str, bool], together: bool
) -> None:
    """The first mount takes all read-only; a plain read-only one would leave what is beneath it writable."""
    folder = site.root / "somewhere"
    (folder / "deep/sys").mkdir(parents=True)
    syscalls.mount("sysfs", folder / "deep/sys", kind="sysfs")
    first = MountSpec(container_path="/x", host_path=str(folder), readonly=True, recursive_readonly=True)
    whole = MountSpec(container_path="/y", host_path=str(folder), **later)  # type: ignore[arg-type]
    inner = msgspec.structs.replace(whole, container_path="/z", host_path=str(folder / "deep"))
    try:
        await up(site, A, first, *((whole, inner) if together else ()))
        if not together:
            assert "ro" in site.uncached()[f"/{A}-0-0"]
            await up(site, B, inner)
        assert list(site.uncached()) == [f"/{A}-0-0"]
        assert ("ro" in site.uncached()[f"/{A}-0-0"]) == ("recursive_readonly" in later)
    finally:
        for container in list(site.inventory.containers_of(site.pod)):
            await site.step.down(container)
            site.inventory.forget_container(container)
        unmount_tree(folder)


@pytest.mark.parametrize("recursive", [False, True])
async def test_kernel_files_beneath_a_volume_are_exported_apart_and_mounted_over_it(
    site: Site, recursive: bool
) -> None:
    folder = site.root / "somewhere"
    (folder / "deep/sys").mkdir(parents=True)
    syscalls.mount("sysfs", folder / "deep/sys", kind="sysfs")
    spec = MountSpec(container_path="/x", host_path=str(folder), readonly=True, recursive_readonly=recursive)
    try:
        first = await up(site, A, spec)
        assert list(site.uncached()) == [f"/{A}-0-0"]
        part = site.guest.mounted[f"{A}-0"].parts[0]
        assert (part.path, part.source) == ("deep/sys", f"/run/husk/uncached/{A}-0-0")
        assert ("ro" in site.uncached()[f"/{A}-0-0"]) == recursive
        # another container uses the same export, which keeps its part when the first one is gone
        second = await up(site, B, spec)
        await site.step.down(first)
        site.inventory.forget_container(first)
        assert (list(site.uncached()), len(site.machine.exporters)) == ([f"/{A}-0-0"], 1)
        assert find_sources(second)[0].path == f"/run/husk/volumes/{A}-0"
        await site.step.down(second)
        site.inventory.forget_container(second)
        assert (site.options(), site.uncached(), list(_points(site))) == ({}, {}, [])
    finally:
        unmount_tree(folder)


async def test_vm_that_cannot_add_a_share_has_the_files_in_the_other_one(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.machine.able = False
    container = await up(site, A, PROC)
    assert list(site.options()) == [f"/{A}-0"]
    assert find_sources(container)[0].path == f"/run/husk/volumes/{A}-0"
    assert "files of the host's kernel are empty" in caplog.text


async def test_share_that_was_not_saved_is_found_again(site: Site) -> None:
    site.guest.fault = GuestUnreachable("gone")
    container = site.container(PROC, id=A)
    with pytest.raises(GuestUnreachable):
        await site.step.up(container)
    await site.step.down(container)
    site.inventory.forget_container(container)
    # as if the daemon had been killed before the record was written
    site.pod.update_runtime(handle=_without(site))
    site.guest.fault = None
    await up(site, B, PROC)
    assert (list(site.uncached()), len(site.machine.exporters)) == ([f"/{B}-0"], 1)
    assert "uncached" in _helpers(site)


async def test_exporter_that_ended_fails_the_container_and_holds_nothing(site: Site) -> None:
    await up(site, A, PROC)
    site.machine.end()
    container = site.container(FILE, PROC, id=B)
    with pytest.raises(VmmError, match="virtiofsd"):
        await site.step.up(container)
    await site.step.down(container)
    site.inventory.forget_container(container)
    await site.step.down(site.inventory.container(A))
    assert list(_points(site)) == []


def _points(site: Site) -> Iterator[Path]:
    return (each for each in site.pod.back_of(site.pod.volumes_share).iterdir() if each.name != "old")


def _helpers(site: Site) -> list[str]:
    return list(handle_of(site.pod).helpers)


def _without(site: Site) -> object:
    handle = handle_of(site.pod)
    helpers = {tag: each for tag, each in handle.helpers.items() if tag != "uncached"}
    return msgspec.structs.replace(handle, helpers=helpers)
