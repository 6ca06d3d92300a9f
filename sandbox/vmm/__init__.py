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
from sandbox.process import ProcessIdentity
from sandbox.spec import Value


class ShareSpec(Value, frozen=True, kw_only=True):
    """A directory of the host that the guest mounts under `tag`, through a virtiofsd of its own."""

    tag: str
    source: str
    cache: str  # "always" (only the guest writes) or "auto" (the host may change it)


class NicSpec(Value, frozen=True, kw_only=True):
    mac: str
    mtu: int = 1500


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
    """A running VM. Closing it lets go of the VM without touching it."""

    handle: VmHandle

    async def wait(self) -> str:
        """Return once the VMM is gone, with the reason as far as it is known."""

    async def kill(self) -> None:
        """End the VMM and its helpers, and wait for them. Idempotent."""

    def console_tail(self) -> str:
        """The last lines that the guest printed (at most 64 KiB are kept), for error messages."""

    async def describe(self) -> Mapping[str, str]:
        """Facts for `crictl inspectp`: VMM state, version, pids, memory."""

    async def close(self) -> None: ...


class Hypervisor(Protocol):
    name: str

    async def start(self, spec: VmSpec, taps: tuple[int, ...]) -> VmHandle:
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
