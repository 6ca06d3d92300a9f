"""Saved VMs that pods' VMs continue from, one for each kind of VM: see `vmm`, Machine.save.

    DIRECTORY/KEY/         a template, complete since it has this name; KEY is its fingerprint
    DIRECTORY/building/    the VM that the next one is being made of

A template is saved before any pod has touched it: it has no secrets, names or addresses, and its
agent has forgotten the token by which it was greeted. The key covers all that it depends on (VMM,
kernel, initramfs, arguments), so a stale one is not found, and a kind has at most one that is.

Crash story: whatever was being built is cleaned away at the next start, found by name. A template
that could not be continued is deleted at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Collection
from pathlib import Path

import msgspec

from network.attach import Networks
from sandbox.guest.client import GuestClient
from sandbox.host.cgroup import Cgroups
from sandbox.vm_pods.clock_sync import check_clock
from sandbox.vmm import Hypervisor, VmSpec

log = logging.getLogger(__name__)

BOOT_TIMEOUT_S = 120.0


class Templates:
    def __init__(self, directory: Path, hypervisor: Hypervisor, networks: Networks, cgroups: Cgroups) -> None:
        self._directory = directory
        self._hypervisor = hypervisor
        self._networks = networks
        self._cgroups = cgroups
        # processes are found by their pod's name, and another daemon may build one, too
        self._id = "template-" + hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]

    def find(self, key: str) -> Path | None:
        path = self._directory / key
        return path if key and path.is_dir() else None

    def discard(self, template: Path) -> None:
        """It could not be continued: nobody else shall try. Blocks a little. Absent is fine."""
        grave = template.with_name(f".{template.name}-{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):
            template.rename(grave)
            shutil.rmtree(grave)

    def keep_only(self, keys: Collection[str]) -> None:
        """Delete templates of other kinds, and what a crash left of others. Blocks a little."""
        if not self._directory.exists():
            return
        for path in self._directory.iterdir():
            if path.name not in keys and path != self._building:
                shutil.rmtree(path, ignore_errors=True)

    @property
    def _building(self) -> Path:
        return self._directory / "building"

    async def clean(self) -> None:
        """End and remove what a daemon that was killed was building. Raises SandboxError, OSError."""
        await self._hypervisor.destroy(self._id, self._building)
        await self._networks.down(self._id)
        await asyncio.to_thread(self._cgroups.remove, self._id, self._cgroups.waiting)
        if self._building.exists():
            await asyncio.to_thread(shutil.rmtree, self._building)

    async def make(self, spec: VmSpec, key: str) -> Path:
        """Boot a VM, save it under `key`, and end it; whatever happens, the VM is gone in the end.

        One at a time. Raises VmmError, GuestUnreachable, DeadlineExceeded, NetworkError, OSError.
        """
        began = time.monotonic()
        await self.clean()
        try:
            await asyncio.to_thread(self._building.mkdir, mode=0o711, parents=True)
            await asyncio.to_thread(self._cgroups.create_waiting, self._id)
            saved = await self._boot_and_save(spec)
            saved.rename(self._directory / key)
        finally:
            await self.clean()
        log.info("template %s made in %.1f s", key, time.monotonic() - began)
        return self._directory / key

    async def _boot_and_save(self, spec: VmSpec) -> Path:
        tap = await self._networks.prepare(self._id)
        try:
            own = msgspec.structs.replace(
                spec,
                pod_id=self._id,
                run_dir=str(self._building),
                netns=str(self._networks.netns_of(self._id)),
                cgroups=self._cgroups.directories(self._id, self._cgroups.waiting),
                savable=True,
            )
            machine = await self._hypervisor.start(own, (tap,))
        finally:
            os.close(tap)
        try:
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
            saved = self._building / "saved"
            await machine.save(saved)
        finally:
            await machine.close()
        return saved
