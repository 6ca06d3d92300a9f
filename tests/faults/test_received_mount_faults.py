"""Mounts of the host below a volume that receives them: repeated in the exporter's namespace, never busy for
the host; with a volume that vanishes, links in the way, and a daemon that starts again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Collection, Iterator
from pathlib import Path

import pytest

from sandbox.container import Container
from sandbox.host import syscalls
from sandbox.host.mounts import unmount_tree
from sandbox.host.tasks import Tasks
from sandbox.spec import MountSpec, Propagation
from sandbox.vm_pods.exports import Exporter
from sandbox.vm_pods.received_mounts import Known, ReceivedMounts, update, uses
from tests.fakes.exporter import Site, exporting
from tests.kit.eventually import eventually

A, B = (letter * 64 for letter in "ab")


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with exporting() as made:
        yield made


@pytest.fixture
def folder(site: Site) -> Iterator[Path]:
    path = site.root / "volume"
    (path / "sub").mkdir(parents=True)
    yield path
    unmount_tree(path)


def receiving(path: Path) -> MountSpec:
    return MountSpec(container_path="/x", host_path=str(path), propagation=Propagation.HOST_TO_CONTAINER)


def mount(point: Path) -> Path:
    syscalls.mount("tmpfs", point, kind="tmpfs")
    (point / "deep").mkdir()
    return point


def unmount(point: Path) -> None:
    """As umount(8) does without -l. Raises OSError for a busy mount."""
    syscalls.umount2(point, 0)


async def up(site: Site, *specs: MountSpec, id: str = A) -> Container:
    container = site.container(*specs, id=id)
    await site.step.up(container)
    return container


def repeat(site: Site, own: Collection[str] = (), known: Known | None = None) -> list[str]:
    """Bring the exports up to date, and return what has changed in them."""
    receiving = [use for each in site.inventory.containers_of(site.pod) for use in uses(each)]
    changed = update(Exporter(site.pod), receiving, own, {} if known is None else known)
    return [path for _, paths in changed for path in paths]


def background() -> set[str]:
    """The tasks that run beside this one, by name."""
    return {task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}}


def exported(site: Site) -> list[str]:
    """What is mounted in the first export."""
    exporter, begin = Exporter(site.pod), f"{A}-0/"
    with exporter.opened():
        points = {line.point for line in exporter.table() if line.point.startswith(begin)}
    return sorted(point.removeprefix(begin) for point in points)


def hold(site: Site, path: str) -> int:
    """Open a directory of the first export, as virtiofsd does for what the guest has cached."""
    opened = Exporter(site.pod).run(lambda: os.open(f"/{A}-0/{path}", os.O_PATH))
    assert isinstance(opened, int)
    return opened


async def test_mount_of_the_host_comes_and_goes_while_it_is_in_use(site: Site, folder: Path) -> None:
    await up(site, receiving(folder))
    assert (repeat(site), exported(site)) == ([], [])
    mount(folder / "sub")
    mount(folder / "sub/deep")
    known: Known = {}
    assert repeat(site, known=known) == ["sub", "sub/deep"]
    assert exported(site) == ["sub", "sub/deep"]
    assert repeat(site, known=known) == []
    held = hold(site, "sub/deep")
    try:
        unmount(folder / "sub/deep")
        unmount(folder / "sub")
        (folder / "sub").rmdir()
        assert exported(site) == []  # with its mount point
        assert sorted(repeat(site, known=known)) == ["sub", "sub/deep"]
        assert repeat(site, known=known) == []
    finally:
        os.close(held)


async def test_mounts_that_a_volume_had_before_are_not_busy(site: Site, folder: Path) -> None:
    mount(folder / "sub")
    mount(folder / "sub/deep")
    await up(site, receiving(folder))
    assert (repeat(site), exported(site)) == ([], ["sub", "sub/deep"])
    held = hold(site, "sub/deep")
    unmount(folder / "sub/deep")
    os.close(held)
    assert repeat(site) == ["sub/deep"]
    unmount(folder / "sub")
    assert repeat(site) == ["sub"]


async def test_mount_over_another_one_takes_its_place(site: Site, folder: Path) -> None:
    await up(site, receiving(folder))
    mount(folder / "sub")
    repeat(site)
    mount(folder / "sub")
    (folder / "sub/upper").touch()
    assert repeat(site) == ["sub"]
    assert exported(site) == ["sub"]
    os.close(hold(site, "sub/upper"))
    unmount(folder / "sub")
    assert repeat(site) == ["sub"]
    with pytest.raises(FileNotFoundError):
        hold(site, "sub/upper")


async def test_mount_that_a_container_caused_is_left_out(site: Site, folder: Path) -> None:
    await up(site, receiving(folder))
    mount(folder / "sub")
    assert repeat(site, {str(folder / "sub")}) == []


async def test_private_mount_receives_nothing(site: Site, folder: Path) -> None:
    await up(site, MountSpec(container_path="/x", host_path=str(folder)))
    mount(folder / "sub")
    assert (repeat(site), exported(site)) == ([], [])


async def test_mounts_end_with_a_source_that_is_gone(site: Site, folder: Path) -> None:
    mount(folder / "sub")
    await up(site, receiving(folder))
    unmount_tree(folder)
    folder.rename(site.root / "renamed")
    folder.mkdir()
    assert repeat(site) == ["sub"]
    folder.rmdir()
    assert (repeat(site), exported(site)) == ([], [])


async def test_link_in_the_way_is_not_followed(site: Site, folder: Path) -> None:
    (site.root / "other").mkdir()
    (site.root / "other/point").mkdir()
    await up(site, receiving(folder), MountSpec(container_path="/y", host_path=str(site.root / "other")))
    outer = mount(folder / "sub")
    mount(folder / "sub/deep")
    repeat(site)
    unmount(folder / "sub/deep")
    repeat(site)
    # the path leads elsewhere in the exporter's namespace by the time that the mount is repeated
    (outer / "deep").rmdir()
    (outer / "deep").symlink_to(f"/{A}-1/point")
    syscalls.mount("tmpfs", site.root / "other/point", kind="tmpfs")
    try:
        assert repeat(site) == []
        assert exported(site) == ["sub"]
    finally:
        unmount_tree(site.root / "other/point")


async def test_next_daemon_finds_what_changed_meanwhile(site: Site, folder: Path) -> None:
    await up(site, receiving(folder))
    mount(folder / "sub")
    repeat(site)
    unmount(folder / "sub")
    (folder / "more").mkdir()
    mount(folder / "more")
    site.restart()
    assert sorted(repeat(site)) == ["more", "sub"]
    assert exported(site) == ["more"]


async def test_changes_are_followed_until_no_container_is_left(site: Site, folder: Path) -> None:
    tasks = Tasks()
    received = ReceivedMounts(tasks, site.inventory)
    container = await up(site, receiving(folder))
    received.follow(container)
    received.follow(container)
    try:
        mount(folder / "sub")
        await eventually(lambda: exported(site), until=lambda found: found == ["sub"])
        unmount(folder / "sub")
        await eventually(lambda: exported(site), until=lambda found: found == [])
        received.release(container)
        received.release(container)
        # at once, and not with the next change of the host's mounts
        await eventually(background, until=lambda tasks: not tasks)
        assert not received.followed
    finally:
        await tasks.close()


async def test_pod_is_followed_while_one_of_its_containers_is_left(site: Site, folder: Path) -> None:
    tasks = Tasks()
    received = ReceivedMounts(tasks, site.inventory)
    first, second = await up(site, receiving(folder)), await up(site, receiving(folder), id=B)
    for container in (first, second):
        received.follow(container)
    try:
        received.release(first)
        await site.step.down(first)
        mount(folder / "sub")
        await eventually(lambda: exported(site), until=lambda found: found == ["sub"])
        received.release(second)
        received.follow(second)
        unmount(folder / "sub")
        await eventually(lambda: exported(site), until=lambda found: found == [])
        received.release(second)
        await eventually(background, until=lambda tasks: not tasks)
    finally:
        await tasks.close()
