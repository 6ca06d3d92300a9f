"""A pod whose volumes are exported by a process with a mount namespace, in the place of virtiofsd, and whose
guest is a table of what it has mounted."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec

from sandbox.container import Container
from sandbox.errors import VmmGone
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.host import process
from sandbox.host.mounts import mounts_below
from sandbox.inventory import Inventory
from sandbox.plan.values import HostShare
from sandbox.plan.vm import HostSize
from sandbox.pod import Pod
from sandbox.records import ContainerRecord, ImageVolume, PodRecord, PodState, VmRuntime
from sandbox.spec import (
    ContainerId,
    ContainerSpec,
    ImageDefaults,
    MountSpec,
    PodId,
    PodSpec,
    VmSize,
)
from sandbox.steps.pod import Shares
from sandbox.vm_pods.link import link_of
from sandbox.vm_pods.resize import Resizer
from sandbox.vm_pods.runtime import handle_of
from sandbox.vm_pods.volumes import Volumes
from sandbox.vmm import Feature, ShareSpec, Unsupported, VmHandle, VmSpec
from tests.fakes.host import FakeRootfs, Ledger
from tests.fakes.inventory import make_inventory
from tests.fakes.vmm import StillMachine

ID = "c" * 64
# as virtiofsd does for --sandbox=namespace: the share is the root of its mount namespace
EXPORTER = "pivot_root . old && exec old/bin/busybox sleep 600"


async def _never(pod: Pod, size: VmSize) -> None:
    raise AssertionError("no volume here needs a larger VM")


async def _nothing(pod: Pod, share: HostShare) -> None:
    return


class Guest:
    """Takes the place of the connection to the agent: what it has mounted, and how it fails."""

    def __init__(self) -> None:
        self.mounted: dict[str, pb.Export] = {}
        self.fault: Exception | None = None
        self.shares: dict[str, str] = {}  # that were added, by tag

    async def call(self, request: pb.Request, timeout_s: float) -> pb.Reply:
        if self.fault is not None:
            raise self.fault
        if request.WhichOneof("body") == "prepare":
            self.shares |= {share.tag: share.path for share in request.prepare.shares}
        elif request.WhichOneof("body") == "mount_exports":
            self.mounted |= {Path(each.path).name: each for each in request.mount_exports.exports}
        else:
            kept = request.keep_exports.names
            self.mounted = {name: each for name, each in self.mounted.items() if name in kept}
        return pb.Reply()


class Adding(StillMachine):
    """Adds a share by a process in the place of its virtiofsd."""

    def __init__(self, pod: Pod) -> None:
        self._pod = pod
        self.handle = handle_of(pod)
        self.able = True
        self.exporters: list[subprocess.Popen[bytes]] = []

    async def add_share(self, share: ShareSpec) -> VmHandle:
        if not self.able:
            raise Unsupported("fake", Feature.PLUG)
        if not self.exporters:
            self.exporters.append(_start_exporter(Path(share.source)))
        identity = process.identify(self.exporters[0].pid)
        if identity is None:
            raise VmmGone("virtiofsd has ended")
        helpers = {**self.handle.helpers, share.tag: identity}
        self.handle = msgspec.structs.replace(self.handle, helpers=helpers)
        return self.handle

    def end(self) -> None:
        for exporter in self.exporters:
            exporter.kill()
            exporter.wait()


@dataclass
class Site:
    root: Path
    pod: Pod
    exporter: subprocess.Popen[bytes]
    ledger: Ledger
    inventory: Inventory
    guest: Guest
    machine: Adding

    @property
    def step(self) -> Volumes:
        resizer = Resizer(self.inventory, _never, _nothing, HostSize(memory_mib=4096, cpus=4))
        return Volumes(FakeRootfs(self.ledger), resizer, self.inventory)

    def container(self, *specs: MountSpec, images: tuple[ImageVolume, ...] = (), id: str = ID) -> Container:
        record = ContainerRecord(
            id=ContainerId(id),
            pod_id=self.pod.id,
            spec=ContainerSpec(name="c", image="i", mounts=specs),
            created_at_ns=1,
            image_id="i",
            image_ref="i",
            defaults=ImageDefaults(),
            image_volumes=images,
        )
        container = self.inventory.make_container(record, self.pod)
        self.inventory.add_container(container)
        return container

    def restart(self) -> list[Container]:
        """As a new daemon: everything is known by the records alone."""
        self.inventory = make_inventory(self.root / "state")
        self.inventory.container_store.load()
        found = [self.inventory.make_container(each, self.pod) for each in self.inventory.container_store]
        for container in found:
            self.inventory.add_container(container)
        return found

    def volume(self, name: str = "volume") -> MountSpec:
        (self.root / name).mkdir(exist_ok=True)
        return MountSpec(container_path="/x", host_path=str(self.root / name))

    def mounted(self) -> list[str]:
        """Volumes in the exporter's namespace: the first letter of the container, and the mount's number."""
        return sorted(f"{point[1]}{point.rpartition('-')[2]}" for point in self.options())

    def options(self) -> dict[str, str]:
        """Mount points of volumes in the exporter's namespace, and the options of the mounts."""
        return self._options(self.exporter)

    def uncached(self) -> dict[str, str]:
        """The same of the exporter that was added."""
        return self._options(self.machine.exporters[0])

    def _options(self, exporter: subprocess.Popen[bytes]) -> dict[str, str]:
        lines = Path(f"/proc/{exporter.pid}/mountinfo").read_text().splitlines()
        points = {line.split()[4]: line.split()[5] for line in lines}
        return {point: text for point, text in points.items() if point[1:33] in (32 * "a", 32 * "b", ID[:32])}


@contextlib.asynccontextmanager
async def exporting() -> AsyncIterator[Site]:
    """Run a process in the place of virtiofsd; nothing may be left mounted."""
    root = Path(tempfile.mkdtemp(prefix="husk-faults-"))
    record = PodRecord(id=PodId("p"), spec=PodSpec(name="p", namespace="n", uid="u"), created_at_ns=1)
    pod = Pod(record, make_inventory(root / "state").pod_store, root / "run")
    pod.run_dir.mkdir()
    await Shares().up(pod)
    (pod.back_of(pod.volumes_share) / "old").mkdir()
    exporter = _start_exporter(pod.volumes_share)
    machine: Adding | None = None
    try:
        runtime = VmRuntime(handle=_handle(exporter.pid))
        pod.record = msgspec.structs.replace(record, state=PodState.READY, runtime=runtime)
        guest = Guest()
        link_of(pod).client = cast(GuestClient, guest)
        link_of(pod).machine = machine = Adding(pod)
        yield Site(root, pod, exporter, Ledger(), make_inventory(root / "state"), guest, machine)
    finally:
        if machine is not None:
            machine.end()
        exporter.kill()
        exporter.wait()
        await Shares().down(pod)
        assert mounts_below(root) == []
        shutil.rmtree(root)


def _start_exporter(share: Path) -> subprocess.Popen[bytes]:
    exporter = subprocess.Popen(["unshare", "--mount", "sh", "-c", EXPORTER], cwd=share)
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
