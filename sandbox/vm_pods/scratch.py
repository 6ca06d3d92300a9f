"""VMs without a record: the trial of an accelerator, and the VM that a template is made of.

A scratch VM is brought up and taken down by steps, as a pod is (see `lifecycle`). In place of a record it
has a fixed id and directory: before the next one of that id is brought up, what a crash left is taken down.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from network.attach import Networks
from sandbox.host.cgroup import Cgroups
from sandbox.vmm import Hypervisor, Machine, VmSpec


class ScratchVm:
    """The subject of the steps below: see `lifecycle.Subject`."""

    def __init__(self, kind: str, run_dir: Path) -> None:
        self.run_dir = run_dir
        # processes are found by this id, and other daemons of the host, with other directories, have theirs
        self.id = f"{kind}-{hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:16]}"
        self.tap: int | None = None
        self.machine: Machine | None = None

    def begin(self, names: Sequence[str]) -> None:
        """Not saved: the next use takes down all steps."""

    def finish(self, name: str, begin_s: float, end_s: float) -> None:
        """Not recorded: how long its steps took is not shown anywhere."""

    def ended(self, names: Collection[str]) -> None:
        """Nothing was saved."""

    def console(self) -> str:
        """See Subject."""
        return self.machine.console_tail() if self.machine is not None else ""

    def close_tap(self) -> None:
        """Close the tap's descriptor once the VMM has inherited it. Idempotent."""
        if self.tap is not None:
            os.close(self.tap)
            self.tap = None


@dataclass(frozen=True, slots=True)
class RunDir:
    """The directory of its sockets."""

    name = "run-dir"

    async def up(self, vm: ScratchVm) -> None:
        """See Step."""
        await asyncio.to_thread(vm.run_dir.mkdir, mode=0o700, parents=True)

    async def down(self, vm: ScratchVm) -> None:
        """See Step."""
        with contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread(shutil.rmtree, vm.run_dir)


@dataclass(frozen=True, slots=True)
class WaitingCgroup:
    """A cgroup beside those of pooled VMs, with the least CPU weight."""

    cgroups: Cgroups
    name = "cgroup"

    async def up(self, vm: ScratchVm) -> None:
        """See Step."""
        await asyncio.to_thread(self.cgroups.create_pooled, vm.id)

    async def down(self, vm: ScratchVm) -> None:
        """See Step."""
        await asyncio.to_thread(self.cgroups.remove, vm.id, self.cgroups.pool_parent)


@dataclass(frozen=True, slots=True)
class Netns:
    """A network namespace and the tap of the first interface."""

    networks: Networks
    name = "netns"

    async def up(self, vm: ScratchVm) -> None:
        """See Step."""
        vm.tap = await self.networks.prepare(vm.id)

    async def down(self, vm: ScratchVm) -> None:
        """See Step."""
        vm.close_tap()
        await self.networks.down(vm.id)


@dataclass(frozen=True, slots=True)
class Booted:
    """A VM that has booted until `ready` returns, which raises when its guest is unusable."""

    hypervisor: Hypervisor
    spec: VmSpec | None  # None: only to take it down
    ready: Callable[[Machine], Awaitable[None]]
    name = "vm"

    async def up(self, vm: ScratchVm) -> None:
        """See Step."""
        assert self.spec is not None
        taps = () if vm.tap is None else (vm.tap,)
        vm.machine = await self.hypervisor.start(self.spec, taps)
        vm.close_tap()
        await self.ready(vm.machine)

    async def down(self, vm: ScratchVm) -> None:
        """See Step."""
        machine, vm.machine = vm.machine, None
        if machine is not None:
            await machine.close()
        await self.hypervisor.destroy(vm.id, vm.run_dir)
