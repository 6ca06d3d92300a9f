"""Templates: saved VMs that pods' VMs are restored from, one for each kind of VM (see `vmm`, Machine.save).

    DIRECTORY/KEY/         a template, complete as soon as it has this name; KEY is its fingerprint
    DIRECTORY/building/    the VM that the next one is made of

A template is saved before any pod has used it: it holds no secrets, names or addresses, and its agent has
forgotten the token with which it was greeted. The key covers everything that it depends on (VMM, kernel,
initramfs, arguments), so a stale template is not found, and there is at most one current one of a kind.

Crash story: a template under construction is taken down at the next start, found by name. A template that
could not be restored is deleted at once.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
import time
from collections.abc import Collection
from pathlib import Path

import msgspec

from network.attach import Networks
from sandbox.guest.client import GuestClient
from sandbox.host.cgroup import Cgroups
from sandbox.lifecycle import Steps, bring_up, take_down
from sandbox.vm_pods.clock_sync import check_clock
from sandbox.vm_pods.scratch import Booted, Netns, RunDir, ScratchVm, WaitingCgroup
from sandbox.vmm import Hypervisor, Machine, VmSpec

log = logging.getLogger(__name__)

BOOT_TIMEOUT_S = 120.0


class Templates:
    """The templates of one directory. Only one daemon may use it."""

    def __init__(self, directory: Path, hypervisor: Hypervisor, networks: Networks, cgroups: Cgroups) -> None:
        self._directory = directory
        self._hypervisor = hypervisor
        self._networks = networks
        self._cgroups = cgroups
        self._vm = ScratchVm("template", directory / "building")

    def find(self, key: str) -> Path | None:
        """Return the template with this fingerprint; None: there is none."""
        path = self._directory / key
        return path if key and path.is_dir() else None

    def discard(self, template: Path) -> None:
        """Delete a template that could not be restored. Blocks for some milliseconds. Idempotent."""
        doomed = template.with_name(f".{template.name}-{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):
            template.rename(doomed)
            shutil.rmtree(doomed)

    def keep_only(self, keys: Collection[str]) -> None:
        """Delete templates with other fingerprints, and parts of deleted ones. Blocks."""
        if not self._directory.exists():
            return
        for path in self._directory.iterdir():
            if path.name not in keys and path != self._vm.run_dir:
                shutil.rmtree(path, ignore_errors=True)

    async def clean(self) -> None:
        """Take down the VM of a template under construction. Idempotent. Raises UndoFailed."""
        await take_down(self._steps(None), self._vm)

    async def make(self, spec: VmSpec, key: str) -> Path:
        """Boot a VM, save it under `key`, and take it down, whatever happens. One at a time.

        Raises PhaseFailed, MissingProgram, InvalidSpec; VmmError, DeadlineExceeded and OSError of the saving.
        """
        began = time.monotonic()
        await self.clean()
        try:
            await bring_up(self._steps(spec), self._vm)
            assert self._vm.machine is not None
            saved = self._vm.run_dir / "saved"
            await self._vm.machine.save(saved)
            saved.rename(self._directory / key)
        finally:
            await self.clean()
        log.info("template %s made in %.1f s", key, time.monotonic() - began)
        return self._directory / key

    def _steps(self, spec: VmSpec | None) -> Steps[ScratchVm]:
        return (
            RunDir(),
            WaitingCgroup(self._cgroups),
            Netns(self._networks),
            Booted(self._hypervisor, self._placed(spec) if spec else None, _check_guest),
        )

    def _placed(self, spec: VmSpec) -> VmSpec:
        return msgspec.structs.replace(
            spec,
            pod_id=self._vm.id,
            run_dir=str(self._vm.run_dir),
            netns=str(self._networks.netns_of(self._vm.id)),
            cgroups=self._cgroups.directories(self._vm.id, self._cgroups.pool_parent),
            savable=True,
        )


async def _check_guest(machine: Machine) -> None:
    """Wait for the agent, and check its clock. Raises GuestUnreachable, VmmError."""
    client = await GuestClient.connect(
        machine.handle.channel,
        token=secrets.token_bytes(16),
        epoch=1,
        on_event=lambda event: None,
        timeout_s=BOOT_TIMEOUT_S,
        snapshot=True,
    )
    await client.close()
    check_clock(client, machine.handle.vmm)
