"""A root filesystem as a value: what is kept of it, and who refuses which kind."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from image.rootfs import Disk, HostTree, Rootfs
from sandbox.container import Container
from sandbox.errors import RootfsUnusable
from sandbox.pod import Pod
from sandbox.records import ContainerRecord, PodRecord
from sandbox.spec import ContainerId, ContainerSpec, ImageDefaults, PodId, PodSpec
from sandbox.steps.rootfs import require_tree
from sandbox.store import Store
from sandbox.vm_pods.rootfs import guest_root

DISK = Disk(path="/disks/c1.qcow2", format="qcow2", read_only=True)


@pytest.fixture
def container(tmp_path: Path) -> Container:
    pods = Store(tmp_path / "pods", PodRecord)
    containers = Store(tmp_path / "containers", ContainerRecord)
    spec = PodSpec(name="p", namespace="n", uid="u")
    pod = Pod(PodRecord(id=PodId("p1"), spec=spec, created_at_ns=0), pods, tmp_path / "run")
    record = ContainerRecord(
        id=ContainerId("c1"),
        pod_id=pod.id,
        spec=ContainerSpec(name="c", image="i"),
        created_at_ns=0,
        image_id="sha256:1",
        image_ref="i",
        defaults=ImageDefaults(),
    )
    return Container(record, containers, pod)


@pytest.mark.parametrize("rootfs", [HostTree(path="/share/c1"), DISK])
def test_record_keeps_either_kind(container: Container, rootfs: Rootfs) -> None:
    container.record_rootfs(rootfs)
    container.update(steps=("rootfs",))
    saved = msgspec.json.decode(msgspec.json.encode(container.record), type=ContainerRecord)
    assert saved.rootfs == container.rootfs == rootfs


def test_record_without_a_root_filesystem_means_the_mount_in_the_share(container: Container) -> None:
    assert container.rootfs == HostTree(path=str(container.rootfs_mount))


def test_tree_is_found_in_the_share_of_the_guest(container: Container) -> None:
    assert guest_root(container) == "/run/husk/rootfs/c1"
    assert require_tree(container.rootfs) == container.rootfs_mount


def test_disk_is_refused_where_nothing_attaches_it(container: Container) -> None:
    container.record_rootfs(DISK)
    with pytest.raises(RootfsUnusable, match=r"/disks/c1\.qcow2"):
        guest_root(container)
    with pytest.raises(RootfsUnusable, match=r"/disks/c1\.qcow2"):
        require_tree(DISK)
