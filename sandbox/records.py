"""What is remembered of pods and containers, on disk and in memory.

    pod:        [WAITING ──>] STARTING ──> READY ──> NOT_READY   (a failed start is undone and forgotten)
    container:  CREATING ──> CREATED ──> RUNNING ──> EXITED
                                             └────> UNKNOWN ──> EXITED (255, after StopContainer)

WAITING is a pod of the pool, whose VM runs before anybody has asked for it: its spec names nothing but
the handler. It, STARTING and CREATING are never shown to a client: it has not been told the id yet.

A record is written before the effect that it announces: `steps` names each acquisition begun, so
whatever the daemon was doing when it was killed, the next start knows what to undo.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import msgspec

from image.rootfs import Rootfs
from network.attach import Attachment
from sandbox.host.process import ProcessIdentity
from sandbox.spec import (
    ContainerId,
    ContainerSpec,
    ImageDefaults,
    Isolation,
    PodId,
    PodSpec,
    Resources,
    Value,
    VmSize,
)
from sandbox.vmm import VmHandle

VERSION = 2  # of both kinds of records; see `migrations`


class PodState(StrEnum):
    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    NOT_READY = "not-ready"


class Side(StrEnum):
    HOST = "host"
    GUEST = "guest"


class Source(StrEnum):
    """Where a pod's VM came from."""

    BOOT = "boot"
    TEMPLATE = "template"
    POOL = "pool"


class Phase(Value, frozen=True, kw_only=True):
    """A stretch of the start, for the waterfall; seconds since RunPodSandbox began."""

    name: str
    begin_s: float
    end_s: float
    side: Side = Side.HOST  # whose doing it is, and whose clock told it


class VmRuntime(Value, frozen=True, kw_only=True, tag="vm", forbid_unknown_fields=True):
    """What a pod in a micro-VM runs in."""

    size: VmSize | None = None  # requested and, once the VM runs, given
    source: Source = Source.BOOT
    accelerator: str = ""
    options: Mapping[str, str] = {}  # of the hypervisor's driver, which the accelerator needs
    handle: VmHandle | None = None  # None: the VM was not started yet
    token: bytes = b""  # resync token of the guest channel, 16 bytes
    epoch: int = 0  # of the last connection to the agent; each has a higher one
    guest_kernel: str = ""


class ProcessRuntime(Value, frozen=True, kw_only=True, tag="process", forbid_unknown_fields=True):
    """What a pod without a VM runs in: namespaces, held by its first process."""

    holder: ProcessIdentity | None = None  # started by the daemon; its end is the pod's
    init: ProcessIdentity | None = None  # whose namespaces the containers share; may be the holder itself


def _version() -> int:
    """A factory, as a plain default would not be written to the file (omit_defaults)."""
    return VERSION


class PodRecord(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that is known of a pod."""

    version: int = msgspec.field(default_factory=_version)
    id: PodId
    spec: PodSpec
    created_at_ns: int
    state: PodState = PodState.STARTING
    steps: tuple[str, ...] = ()  # begun, in order
    runtime: VmRuntime | ProcessRuntime = VmRuntime()
    resources: Resources = Resources()  # in force, of all containers together
    overhead: Resources = Resources()  # what the pod's sandbox is reckoned to cost beyond these
    network: Attachment | None = None
    phases: tuple[Phase, ...] = ()
    problem: str = ""  # why it is NOT_READY, when nobody asked for it

    @property
    def ready(self) -> bool:
        return self.state is PodState.READY

    @property
    def isolation(self) -> Isolation:
        return Isolation.VM if isinstance(self.runtime, VmRuntime) else Isolation.PROCESS

    @property
    def vm_handle(self) -> VmHandle | None:
        """Its VM; None for a pod without one, or before it was started."""
        return self.runtime.handle if isinstance(self.runtime, VmRuntime) else None


class ContainerState(StrEnum):
    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"
    UNKNOWN = "unknown"


class User(Value, frozen=True, kw_only=True):
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()


class LogPosition(Value, frozen=True, kw_only=True):
    """Which byte of the guest's log stream the file begins with: written = base + file size.

    `inode` tells the file apart from one that took its name; `next_base` is set while a reopen is
    under way and is the base of the file that it makes.
    """

    base: int = 0
    inode: int = 0
    next_base: int | None = None


class ImageVolume(Value, frozen=True, kw_only=True):
    """An image that is the source of a mount, as it was found when the container was created."""

    mount: int  # which of the specification's
    image_id: str
    chain_ids: tuple[str, ...]


class Propagated(Value, frozen=True, kw_only=True):
    """A mount of the container's that is shown on the host (see `propagation`)."""

    path: str
    mount_id: int = 0  # 0: about to be made
    below: int = 0  # the mount that was on top there before


class HostProcess(Value, frozen=True, kw_only=True):
    """A container that runs as processes of the host."""

    supervisor: ProcessIdentity  # conmon
    init: ProcessIdentity | None = None  # the container's first; None: conmon is making it


class ContainerRecord(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that is known of a container."""

    version: int = msgspec.field(default_factory=_version)
    id: ContainerId
    pod_id: PodId
    spec: ContainerSpec
    created_at_ns: int
    image_id: str  # "sha256:..." of the image's configuration
    image_ref: str
    chain_ids: tuple[str, ...] = ()  # of its root filesystem, kept from collection
    image_volumes: tuple[ImageVolume, ...] = ()
    rootfs: Rootfs | None = None  # None: not made yet
    defaults: ImageDefaults
    state: ContainerState = ContainerState.CREATING
    steps: tuple[str, ...] = ()
    started_at_ns: int = 0
    finished_at_ns: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    user: User = User()
    resources: Resources = Resources()  # in force
    stop_signal: str = "SIGTERM"
    log_path: str = ""  # absolute on the host
    log: LogPosition = LogPosition()
    propagated: tuple[Propagated, ...] = ()
    process: HostProcess | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """All that it stands on: chain ids."""
        return (*self.chain_ids, *(chain for volume in self.image_volumes for chain in volume.chain_ids))
