"""A host that keeps count of what it gave out: the far side of every pod step, able to fail on demand.

`Ledger.held` is what would be left behind. A fault is planned by the name of the operation
("network.up"); it may strike before the effect or after it, as a crash or an error would.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from image.stores import Usage
from network.attach import Attachment, Interface, NetworkWish
from sandbox.errors import VmmGone
from sandbox.process import ProcessIdentity
from sandbox.vmm import Machine, VmHandle, VmSpec
from tests.fakes.guest import FakeAgent


class Broken(Exception):
    """The fault that a test asked for."""


@dataclass
class Ledger:
    held: set[str] = field(default_factory=set)
    faults: dict[str, str] = field(default_factory=dict)  # operation -> "before" or "after"

    def take(self, operation: str, thing: str) -> None:
        fault = self.faults.get(operation)
        if fault == "before":
            raise Broken(operation)
        self.held.add(thing)
        if fault == "after":
            raise Broken(operation)

    def give(self, operation: str, thing: str) -> None:
        if self.faults.get(operation) == "before":
            raise Broken(operation)
        self.held.discard(thing)


@dataclass
class FakeNetworks:
    ledger: Ledger

    async def up(self, wish: NetworkWish) -> Attachment:
        self.ledger.take("network.up", f"network {wish.pod_id}")
        nic = Interface(
            name="eth0", tap="tap0", mac="02:00:00:00:00:01", mtu=1500, addresses=("10.1.0.2/24",)
        )
        return Attachment(netns=f"/netns/{wish.pod_id}", interfaces=(nic,), ips=("10.1.0.2",))

    async def down(self, pod_id: str) -> None:
        self.ledger.give("network.down", f"network {pod_id}")

    async def open_taps(self, pod_id: str) -> tuple[int, ...]:
        if self.ledger.faults.get("network.taps"):
            raise Broken("network.taps")
        return (os.open("/dev/null", os.O_RDWR),)


class FakeMachine:
    def __init__(self, vm: FakeVm) -> None:
        self.handle = vm.handle
        self._vm = vm

    async def wait(self) -> str:
        await self._vm.ended.wait()
        return "killed by the test"

    async def kill(self) -> None:
        self._vm.ended.set()

    def console_tail(self) -> str:
        return "the guest's last words"

    async def describe(self) -> Mapping[str, str]:
        return {"state": "running"}

    async def close(self) -> None:
        return None


@dataclass
class FakeVm:
    """Outlives the daemon, as a VM does: a second set of objects can attach to it."""

    handle: VmHandle
    agent: FakeAgent
    server: AsyncExitStack
    ended: asyncio.Event = field(default_factory=asyncio.Event)

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

    async def start(self, spec: VmSpec, taps: tuple[int, ...]) -> VmHandle:
        # beside the run directories: their names are too long for the fake's plain bind
        socket = Path(spec.run_dir).parents[2] / f"{spec.pod_id[:8]}.sock"
        handle = VmHandle(
            hypervisor=self.name, spec=spec, vmm=identity(4), helpers={}, channel=f"unix:{socket}"
        )
        vm = FakeVm(handle, self.make_agent(), AsyncExitStack())
        await vm.server.enter_async_context(vm.agent.listen(socket))
        self.vms[spec.pod_id] = vm
        self.ledger.take("vm.start", f"vm {spec.pod_id}")
        return handle

    async def attach(self, handle: VmHandle) -> Machine:
        vm = self.vms.get(handle.spec.pod_id)
        if vm is None or vm.ended.is_set():
            raise VmmGone("it does not run any more")
        return FakeMachine(vm)

    async def destroy(self, spec_pod_id: str, run_dir: Path) -> None:
        self.ledger.give("vm.destroy", f"vm {spec_pod_id}")
        vm = self.vms.pop(spec_pod_id, None)
        if vm is not None:
            await vm.die()


@dataclass
class FakeRootfs:
    ledger: Ledger

    async def up(self, key: str, chain_ids: Sequence[str], target: Path) -> None:
        self.ledger.take("rootfs.up", f"rootfs {key}")

    async def down(self, key: str, target: Path) -> None:
        self.ledger.give("rootfs.down", f"rootfs {key}")

    def usage(self, key: str) -> Usage:
        return Usage(bytes=4096, inodes=3)


def identity(pid: int) -> ProcessIdentity:
    return ProcessIdentity(pid=pid, start_time=1, boot_id="boot")
