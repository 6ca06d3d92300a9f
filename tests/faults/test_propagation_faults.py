"""A container's mounts on the host: made, removed, and left alone where they belong to others."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from sandbox.container import Container
from sandbox.host.mounts import mounts_below, top_mounts, unmount_tree
from sandbox.host.tasks import Tasks
from sandbox.pod import Pod
from sandbox.records import ContainerRecord, PodRecord, Propagated
from sandbox.spec import ContainerId, ContainerSpec, ImageDefaults, MountSpec, PodId, PodSpec, Propagation
from sandbox.store import Store
from sandbox.vm_pods.propagation import PropagationSync, apply_table

PLAIN = """20 1 0:30 / / rw - virtiofs none rw
22 20 0:40 / /both rw - virtiofs none rw
"""
MOUNTED = PLAIN + "23 22 0:30 /etc /both/point rw - virtiofs none rw\n"


@dataclass
class Site:
    root: Path
    store: Store[ContainerRecord]
    pod: Pod
    container: Container

    @property
    def point(self) -> Path:
        return self.root / "volume/point"

    def restarted(self) -> Container:
        """The container as the next daemon reads it."""
        record = self.container.record
        self.store.load()
        return Container(next(each for each in self.store if each.id == record.id), self.store, self.pod)


@pytest.fixture
def site() -> Iterator[Site]:
    root = Path(tempfile.mkdtemp(prefix="husk-faults-"))
    pod_record = PodRecord(id=PodId("p"), spec=PodSpec(name="p", namespace="n", uid="u"), created_at_ns=1)
    pod = Pod(pod_record, cast(Any, None), root / "run")
    volume = MountSpec(
        container_path="/both", host_path=str(root / "volume"), propagation=Propagation.BIDIRECTIONAL
    )
    record = ContainerRecord(
        id=ContainerId("c" * 64),
        pod_id=pod.id,
        spec=ContainerSpec(name="c", image="i", mounts=(volume,)),
        created_at_ns=1,
        image_id="i",
        image_ref="i",
        defaults=ImageDefaults(),
    )
    store = Store(root / "containers", ContainerRecord)
    store.put(record)
    container = Container(record, store, pod)
    (root / "volume/point").mkdir(parents=True)
    (container.rootfs_mount / "etc").mkdir(parents=True)
    (container.rootfs_mount / "etc/file").write_text("of the container")
    yield Site(root, store, pod, container)
    unmount_tree(root)
    shutil.rmtree(root)


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


async def release(container: Container) -> None:
    await PropagationSync(Tasks()).release(container)


async def test_mount_is_made_once_and_removed(site: Site) -> None:
    for _ in range(2):
        await apply_table(site.container, MOUNTED)
    assert (site.point / "file").read_text() == "of the container"
    assert mounts_below(site.root) == [site.point]
    (line,) = (each for each in Path("/proc/self/mounts").read_text().splitlines() if str(site.point) in each)
    assert {"nosuid", "nodev"} <= set(line.split()[3].split(","))
    await apply_table(site.container, PLAIN)
    assert (mounts_below(site.root), site.container.record.propagated) == ([], ())


async def test_release_needs_the_record_alone_and_is_idempotent(site: Site) -> None:
    await release(site.container)
    await apply_table(site.container, MOUNTED)
    for _ in range(2):
        await release(site.restarted())
    assert mounts_below(site.root) == []


@pytest.mark.parametrize("made", [False, True])
async def test_mount_of_a_killed_daemon_is_removed_by_its_intent(site: Site, made: bool) -> None:
    """Killed before or after it made the mount: the record has the intent, without the mount's id."""
    if made:
        mount("--bind", site.container.rootfs_mount / "etc", site.point)
    site.container.update(propagated=(Propagated(path=str(site.point)),))
    await release(site.restarted())
    assert mounts_below(site.root) == []


async def test_mount_of_others_below_or_on_top_stays(site: Site) -> None:
    mount("-t", "tmpfs", "before", site.point)
    below = top_mounts()[str(site.point)]
    site.container.update(propagated=(Propagated(path=str(site.point), below=below),))
    await release(site.restarted())
    assert top_mounts()[str(site.point)] == below
    site.container.update(propagated=())
    await apply_table(site.container, MOUNTED)
    mount("-t", "tmpfs", "top", site.point)
    on_top = top_mounts()[str(site.point)]
    await release(site.container)
    assert top_mounts()[str(site.point)] == on_top


@pytest.mark.parametrize("spoil", ["target is a link", "target is gone", "source is gone", "kinds differ"])
async def test_mount_that_the_host_cannot_make_is_ignored_without_a_write(
    site: Site, spoil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    match spoil:
        case "target is a link":
            site.point.rmdir()
            site.point.symlink_to("/etc")
        case "target is gone":
            site.point.rmdir()
        case "source is gone":
            shutil.rmtree(site.container.rootfs_mount / "etc")
        case _:
            site.point.rmdir()
            site.point.touch()
    written: list[ContainerRecord] = []
    monkeypatch.setattr(site.store, "put", written.append)
    await apply_table(site.container, MOUNTED)
    assert written == [], "it is retried at every poll"
    assert (mounts_below(site.root), site.container.record.propagated) == ([], ())
