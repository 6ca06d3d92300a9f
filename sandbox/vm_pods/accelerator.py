"""The choice of an accelerator: whether VMs can use the processor (KVM) or have to be emulated (TCG).

Which accelerators a hypervisor has, and in which order to prefer them, is known to its driver
(`vmm.Host.candidates`). That a device opens proves little, so `auto` boots the guest image with one
candidate after the other until an agent answers, once per boot of the host, version of the hypervisor and
guest image; the choice is cached in a file.

    CACHE_DIR/accelerator-NAME.json   the choice for driver NAME and what it depends on;
                                      .lock: held while probing
    CACHE_DIR/probe-NAME/             the trial's VM; a killed daemon's is taken down first
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sandbox.errors import PhaseFailed, SandboxError, VmmError
from sandbox.host import files, unix_sockets
from sandbox.host.proc import boot_id
from sandbox.lifecycle import bring_up, take_down
from sandbox.vm_pods.boot_image import GuestImage
from sandbox.vm_pods.scratch import Booted, RunDir, ScratchVm
from sandbox.vmm import Candidate, Host, Hypervisor, Machine, VmSpec

# A guest that runs at all prints within milliseconds; one that has printed may take long to boot (inside
# an emulated machine KVM is slow, and usable).
SILENCE_S = 2.5
BOOT_S = 30.0
MEMORY_MIB = 256
REASON_MAX = 400  # characters of a failed trial's error


class AcceleratorChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What VMs run with, and why."""

    accelerator: str  # one of the hypervisor's, such as kvm or tcg
    reason: str
    options: dict[str, str] = {}  # for VmSpec.options


class _Cached(msgspec.Struct, frozen=True, kw_only=True):
    """A choice and what it depends on; if any of that changes, the choice is void."""

    boot_id: str
    version: str
    image: str
    choice: AcceleratorChoice


@dataclass(frozen=True, slots=True)
class Prober:
    """Chooses accelerators for the VMs of one driver."""

    name: str  # of the driver
    host: Host
    hypervisor: Hypervisor
    cache_dir: Path

    async def choose(self, accelerator: str, image: GuestImage) -> AcceleratorChoice:
        """Return the choice for a handler's `accelerator`: "auto", or one that is taken at its word.

        A trial that fails is not an error: the last candidate is chosen without one. Raises MissingProgram
        and VmmError when the hypervisor cannot be asked for its version.
        """
        if accelerator != "auto":
            return AcceleratorChoice(accelerator=accelerator, reason="configured")
        first = self.host.candidates()[0]
        if not first.trial:
            return _untried(first, "")
        cache = self.cache_dir / f"accelerator-{self.name}.json"
        facts = (boot_id(), await self.host.version(), image.hash)
        # `husk doctor` may probe while the daemon does: one waits for the lock and reads the other's choice
        lock = await asyncio.to_thread(_lock, cache.with_suffix(".lock"))
        try:
            cached = await asyncio.to_thread(_read, cache)
            if cached is not None and (cached.boot_id, cached.version, cached.image) == facts:
                return cached.choice
            choice = await self.probe(image)
            fresh = _Cached(boot_id=facts[0], version=facts[1], image=facts[2], choice=choice)
            await asyncio.to_thread(files.write_json, cache, fresh)
            return choice
        finally:
            os.close(lock)

    async def probe(self, image: GuestImage) -> AcceleratorChoice:
        """Boot the image with each candidate in turn until an agent answers."""
        reason = ""
        for candidate in self.host.candidates():
            if not candidate.trial:
                return _untried(candidate, reason)
            began = time.monotonic()
            try:
                await self._boot(image, candidate)
            except (SandboxError, OSError) as error:
                reason = _summary(error)
                continue
            elapsed = time.monotonic() - began
            return AcceleratorChoice(
                accelerator=candidate.accelerator,
                reason=f"a guest booted under {_describe(candidate)} in {elapsed:.1f} s",
                options=dict(candidate.options),
            )
        raise VmmError(f"no accelerator of {self.name} runs a guest: {reason}")

    async def _boot(self, image: GuestImage, candidate: Candidate) -> None:
        """Raises PhaseFailed when no agent answers. Nothing is left of the VM."""
        vm = ScratchVm("probe", self.cache_dir / f"probe-{self.name}")
        spec = VmSpec(
            hypervisor=self.name,
            pod_id=vm.id,
            run_dir=str(vm.run_dir),
            kernel=str(image.kernel),
            initramfs=str(image.initramfs),
            kernel_args=("loglevel=7", "earlyprintk=serial"),
            accelerator=candidate.accelerator,
            options=candidate.options,
            memory_mib=MEMORY_MIB,
            vcpus=1,
        )
        steps = (RunDir(), Booted(self.hypervisor, spec, _wait_for_agent))
        await take_down(steps, vm)
        try:
            await bring_up(steps, vm)
        finally:
            await take_down(steps, vm)


def _untried(candidate: Candidate, reason: str) -> AcceleratorChoice:
    text = f"{candidate.reason}: {reason}" if reason else candidate.reason
    return AcceleratorChoice(accelerator=candidate.accelerator, reason=text, options=dict(candidate.options))


def _describe(candidate: Candidate) -> str:
    options: Mapping[str, str] = candidate.options
    words = [f"{name} {value}" for name, value in options.items()]
    return " with ".join([candidate.accelerator.upper(), *words])


def _summary(error: Exception) -> str:
    """The reason alone, on one line."""
    text = error.reason if isinstance(error, PhaseFailed) else str(error)
    return " ".join(text.split())[-REASON_MAX:]


# ------------------------------------------------------------------------------------ the trial


async def _wait_for_agent(machine: Machine) -> None:
    """Raises VmmError when the agent does not answer in time, or the VM exits."""
    scheme, _, address = machine.handle.channel.partition(":")
    if scheme not in ("serial", "unix"):
        raise VmmError(f"a trial needs a channel that is a socket, not {machine.handle.channel}")
    with unix_sockets.connect(Path(address)) as connection:
        answer = asyncio.create_task(_greet(connection))
        exited = asyncio.create_task(machine.wait())
        try:
            await asyncio.wait({answer, exited}, timeout=SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and not exited.done() and machine.console_tail():
                await asyncio.wait({answer, exited}, timeout=BOOT_S, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if exited.done():
                raise VmmError(exited.result())
            if machine.console_tail():
                raise VmmError(f"its agent did not answer within {SILENCE_S + BOOT_S:g} s")
            raise VmmError(f"the VM was created, but ran no guest code within {SILENCE_S:g} s")
        finally:
            for task in (answer, exited):
                task.cancel()
            await asyncio.gather(answer, exited, return_exceptions=True)


async def _greet(connection: socket.socket) -> None:
    """Send the guest channel's preamble (see guest/frames): token and nonce. The agent echoes the nonce."""
    loop = asyncio.get_running_loop()
    nonce = secrets.token_bytes(16)
    await loop.sock_sendall(connection, secrets.token_bytes(16) + nonce)
    received = b""
    while nonce not in received:
        chunk = await loop.sock_recv(connection, 4096)
        if not chunk:
            raise VmmError("the guest channel was closed")
        received = received[-64:] + chunk


# ------------------------------------------------------------------------------------ the cache


def _lock(path: Path) -> int:
    """Blocks while another process probes, which is bounded; the kernel releases it when its owner exits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _read(cache: Path) -> _Cached | None:
    try:
        return msgspec.json.decode(cache.read_bytes(), type=_Cached)
    except (OSError, msgspec.DecodeError):
        return None  # missing or unreadable: probe again
