"""The records of pods and containers, on disk (see `store`) and in memory, and their states.

    pod:        [WAITING ──>] STARTING ──> READY ──> NOT_READY   (a failed start is undone and forgotten)
    container:  CREATING ──> CREATED ──> RUNNING ──> EXITED
                                             └────> UNKNOWN ──> EXITED (255, after StopContainer)

WAITING is a pod of the pool: its VM runs, and its spec names the handler alone. Clients never see it, nor a
pod that is STARTING or a container that is CREATING: they do not have the id yet.

A record is written before the effect that it announces: `steps` names every acquisition that may have begun,
so whatever the daemon was doing when it was killed, the next one knows what to release.

A released field keeps its name and meaning. A new one needs a default, and unknown ones are refused, as a
damaged name must not pass for a field that has its default value; any other change raises VERSION.
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
    GuestDisk,
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
    """See the diagram above. READY and NOT_READY are the CRI's."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    NOT_READY = "not-ready"


class Side(StrEnum):
    """Where a phase ran, and whose clock measured it."""

    HOST = "host"
    GUEST = "guest"


class Source(StrEnum):
    """How a pod's VM was started."""

    BOOT = "boot"
    TEMPLATE = "template"
    POOL = "pool"


class Phase(Value, frozen=True, kw_only=True):
    """A phase of a pod's start, for `husk trace` and the metrics; in seconds since RunPodSandbox began."""

    name: str
    begin_s: float
    end_s: float
    side: Side = Side.HOST


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
    resources: Resources = Resources()  # in force, for all containers together
    overhead: Resources = Resources()  # in force, for the sandbox itself, beyond these
    network: Attachment | None = None
    phases: tuple[Phase, ...] = ()
    problem: str = ""  # why it is NOT_READY, where no client stopped it

    @property
    def ready(self) -> bool:
        """Whether the state is READY."""
        return self.state is PodState.READY

    @property
    def may_run(self) -> bool:
        """Whether the VM of a pod may still run that became NOT_READY by itself: its agent is of another
        release, or a helper ended and the daemon was killed before it could end the rest."""
        return bool(self.problem and self.steps and self.vm_handle)

    @property
    def isolation(self) -> Isolation:
        """What keeps the pod apart from the node, by what it runs in."""
        return Isolation.VM if isinstance(self.runtime, VmRuntime) else Isolation.PROCESS

    @property
    def vm_handle(self) -> VmHandle | None:
        """Its VM; None for a pod without one, or before it was started."""
        return self.runtime.handle if isinstance(self.runtime, VmRuntime) else None


class ContainerState(StrEnum):
    """See the diagram above. All but CREATING are the CRI's."""

    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"
    UNKNOWN = "unknown"


class ContainerUser(Value, frozen=True, kw_only=True):
    """The ids of a container's first process, as resolved when it was created; inside its user namespace."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()


class LogPosition(Value, frozen=True, kw_only=True):
    """Where a log file is in the guest's stream of log bytes: it begins at byte `base`, so byte `base` + file
    size is the next to request.

    `inode` distinguishes the file from another with the same name. `next_base` is set while a reopen is under
    way, to the base of the file that it makes.
    """

    base: int = 0
    inode: int = 0
    next_base: int | None = None


class ImageVolume(Value, frozen=True, kw_only=True):
    """An image that is the source of a mount, as it was when the container was created."""

    mount: int  # index in the specification's mounts
    image_id: str
    chain_ids: tuple[str, ...]


class Propagated(Value, frozen=True, kw_only=True):
    """A mount of the container that is repeated on the host (see `vm_pods.propagation`)."""

    path: str
    mount_id: int = 0  # 0: not made yet
    below: int = 0  # id of the mount that was on top of the path before


class VolumePart(Value, frozen=True, kw_only=True):
    """A part of an exported tree that was exported before, and is mounted over its place in the guest."""

    path: str  # in the whole
    export: str
    uncached: bool = False  # another file system of the host, in the share of that name


class VolumeUse(Value, frozen=True, kw_only=True):
    """Where one of a container's mounts is found: in an export of its pod (see `vm_pods.exports`)."""

    mount: int  # index in the specification's mounts
    export: str
    path: str = ""  # in the export; empty: all of it
    frozen: bool = False  # the host's own mount is read-only
    parts: tuple[VolumePart, ...] = ()  # of the export
    uncached: bool = False  # exported for the guest to cache nothing of it


class SocketUse(Value, frozen=True, kw_only=True):
    """A mount whose source is a socket of the host (see `vm_pods.host_sockets`)."""

    mount: int  # index in the specification's mounts
    path: str  # on the host, without links
    kind: str  # a `SocketKind`


class DiskUse(Value, frozen=True, kw_only=True):
    """A block device of the host that the pod's VM has as a disk (see `vm_pods.disks`)."""

    path: str  # as the specification names it, in a device or a mount
    device: str  # the host's "MAJOR:MINOR"
    serial: str  # of the disk; two containers that use one disk have the same
    readonly: bool = False
    guest: GuestDisk | None = None  # None: the guest has not found it yet


class HostProcess(Value, frozen=True, kw_only=True):
    """The processes of a container that runs on the host itself."""

    supervisor: ProcessIdentity  # conmon
    init: ProcessIdentity | None = None  # the container's first; None: not started yet


class ContainerRecord(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that is known of a container."""

    version: int = msgspec.field(default_factory=_version)
    id: ContainerId
    pod_id: PodId
    spec: ContainerSpec
    created_at_ns: int
    image_id: str  # "sha256:..." of the image's configuration
    image_ref: str
    chain_ids: tuple[str, ...] = ()  # of its root filesystem; these layers are not collected
    image_volumes: tuple[ImageVolume, ...] = ()
    volumes: tuple[VolumeUse, ...] = ()  # of a pod in a VM
    disks: tuple[DiskUse, ...] = ()  # likewise
    rootfs: Rootfs | None = None  # None: not made yet
    defaults: ImageDefaults
    state: ContainerState = ContainerState.CREATING
    steps: tuple[str, ...] = ()
    started_at_ns: int = 0
    finished_at_ns: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    user: ContainerUser = ContainerUser()
    resources: Resources = Resources()  # in force
    stop_signal: str = "SIGTERM"
    log_path: str = ""  # absolute on the host
    log: LogPosition = LogPosition()
    propagated: tuple[Propagated, ...] = ()
    process: HostProcess | None = None
    sockets: tuple[SocketUse, ...] = ()  # of a pod in a VM

    @property
    def layers(self) -> tuple[str, ...]:
        """Chain ids of all layers that it uses."""
        return (*self.chain_ids, *(chain for volume in self.image_volumes for chain in volume.chain_ids))
