"""The seam to a hypervisor: one file in this folder per hypervisor, found by its name.

A wish (`VmSpec`) and a thing that runs (`VmHandle`, `Machine`) are different types. `plan` is pure
and golden-tested; `start` runs it; `attach` gives the object to work with, for a VM that was just
started as much as for one that an earlier daemon left, so the way of recovery is always exercised.

Every name derives from `run_dir` and the pod id, so `destroy` works after a crash at any point,
with no handle at all.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

from sandbox.errors import InvalidSpec
from sandbox.host.process import ProcessIdentity
from sandbox.spec import Value


class ShareSpec(Value, frozen=True, kw_only=True):
    """A directory of the host that the guest mounts under `tag`, through a virtiofsd of its own."""

    tag: str
    source: str
    cache: str  # "always" (only the guest writes) or "auto" (the host may change it, mounts included)


class NicSpec(Value, frozen=True, kw_only=True):
    mac: str
    mtu: int = 0  # told to the guest as the most that fits; 0: the guest decides


class VmSpec(Value, frozen=True, kw_only=True):
    """Everything that decides how a VM is run; no file descriptors, no running things."""

    pod_id: str
    run_dir: str  # the pod's own directory for sockets; exists, 0711, owned by root
    kernel: str
    initramfs: str
    kernel_args: tuple[str, ...] = ()
    machine: str
    accelerator: str  # kvm or tcg: decided by now
    cpu: str = ""  # CPU model in the VMM's words; empty: what suits the accelerator
    memory_mib: int
    vcpus: int
    max_memory_mib: int = 0  # up to which `Machine.grow` may go; 0: not at all
    max_vcpus: int = 0
    ports: int = 0  # PCI slots kept free for what is plugged in while it runs
    savable: bool = False  # a VM to be saved as a template: its RAM is a file in `run_dir`
    template: str = ""  # directory of a saved VM to continue, instead of booting
    shares: tuple[ShareSpec, ...] = ()
    nics: tuple[NicSpec, ...] = ()
    netns: str = ""  # path of the namespace that the VMM runs in; empty: the daemon's
    cgroups: tuple[str, ...] = ()  # cgroup directories joined before exec


class VmHandle(Value, frozen=True, kw_only=True):
    """A VM that was started: stored in the pod's record, enough to attach to it again."""

    hypervisor: str
    spec: VmSpec
    vmm: ProcessIdentity
    helpers: Mapping[str, ProcessIdentity]  # virtiofsd by share tag
    channel: str  # transport address of the agent: "serial:PATH", "vsock:CID:PORT"


class Machine(Protocol):
    """A running VM. Closing it lets go of the VM without touching it.

    More methods than a seam should have: these are the verbs of a VM, and every one is used alone.
    """

    handle: VmHandle

    async def wait(self) -> str:
        """Return once the VMM is gone, with the reason as far as it is known."""

    async def pause(self) -> None:
        """Stop the guest's CPUs and clocks. Raises VmmError, VmmGone, DeadlineExceeded."""

    async def resume(self) -> None:
        """Let it run on. Raises as `pause` does."""

    async def grow(self, memory_mib: int, vcpus: int) -> None:
        """Give the guest at least this much; what it has is never taken away.

        Memory is there when this returns; CPUs are plugged and wait for the guest to bring them
        online. Raises VmmError above what VmSpec allows, or when the guest does not take it in time.
        """

    async def plug_nic(self, number: int, nic: NicSpec, tap: int) -> None:
        """One more network interface, on the port with this number; the caller keeps `tap`."""

    async def save(self, directory: Path) -> None:
        """Make a template of this VM, in a new `directory`, and leave it stopped for good.

        Only of one that was started `savable`. Raises VmmError, OSError; the directory may then be
        there in part.
        """

    def console_tail(self) -> str:
        """The last lines that the guest printed (at most 64 KiB are kept), for error messages."""

    async def describe(self) -> Mapping[str, str]:
        """Facts for `crictl inspectp`: VMM state, version, pids, memory."""

    async def close(self) -> None: ...


class Hypervisor(Protocol):
    name: str

    async def fingerprint(self, spec: VmSpec) -> str:
        """What a template of such a VM depends on: program, kernel, arguments, and nothing else.

        Two specs that differ only in names and places have the same. Raises MissingProgram.
        """

    async def start(self, spec: VmSpec, taps: tuple[int, ...]) -> Machine:
        """Start the helpers and the VMM with these tap file descriptors, one per NIC.

        Closes nothing that the caller gave. On failure everything started is ended again.
        Raises VmmError with the phase and what the VMM said.
        """

    async def attach(self, handle: VmHandle) -> Machine:
        """Connect to a running VM. Raises VmmGone when it no longer runs."""

    async def destroy(self, spec_pod_id: str, run_dir: Path) -> None:
        """End whatever runs for this pod, found by name alone. Idempotent."""


def find_hypervisors() -> list[str]:
    """Names of the files in this folder that hold a hypervisor: those with a function `make`."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in names if hasattr(importlib.import_module(f"{__name__}.{name}"), "make")]


def find_hypervisor(name: str) -> Hypervisor:
    """Raises InvalidSpec for a name without a file."""
    known = find_hypervisors()
    if name not in known:
        raise InvalidSpec("hypervisor", f"{name!r} is not known", ", ".join(known))
    return cast(Hypervisor, importlib.import_module(f"{__name__}.{name}").make())
