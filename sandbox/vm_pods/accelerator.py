"""Whether VMs can use the processor (KVM) or have to be emulated (TCG).

That /dev/kvm opens means little: on some hosts it creates a VM and then never runs a guest's 64-bit
code, or aborts over a register. So `auto` boots the guest image under KVM and waits for its agent,
once per boot of the host, version of QEMU and guest image; the answer is kept in a file.

    CACHE_DIR/accelerator.json   the answer and what it is valid for; .lock: held while probing
    CACHE_DIR/probe/             the probe's VM; what a killed daemon left there is ended first
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import socket
import time
from pathlib import Path

import msgspec

from sandbox.errors import SandboxError, VmmError
from sandbox.host import files, unix_sockets
from sandbox.host.proc import boot_id
from sandbox.vm_pods.boot_image import GuestImage
from sandbox.vmm import Hypervisor, Machine, VmSpec
from sandbox.vmm.qemu.host import find_program, find_version

# A guest that runs at all prints within milliseconds; one that does may take its time (an outer
# emulator makes KVM slow, not useless).
SILENCE_S = 2.5
BOOT_S = 30.0
# The second is for hosts where KVM shows a register that it then does not let QEMU set.
CPU_MODELS = ("", "host,-arch-capabilities")
MACHINE = "q35"
MEMORY_MIB = 256


class AcceleratorChoice(msgspec.Struct, frozen=True, kw_only=True):
    accelerator: str  # kvm or tcg
    reason: str
    cpu: str = ""  # for VmSpec.cpu


class _Known(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict and what it was found with; another value of any makes it void."""

    boot_id: str
    qemu: str
    image: str
    verdict: AcceleratorChoice


async def choose(
    wanted: str, image: GuestImage, hypervisor: Hypervisor, cache_dir: Path
) -> AcceleratorChoice:
    """`wanted` is auto, kvm or tcg; the latter two are taken at their word.

    Never raises for a KVM that does not work: that is an answer. Raises MissingProgram.
    """
    if wanted in ("kvm", "tcg"):
        return AcceleratorChoice(accelerator=wanted, reason="configured")
    if (obstacle := find_obstacle()) is not None:
        return AcceleratorChoice(accelerator="tcg", reason=obstacle)
    version = await find_version(find_program())
    cache = cache_dir / "accelerator.json"
    facts = (boot_id(), version, image.hash)
    # `husk doctor` may ask while the daemon does: one probe at a time, the other reads its answer.
    lock = await asyncio.to_thread(_lock, cache.with_suffix(".lock"))
    try:
        known = await asyncio.to_thread(_read, cache)
        if known is not None and (known.boot_id, known.qemu, known.image) == facts:
            return known.verdict
        verdict = await probe(image, cache_dir / "probe", hypervisor)
        found = _Known(boot_id=facts[0], qemu=facts[1], image=facts[2], verdict=verdict)
        await asyncio.to_thread(files.write_json, cache, found)
        return verdict
    finally:
        os.close(lock)


def find_obstacle(device: str = "/dev/kvm") -> str | None:
    """What rules KVM out without a VM, in words; None: it takes a probe."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"there is no {device}"
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    return None


async def probe(image: GuestImage, run_dir: Path, hypervisor: Hypervisor) -> AcceleratorChoice:
    """Boot the image under KVM until its agent answers, with one CPU model after the other."""
    reason = ""
    for cpu in CPU_MODELS:
        began = time.monotonic()
        try:
            await _boot(image, run_dir, hypervisor, cpu)
        except (SandboxError, OSError) as error:
            reason = " ".join(str(error).split())[-400:]
            continue
        elapsed = time.monotonic() - began
        model = f" with -cpu {cpu}" if cpu else ""
        return AcceleratorChoice(
            accelerator="kvm", reason=f"a guest booted under KVM{model} in {elapsed:.1f} s", cpu=cpu
        )
    return AcceleratorChoice(
        accelerator="tcg", reason=f"/dev/kvm opens, but no guest runs under it: {reason}"
    )


async def _boot(image: GuestImage, run_dir: Path, hypervisor: Hypervisor, cpu: str) -> None:
    """Raises VmmError and others when the agent does not answer."""
    pod_id = "probe-" + hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:16]
    await _clean(hypervisor, pod_id, run_dir)
    await asyncio.to_thread(run_dir.mkdir, mode=0o711, parents=True)
    spec = VmSpec(
        pod_id=pod_id,
        run_dir=str(run_dir),
        kernel=str(image.kernel),
        initramfs=str(image.initramfs),
        kernel_args=("loglevel=7", "earlyprintk=serial"),
        machine=MACHINE,
        accelerator="kvm",
        cpu=cpu,
        memory_mib=MEMORY_MIB,
        vcpus=1,
    )
    try:
        machine = await hypervisor.start(spec, ())
        try:
            await _until_agent(machine, run_dir / "agent.sock")
        finally:
            await machine.close()
    finally:
        await _clean(hypervisor, pod_id, run_dir)


async def _clean(hypervisor: Hypervisor, pod_id: str, run_dir: Path) -> None:
    await hypervisor.destroy(pod_id, run_dir)
    with contextlib.suppress(FileNotFoundError):
        await asyncio.to_thread(shutil.rmtree, run_dir)


async def _until_agent(machine: Machine, channel: Path) -> None:
    with unix_sockets.connect(channel) as connection:
        answer = asyncio.create_task(_greet(connection))
        death = asyncio.create_task(machine.wait())
        try:
            await asyncio.wait({answer, death}, timeout=SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and not death.done() and machine.console_tail():
                await asyncio.wait({answer, death}, timeout=BOOT_S, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if death.done():
                raise VmmError(death.result())
            if machine.console_tail():
                raise VmmError(f"its agent did not answer within {SILENCE_S + BOOT_S:g} s")
            raise VmmError(f"the VM was created, but ran no guest code within {SILENCE_S:g} s")
        finally:
            for task in (answer, death):
                task.cancel()
            await asyncio.gather(answer, death, return_exceptions=True)


async def _greet(connection: socket.socket) -> None:
    """The first words on the guest channel (see guest/frames): token, nonce; the nonce comes back."""
    loop = asyncio.get_running_loop()
    nonce = secrets.token_bytes(16)
    await loop.sock_sendall(connection, secrets.token_bytes(16) + nonce)
    heard = b""
    while nonce not in heard:
        chunk = await loop.sock_recv(connection, 4096)
        if not chunk:
            raise VmmError("the guest channel was closed")
        heard = heard[-64:] + chunk


def _lock(path: Path) -> int:
    """Blocks as long as another process probes, which is bounded; the kernel frees it with its owner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _read(cache: Path) -> _Known | None:
    try:
        return msgspec.json.decode(cache.read_bytes(), type=_Known)
    except (OSError, msgspec.DecodeError):
        return None  # no answer yet, or none that can be read: ask again
