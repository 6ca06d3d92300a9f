"""A host that keeps count of what it gave out: the far side of every pod step, able to fail on demand.

`Ledger.held` is what would be left behind. A fault is planned by the name of the operation
("network.up"); it may strike before the effect or after it, as a crash or an error would.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from image.idmap import IdMap
from image.rootfs import HostTree, Rootfs
from image.stores import Usage
from network.attach import Attachment, Interface, NetworkRequest
from sandbox.errors import VmmError, VmmGone
from sandbox.host.openat import read_beneath
from sandbox.host.process import ProcessIdentity
from sandbox.vmm import Device, DiskSpec, Feature, Machine, ShareSpec, VmHandle, VmSpec
from tests.fakes import cri
from tests.fakes.guest import FakeAgent


class Broken(Exception):
    """The fault that a test asked for."""


@dataclass
class Ledger:
    held: set[str] = field(default_factory=set)
    faults: dict[str, str] = field(default_factory=dict)  # operation -> "before" or "after"
    refused: int = 0  # operations that failed before their effect

    def take(self, operation: str, thing: str) -> None:
        fault = self.faults.get(operation)
        if fault == "before":
            self.refused += 1
            raise Broken(operation)
        self.held.add(thing)
        if fault == "after":
            raise Broken(operation)

    def give(self, operation: str, thing: str) -> None:
        if self.faults.get(operation) == "before":
            raise Broken(operation)
        self.held.discard(thing)


class FakeNetworks(cri.FakeNetworks):
    """Networks of pods in a ledger; status and pod CIDR as in the fake of the CRI's services."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    async def gc(self, valid: Iterable[str]) -> None:
        """Nothing of a lost record is kept here."""

    async def prepare(self, pod_id: str) -> int:
        self.ledger.take("network.prepare", f"netns {pod_id}")
        return os.open("/dev/null", os.O_RDWR)

    def netns_of(self, pod_id: str) -> Path:
        return Path("/netns") / pod_id

    async def up(self, request: NetworkRequest) -> Attachment:
        self.ledger.take("network.up", f"network {request.pod_id}")
        nic = Interface(
            name="eth0", tap="tap0", mac="02:00:00:00:00:01", mtu=1500, addresses=("10.1.0.2/24",)
        )
        return Attachment(netns=f"/netns/{request.pod_id}", interfaces=(nic,), ips=("10.1.0.2",))

    async def detach(self, pod_id: str) -> None:
        self.ledger.give("network.down", f"network {pod_id}")

    async def down(self, pod_id: str) -> None:
        await self.detach(pod_id)
        self.ledger.give("network.remove", f"netns {pod_id}")

    async def open_taps(self, pod_id: str, *, begin: int = 0) -> tuple[int, ...]:
        return () if begin else (os.open("/dev/null", os.O_RDWR),)


class FakeMachine:
    def __init__(self, vm: FakeVm) -> None:
        self.handle = vm.handle
        self._vm = vm

    async def wait(self) -> str:
        await self._vm.ended.wait()
        return "killed by the test"

    async def pause(self) -> None:
        self._vm.take("vm.pause")
        self._vm.paused = True

    async def resume(self) -> None:
        self._vm.take("vm.resume")
        self._vm.paused = False

    async def grow(self, memory_mib: int, vcpus: int) -> None:
        self._vm.take("vm.grow")
        self._vm.grown = (memory_mib, vcpus)

    async def plug(self, device: Device, fd: int) -> None:
        self._vm.take("vm.plug")
        if isinstance(device, DiskSpec):
            self._vm.disks[device.serial] = os.fstat(fd).st_rdev

    async def unplug(self, device: Device) -> None:
        self._vm.take("vm.unplug")
        if isinstance(device, DiskSpec):
            self._vm.disks.pop(device.serial, None)

    async def resize_disk(self, disk: DiskSpec, size: int) -> None:
        self._vm.take("vm.resize_disk")
        self._vm.sizes[disk.serial] = size

    async def add_share(self, share: ShareSpec) -> VmHandle:
        self._vm.take("vm.add_share")
        if share.tag not in self.handle.helpers:
            self.handle = replace(self.handle, helpers={**self.handle.helpers, share.tag: identity(5)})
        return self.handle

    async def save(self, directory: Path) -> None:
        self._vm.take("vm.save")
        directory.mkdir()
        (directory / "saved").touch()

    def console_tail(self) -> str:
        return "the guest's last words"

    async def describe(self) -> Mapping[str, str]:
        return {"state": "running"} | {f"disk.{serial}": "" for serial in self._vm.disks}

    async def close(self) -> None:
        return None


@dataclass
class FakeVm:
    """Outlives the daemon, as a VM does: a second set of objects can attach to it."""

    handle: VmHandle
    agent: FakeAgent
    server: AsyncExitStack
    ledger: Ledger
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    paused: bool = False
    grown: tuple[int, int] = (0, 0)
    disks: dict[str, int] = field(default_factory=dict)  # device numbers of the host by serial number
    sizes: dict[str, int] = field(default_factory=dict)  # by serial number, as reported to the guest

    def take(self, operation: str) -> None:
        """Something is done to it that holds nothing new."""
        if self.ledger.faults.get(operation):
            raise VmmError(f"the test says no to {operation}")

    async def die(self) -> None:
        self.ended.set()
        await self.server.aclose()
        Path(self.handle.channel.removeprefix("unix:")).unlink(missing_ok=True)


@dataclass
class FakeHypervisor:
    ledger: Ledger
    vms: dict[str, FakeVm] = field(default_factory=dict)
    make_agent: Callable[[], FakeAgent] = FakeAgent
    name: str = "fake"
    generation: int = 1  # of program and guest image
    supported: frozenset[Feature] = frozenset(Feature)

    async def start(self, spec: VmSpec, taps: tuple[int, ...]) -> Machine:
        # beside the run directories: their names are too long for the fake's plain bind
        socket = Path(spec.run_dir).parents[2] / f"{spec.pod_id[:8]}.sock"
        handle = VmHandle(
            hypervisor=self.name, spec=spec, vmm=identity(4), helpers={}, channel=f"unix:{socket}"
        )
        if spec.template and self.ledger.faults.get("vm.restore"):
            raise VmmError("the test says no to vm.restore")
        vm = FakeVm(handle, self.make_agent(), AsyncExitStack(), self.ledger)
        await vm.server.enter_async_context(vm.agent.listen(socket))
        self.vms[spec.pod_id] = vm
        self.ledger.take("vm.start", f"vm {spec.pod_id}")
        return FakeMachine(vm)

    def features(self, spec: VmSpec) -> Collection[Feature]:
        return self.supported

    async def fingerprint(self, spec: VmSpec) -> str:
        return f"key{self.generation}"

    async def attach(self, handle: VmHandle) -> Machine:
        vm = self.vms.get(handle.spec.pod_id)
        if vm is None or vm.ended.is_set():
            raise VmmGone("it does not run any more")
        return FakeMachine(vm)

    async def destroy(self, pod_id: str, run_dir: Path) -> None:
        self.ledger.give("vm.destroy", f"vm {pod_id}")
        vm = self.vms.pop(pod_id, None)
        if vm is not None:
            await vm.die()


@dataclass
class FakeRootfs:
    ledger: Ledger

    async def up(
        self,
        key: str,
        chain_ids: Sequence[str],
        target: Path,
        ids: IdMap | None = None,
        plain: Sequence[str] = (),
    ) -> Rootfs:
        self.ledger.take("rootfs.up", f"rootfs {key}")
        return HostTree(path=str(target))

    async def down(self, key: str, target: Path) -> None:
        self.ledger.give("rootfs.down", f"rootfs {key}")

    def usage(self, key: str) -> Usage:
        return Usage(bytes=4096, inodes=3)

    def read(self, rootfs: Rootfs, name: str, limit: int) -> bytes:
        return read_beneath(Path(rootfs.path), name, limit)

    def keys(self) -> Collection[str]:
        return [thing.partition(" ")[2] for thing in self.ledger.held if thing.startswith("rootfs ")]


def identity(pid: int) -> ProcessIdentity:
    return ProcessIdentity(pid=pid, start_time=1, boot_id="boot")
