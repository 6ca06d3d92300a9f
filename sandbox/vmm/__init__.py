"""The seam to hypervisors: one folder per driver, found by its name (see `drivers`).

What is requested (`VmSpec`) and what runs (`VmHandle`, `Machine`) are different types. `start` runs a
`VmSpec`; `attach` returns the object to work with, for a VM that was just started as for one that an
earlier daemon started, so recovery is exercised by every start.

Every name that a driver uses on the host derives from `run_dir` and the pod id, so `destroy` works
after a crash at any point, without a handle.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from sandbox.errors import VmmError
from sandbox.host.findings import HostCheck
from sandbox.host.process import ProcessIdentity
from sandbox.spec import Value


class Feature(StrEnum):
    """What a driver may be unable to do. Without it the verb, or a VmSpec that asks for it, is refused with
    Unsupported. The bounds max_memory_mib, max_vcpus and max_nics ask for nothing yet."""

    PAUSE = "pause"  # Machine.pause, Machine.resume
    GROW = "grow"  # Machine.grow
    PLUG_NIC = "plug-nic"  # Machine.plug_nic
    SAVE = "save"  # Machine.save; VmSpec.savable, VmSpec.template
    DISKS = "disks"  # VmSpec.disks


class Unsupported(VmmError):
    """The driver lacks a feature. Retrying is useless."""

    def __init__(self, hypervisor: str, feature: Feature) -> None:
        super().__init__(f"hypervisor {hypervisor!r} does not support {feature.value!r}")
        self.hypervisor = hypervisor
        self.feature = feature


# --------------------------------------------------------------------------------------- values


class ShareSpec(Value, frozen=True, kw_only=True):
    """A directory of the host that the guest mounts under `tag`."""

    tag: str
    source: str
    cache: str  # "always" (only the guest writes) or "auto" (the host may change it, mounts included)


class NicSpec(Value, frozen=True, kw_only=True):
    """A network interface of the guest, whose packets go through a tap of the host."""

    mac: str
    mtu: int = 0  # reported to the guest as the maximum; 0: the guest decides


class DiskSpec(Value, frozen=True, kw_only=True):
    """A disk of the guest: a regular file or a block device of the host. The driver only opens it."""

    path: str
    serial: str  # what the guest finds it by; letters, digits and -_., at most 20 (virtio-blk's limit)
    readonly: bool = False
    format: str = "raw"  # the only one: other formats name further files, and the guest may write them


class VmSpec(Value, frozen=True, kw_only=True):
    """Everything that decides how a VM is run: plain values, no descriptors or running objects."""

    hypervisor: str = ""  # name of the driver
    pod_id: str
    run_dir: str  # the pod's own directory for sockets; exists, 0700, owned by root
    kernel: str
    initramfs: str
    kernel_args: tuple[str, ...] = ()
    accelerator: str  # one of the driver's, see Host.candidates; never "auto"
    options: Mapping[str, str] = {}  # the driver's own, checked by Host.check
    memory_mib: int
    vcpus: int
    max_memory_mib: int = 0  # upper bound of `Machine.grow`; 0: no growth
    max_vcpus: int = 0  # likewise
    max_nics: int = 0  # interfaces in all, with those that `Machine.plug_nic` adds; 0: no more than `nics`
    savable: bool = False  # a VM to be saved as a template: its RAM is a file in `run_dir`
    template: str = ""  # directory of a saved VM to restore; empty: boot
    shares: tuple[ShareSpec, ...] = ()
    nics: tuple[NicSpec, ...] = ()
    disks: tuple[DiskSpec, ...] = ()  # present from boot, in this order
    netns: str = ""  # path of the network namespace that the VMM runs in; empty: the daemon's
    cgroups: tuple[str, ...] = ()  # cgroup directories joined before exec


class VmHandle(Value, frozen=True, kw_only=True):
    """A VM that was started: stored in the pod's record, enough to attach to it again."""

    hypervisor: str
    spec: VmSpec
    vmm: ProcessIdentity
    helpers: Mapping[str, ProcessIdentity]  # by the driver's own names, such as a share's tag
    channel: str  # transport address of the agent: "serial:PATH", "vsock:CID:PORT", "unix:PATH"


class Candidate(Value, frozen=True, kw_only=True):
    """A way to run VMs on this host, which `auto` may choose."""

    accelerator: str
    options: Mapping[str, str] = {}  # added to VmSpec.options
    reason: str = ""  # why this one, if it is chosen without a trial
    trial: bool = True  # a guest has to boot with it before it is believed to work


# ------------------------------------------------------------------------------------ a running VM


class RunningVm(Protocol):
    """What every driver's VM can do."""

    handle: VmHandle

    async def wait(self) -> str:
        """Return the reason, as far as it is known, once the VMM or a helper of it has exited.

        Without a helper the guest hangs, and is of no use; what is left runs on until `Hypervisor.destroy`.
        """

    def console_tail(self) -> str:
        """Return the last lines that the guest printed (at most 64 KiB are kept), for error messages."""

    async def describe(self) -> Mapping[str, str]:
        """Return facts for `crictl inspectp`: at least `state`, `accelerator`, `pid`. Never raises for a
        VM that has ended: `state` begins with "unknown" then."""

    async def close(self) -> None:
        """Release the connection to the VM, which runs on. Idempotent."""


class Pausable(Protocol):
    """A VM whose CPUs can be stopped."""

    handle: VmHandle

    async def pause(self) -> None:
        """Stop the guest's CPUs and clocks. Idempotent. Raises VmmError, VmmGone, DeadlineExceeded."""
        raise Unsupported(self.handle.hypervisor, Feature.PAUSE)

    async def resume(self) -> None:
        """Start the guest's CPUs again. Idempotent. Raises as `pause` does."""
        raise Unsupported(self.handle.hypervisor, Feature.PAUSE)


class Growable(Protocol):
    """A VM to which CPUs, memory and devices can be added while it runs."""

    handle: VmHandle

    async def grow(self, memory_mib: int, vcpus: int) -> None:
        """Give the guest at least this much; nothing is ever removed. Idempotent.

        Memory is usable on return; CPUs are plugged in, and the guest has to bring them online. Raises
        VmmError beyond what VmSpec allows, or when the guest does not accept it in time.
        """
        raise Unsupported(self.handle.hypervisor, Feature.GROW)

    async def plug_nic(self, number: int, nic: NicSpec, tap: int) -> None:
        """Add network interface `number`, from 1 on and below VmSpec.max_nics; interfaces of VmSpec.nics
        come first. The caller keeps the descriptor `tap`. Raises VmmError."""
        raise Unsupported(self.handle.hypervisor, Feature.PLUG_NIC)


class Savable(Protocol):
    """A VM that a template can be made of."""

    handle: VmHandle

    async def save(self, directory: Path) -> None:
        """Write this VM, which was started `savable`, to the new `directory`, and leave it stopped for good.

        Raises VmmError, OSError; parts of the directory may exist then.
        """
        raise Unsupported(self.handle.hypervisor, Feature.SAVE)


class Machine(RunningVm, Pausable, Growable, Savable, Protocol):
    """A running VM, with every verb. A driver that derives from it overrides what it supports; the rest
    raises Unsupported."""


# ---------------------------------------------------------------------------------------- drivers


class Hypervisor(Protocol):
    """Starts and ends VMs. Implemented by each driver, and by `drivers.Hypervisors` over all of them."""

    def features(self, spec: VmSpec) -> Collection[Feature]:
        """Return what such a VM supports. Raises InvalidSpec for an unknown driver."""

    async def fingerprint(self, spec: VmSpec) -> str:
        """Return a hash of all that a template of such a VM depends on: program, kernel, arguments.

        Two specs that differ only in names and paths have the same. Raises MissingProgram, InvalidSpec.
        """

    async def start(self, spec: VmSpec, taps: tuple[int, ...]) -> Machine:
        """Start the helpers and the VMM with these tap descriptors, one per NIC.

        Closes no descriptor of the caller's. After a failure, nothing of what was started is left.
        Raises InvalidSpec, Unsupported, MissingProgram, and VmmError with the phase and the VMM's output.
        """

    async def attach(self, handle: VmHandle) -> Machine:
        """Connect to a running VM. Raises VmmGone when it has ended, HelperGone when a helper has, of which
        nothing is left on the host: a record can be wrong about a helper of a VM that is in order."""

    async def destroy(self, pod_id: str, run_dir: Path) -> None:
        """End every process of this pod's VM, found by name alone. Idempotent. Raises DeadlineExceeded."""


class Host(Protocol):
    """What a driver needs of the machine that it runs on."""

    def check(self, accelerator: str, options: Mapping[str, str]) -> None:
        """Check what a handler is configured with; `accelerator` may be "auto".

        Raises InvalidSpec, whose field is "accelerator" or "options.NAME".
        """

    async def version(self) -> str:
        """Return the version of the program that runs VMs. Raises MissingProgram, VmmError."""

    def candidates(self) -> Sequence[Candidate]:
        """Return the accelerators to try, the best first. The last one needs no trial."""

    def checks(self) -> Sequence[HostCheck]:
        """Return what `husk doctor` examines for this driver."""
