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
from typing import Protocol, TypeAlias

from sandbox.errors import VmmError
from sandbox.host.findings import HostCheck
from sandbox.host.process import ProcessIdentity
from sandbox.spec import Value


class Feature(StrEnum):
    """What a driver may be unable to do. Without it the verb, or a VmSpec that asks for it, is refused with
    Unsupported. The bounds max_memory_mib, max_vcpus, max_nics and max_disks ask for nothing yet."""

    PAUSE = "pause"  # Machine.pause, Machine.resume
    GROW = "grow"  # Machine.grow
    PLUG = "plug"  # Machine.plug, Machine.unplug, Machine.resize_disk, Machine.add_share
    SAVE = "save"  # Machine.save; VmSpec.savable, VmSpec.template


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
    # "always" (only the guest writes), "auto" (the host may change it, mounts included) or "none" (each read
    # is the host's, whatever the file's size is)
    cache: str


class NicSpec(Value, frozen=True, kw_only=True):
    """A network interface of the guest, whose packets go through a tap of the host."""

    mac: str
    mtu: int = 0  # reported to the guest as the maximum; 0: the guest decides


class DiskSpec(Value, frozen=True, kw_only=True):
    """A disk of the guest: a block device of the host, or a regular file with the disk's content."""

    serial: str  # unique in the VM: what the guest finds it by; letters, digits and -_., at most 20
    readonly: bool = False


Device: TypeAlias = NicSpec | DiskSpec  # what can be plugged into a running VM


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
    max_nics: int = 0  # interfaces in all, with those that `Machine.plug` adds; 0: no more than `nics`
    max_disks: int = 0  # disks that `Machine.plug` adds
    savable: bool = False  # a VM to be saved as a template: its RAM is a file in `run_dir`
    template: str = ""  # directory of a saved VM to restore; empty: boot
    shares: tuple[ShareSpec, ...] = ()
    nics: tuple[NicSpec, ...] = ()
    netns: str = ""  # path of the network namespace that the VMM runs in; empty: the daemon's
    cgroups: tuple[str, ...] = ()  # cgroup directories joined before exec


class VmHandle(Value, frozen=True, kw_only=True):
    """A VM that was started: stored in the pod's record, enough to attach to it again."""

    hypervisor: str
    spec: VmSpec
    vmm: ProcessIdentity
    helpers: Mapping[str, ProcessIdentity]  # by the driver's own names, such as a share's tag
    channel: str  # transport address of the agent: "serial:PATH", "vsock:CID:PORT", "unix:PATH"


EMULATION = "tcg"  # the accelerator that executes a guest's instructions in software


class Candidate(Value, frozen=True, kw_only=True):
    """A way to run VMs on this host, which `auto` may choose."""

    accelerator: str
    options: Mapping[str, str] = {}  # added to VmSpec.options
    reason: str = ""  # why this one, if it is chosen without a trial
    trial: bool = True  # a guest has to boot with it before it is believed to work


# ------------------------------------------------------------------------------------ a running VM

DISK_FACT = "disk."  # begins the names of facts about disks, see RunningVm.describe


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
        """Return facts for `crictl inspectp`: at least `state`, `accelerator`, `pid`, and for each disk that
        uses a device of the host DISK_FACT followed by its serial number.

        Never raises for a VM that has ended: `state` begins with "unknown" then.
        """

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

    async def plug(self, device: Device, fd: int) -> None:
        """Add a device, whose other end is `fd`: a tap, or an open disk. The caller keeps the descriptor.

        A disk is opened for reading alone or for both, as its DiskSpec says; blocks and discards are as the
        host's device has them. After a failure, nothing of the device is left. Raises VmmError, also for
        more devices than VmSpec allows.
        """
        raise Unsupported(self.handle.hypervisor, Feature.PLUG)

    async def unplug(self, device: Device) -> None:
        """Remove a device, and close what it uses on the host. Idempotent, also for one that was never there.

        A guest that does not release it in time keeps a device that fails. Raises VmmError, VmmGone,
        DeadlineExceeded.
        """
        raise Unsupported(self.handle.hypervisor, Feature.PLUG)

    async def resize_disk(self, disk: DiskSpec, size: int) -> None:
        """Let the guest see that the host's device has this many bytes now. Raises VmmError."""
        raise Unsupported(self.handle.hypervisor, Feature.PLUG)

    async def add_share(self, share: ShareSpec) -> VmHandle:
        """Add a directory of the host that stays until the VM ends, and return the handle with it.

        The guest has to mount it. Idempotent, also for one that an earlier daemon added without saving the
        handle. After a failure, nothing of it is left. Raises VmmError, VmmGone, DeadlineExceeded.
        """
        raise Unsupported(self.handle.hypervisor, Feature.PLUG)


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
