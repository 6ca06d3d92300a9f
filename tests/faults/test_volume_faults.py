"""The step that mounts a container's volumes: failures half-way, repeated undo, and undo after a crash.

A process with a mount namespace takes the place of virtiofsd.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from sandbox.container import Container
from sandbox.errors import InvalidSpec, VmmGone
from sandbox.host import mounts, process, syscalls
from sandbox.host.ids import IdRange
from sandbox.host.mounts import mounts_below
from sandbox.pod import Pod
from sandbox.records import ContainerRecord, ImageVolume, PodRecord, VmRuntime
from sandbox.spec import (
    ContainerId,
    ContainerSpec,
    ImageDefaults,
    MountSpec,
    PodId,
    PodSpec,
    UserNamespace,
    VmSize,
)
from sandbox.steps.pod import Shares
from sandbox.vm_pods.resize import Resizer
from sandbox.vm_pods.volumes import Volumes, find_sources
from sandbox.vmm import VmHandle, VmSpec
from tests.fakes.host import Broken, FakeRootfs, Ledger
from tests.fakes.inventory import make_inventory

ID = "c" * 64
# as virtiofsd does for --sandbox=namespace: the share is the root of its mount namespace
EXPORTER = "pivot_root . old && exec old/bin/busybox sleep 600"


async def _never(pod: Pod, size: VmSize) -> None:
    raise AssertionError("no volume here needs a larger VM")


@dataclass
class Site:
    root: Path
    pod: Pod
    exporter: subprocess.Popen[bytes]
    ledger: Ledger

    @property
    def step(self) -> Volumes:
        return Volumes(FakeRootfs(self.ledger), Resizer(make_inventory(self.root / "state"), _never))

    def container(self, *specs: MountSpec, images: tuple[ImageVolume, ...] = ()) -> Container:
        record = ContainerRecord(
            id=ContainerId(ID),
            pod_id=self.pod.id,
            spec=ContainerSpec(name="c", image="i", mounts=specs),
            created_at_ns=1,
            image_id="i",
            image_ref="i",
            defaults=ImageDefaults(),
            image_volumes=images,
        )
        return Container(record, make_inventory(self.root / "state").container_store, self.pod)

    def volume(self, name: str = "volume") -> MountSpec:
        (self.root / name).mkdir(exist_ok=True)
        return MountSpec(container_path="/x", host_path=str(self.root / name))

    def mounted(self) -> list[str]:
        """Volumes in the exporter's namespace."""
        lines = Path(f"/proc/{self.exporter.pid}/mountinfo").read_text().splitlines()
        return sorted(point for point in (line.split()[4] for line in lines) if point.startswith(f"/{ID}"))


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    root = Path(tempfile.mkdtemp(prefix="husk-faults-"))
    record = PodRecord(id=PodId("p"), spec=PodSpec(name="p", namespace="n", uid="u"), created_at_ns=1)
    pod = Pod(record, make_inventory(root / "state").pod_store, root / "run")
    pod.run_dir.mkdir()
    await Shares().up(pod)
    (pod.back_of(pod.volumes_share) / "old").mkdir()
    exporter = _start_exporter(pod)
    try:
        pod.record = msgspec.structs.replace(record, runtime=VmRuntime(handle=_handle(exporter.pid)))
        yield Site(root, pod, exporter, Ledger())
    finally:
        exporter.kill()
        exporter.wait()
        await Shares().down(pod)
        assert mounts_below(root) == []
        shutil.rmtree(root)


def _start_exporter(pod: Pod) -> subprocess.Popen[bytes]:
    exporter = subprocess.Popen(["unshare", "--mount", "sh", "-c", EXPORTER], cwd=pod.volumes_share)
    while Path(f"/proc/{exporter.pid}/comm").read_text() != "busybox\n":
        assert exporter.poll() is None
    return exporter


def _handle(pid: int) -> VmHandle:
    identity = process.identify(pid)
    assert identity is not None
    spec = VmSpec(
        pod_id="p",
        run_dir="",
        kernel="",
        initramfs="",
        accelerator="tcg",
        memory_mib=1,
        vcpus=1,
    )
    return VmHandle(hypervisor="", spec=spec, vmm=identity, helpers={"volumes": identity}, channel="")


async def test_volumes_are_mounted_in_the_exporters_namespace_alone(site: Site) -> None:
    (site.root / "single").write_text("a file")
    single = MountSpec(container_path="/y", host_path=str(site.root / "single"))
    container = site.container(site.volume(), single)
    before = mounts_below(site.root)
    await site.step.up(container)
    assert site.mounted() == [f"/{ID}/0", f"/{ID}/1"]
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
    await site.step.down(site.container(site.volume()))
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
    assert sources[1].path.endswith(f"{ID}/1")
    assert [path.name for path in site.pod.back_of(site.pod.volumes_share).glob("*/*")] == ["1"]
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
