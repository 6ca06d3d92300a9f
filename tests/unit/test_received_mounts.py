"""What to mount and unmount in an export for it to have the host's mounts; the watch of the table."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from sandbox.host.mount_watch import MountWatch
from sandbox.host.mountinfo import Mounted
from sandbox.spec import MountSpec, Propagation
from sandbox.vm_pods.received_mounts import compare, receives

Table = dict[str, Mounted]


def table(*paths: str, device: str = "0:9", readonly: bool = False) -> Table:
    return {path: Mounted(1, device, "/", path, readonly, "tmpfs") for path in paths}


@pytest.mark.parametrize(
    ("wanted", "actual", "detach", "attach"),
    [
        ({}, {}, (), ()),
        (table("a"), table("a"), (), ()),
        (table("b/c", "a", "b"), {}, (), ("a", "b", "b/c")),
        ({}, table("a", "a/b", "ab"), ("a", "ab"), ()),
        (table("a", "a/b"), table("a") | table("a/b", device="0:8"), ("a/b",), ("a/b",)),
        # what lies beneath a mount that was replaced is mounted again
        (table("a", "a/b"), table("a", device="0:8") | table("a/b"), ("a",), ("a", "a/b")),
        (table("a", readonly=True), table("a"), ("a",), ("a",)),
    ],
)
def test_difference_of_two_trees_is_found(
    wanted: Table, actual: Table, detach: tuple[str, ...], attach: tuple[str, ...]
) -> None:
    found = compare(wanted, actual)
    assert (found.detach, tuple(line.point for line in found.attach)) == (detach, attach)


@pytest.mark.parametrize(
    ("propagation", "expected"),
    [
        (Propagation.PRIVATE, False),
        (Propagation.HOST_TO_CONTAINER, True),
        (Propagation.BIDIRECTIONAL, True),
    ],
)
def test_mount_receives_by_its_propagation(propagation: Propagation, expected: bool) -> None:
    assert receives(MountSpec(container_path="/data", host_path="/x", propagation=propagation)) is expected


async def test_change_of_the_mount_table_wakes_the_event_loop(tmp_path: Path) -> None:
    watch = MountWatch()
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def report() -> None:
        watch.clear()
        changed.set()

    loop.add_reader(watch.descriptor, report)
    try:
        await asyncio.sleep(0)
        for command in (["mount", "-t", "tmpfs", "husk-test", str(tmp_path)], ["umount", str(tmp_path)]):
            await asyncio.to_thread(subprocess.run, command, check=True)
            async with asyncio.timeout(5):
                await changed.wait()
            changed.clear()
    finally:
        loop.remove_reader(watch.descriptor)
        watch.close()
        watch.close()
