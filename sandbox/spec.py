"""What a client requests, as values: the specifications of pods and containers.

`cri` translates requests to these, and records keep them on disk: a field may be added with a default, but
never renamed or given another meaning. Pure: no clock, no files, no event loop.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import NewType

import msgspec

from sandbox.host.ids import IdRange

PodId = NewType("PodId", str)
ContainerId = NewType("ContainerId", str)


class Value(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of every value: immutable, compared by content, stored as JSON."""


# ------------------------------------------------------------------------------------ common


class Resources(Value, frozen=True, kw_only=True):
    """Limits, as the CRI's LinuxContainerResources: 0 and empty mean "not given", as they do there.

    `cpu_period` and `cpu_quota` are microseconds, `cpu_shares` relative weights, memory and huge pages bytes.
    `unified` holds files of cgroup v2 by name.
    """

    cpu_period: int = 0
    cpu_quota: int = 0
    cpu_shares: int = 0
    memory_limit: int = 0
    memory_swap_limit: int = 0
    oom_score_adj: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    hugepage_limits: dict[str, int] = {}
    unified: dict[str, str] = {}


class SeccompKind(StrEnum):
    """The CRI's types of profiles (SecurityProfile.ProfileType)."""

    UNCONFINED = "unconfined"
    RUNTIME_DEFAULT = "runtime-default"
    LOCALHOST = "localhost"


class Seccomp(Value, frozen=True, kw_only=True):
    """Which system calls a container may make."""

    kind: SeccompKind = SeccompKind.UNCONFINED
    path: str = ""  # absolute path on the host, with LOCALHOST


class AppArmorKind(StrEnum):
    """The CRI's types of profiles (SecurityProfile.ProfileType)."""

    UNCONFINED = "unconfined"
    RUNTIME_DEFAULT = "runtime-default"
    LOCALHOST = "localhost"


class AppArmor(Value, frozen=True, kw_only=True):
    """Which AppArmor profile confines a container."""

    kind: AppArmorKind = AppArmorKind.UNCONFINED
    name: str = ""  # of a profile that is loaded on the host, with LOCALHOST


class UserNamespace(Value, frozen=True, kw_only=True):
    """How the ids of a pod's containers map to those of files on the host."""

    uids: tuple[IdRange, ...]
    gids: tuple[IdRange, ...]


class Isolation(StrEnum):
    """What keeps a pod's containers apart from the node."""

    VM = "vm"
    PROCESS = "process"  # namespaces and cgroups alone, some namespaces being the node's


class PidMode(StrEnum):
    """Whose PID namespace a container has (CRI, NamespaceMode)."""

    NODE = "node"
    POD = "pod"
    CONTAINER = "container"
    TARGET = "target"


# --------------------------------------------------------------------------------------- pod


class Dns(Value, frozen=True, kw_only=True):
    """The content of resolv.conf (resolv.conf(5))."""

    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class PortMapping(Value, frozen=True, kw_only=True):
    """A port of the pod that is published on the node, or only declared."""

    protocol: str = "tcp"  # tcp, udp or sctp
    container_port: int = 0
    host_port: int = 0  # 0: not published
    host_ip: str = ""


class PodSpec(Value, frozen=True, kw_only=True):
    """A pod sandbox (CRI, PodSandboxConfig). `handler` names the runtime handler; empty: the default one."""

    name: str
    namespace: str
    uid: str
    attempt: int = 0
    handler: str = ""
    hostname: str = ""
    log_directory: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    dns: Dns = Dns()
    port_mappings: tuple[PortMapping, ...] = ()
    sysctls: dict[str, str] = {}
    cgroup_parent: str = ""
    resources: Resources = Resources()
    overhead: Resources = Resources()
    pid_mode: PidMode = PidMode.CONTAINER
    privileged: bool = False
    run_as_user: int | None = None
    run_as_group: int | None = None
    supplemental_groups: tuple[int, ...] = ()
    readonly_rootfs: bool = False
    seccomp: Seccomp = Seccomp()
    apparmor: AppArmor = AppArmor()
    user_namespace: UserNamespace | None = None
    host_network: bool = False
    host_ipc: bool = False

    @property
    def host_namespaces(self) -> tuple[str, ...]:
        """The node's namespaces that the pod shares, by the names of the CRI's fields."""
        shared = {"network": self.host_network, "pid": self.pid_mode is PidMode.NODE, "ipc": self.host_ipc}
        return tuple(name for name, requested in shared.items() if requested)


# --------------------------------------------------------------------------------- container


class Propagation(StrEnum):
    """Whether mounts made later below a mount are seen on the other side (mount_namespaces(7))."""

    PRIVATE = "private"
    HOST_TO_CONTAINER = "host-to-container"
    BIDIRECTIONAL = "bidirectional"


class MountSpec(Value, frozen=True, kw_only=True):
    """A mount of files of the host, or of an image: then `host_path` is empty and `image` is not."""

    container_path: str
    host_path: str
    readonly: bool = False
    recursive_readonly: bool = False
    propagation: Propagation = Propagation.PRIVATE
    selinux_relabel: bool = False
    image: str = ""  # as the client named it
    user_specified_image: str = ""
    image_sub_path: str = ""  # relative to the image's root
    options: tuple[str, ...] = ()  # noexec, nodev, nosuid
    ids: UserNamespace | None = None  # maps the owners of its files; None: as they are


class DeviceSpec(Value, frozen=True, kw_only=True):
    """A device node. `permissions`: any of r, w and m (mknod)."""

    container_path: str
    host_path: str
    permissions: str = "rwm"


class CdiRequest(Value, frozen=True, kw_only=True):
    """A device by its CDI name (vendor/class=device), and the field of the request that names it."""

    name: str
    field: str


class GroupsPolicy(StrEnum):
    """Whether the groups of the image's /etc/group apply too (CRI, SupplementalGroupsPolicy)."""

    MERGE = "merge"
    STRICT = "strict"


class SecuritySpec(Value, frozen=True, kw_only=True):
    """The security context of a container (CRI, LinuxContainerSecurityContext)."""

    privileged: bool = False
    add_capabilities: tuple[str, ...] = ()
    drop_capabilities: tuple[str, ...] = ()
    ambient_capabilities: tuple[str, ...] = ()
    pid_mode: PidMode = PidMode.CONTAINER
    pid_target: str = ""  # container id, with TARGET
    host_network: bool = False
    host_ipc: bool = False
    run_as_user: int | None = None
    run_as_username: str = ""
    run_as_group: int | None = None
    supplemental_groups: tuple[int, ...] = ()
    groups_policy: GroupsPolicy = GroupsPolicy.MERGE
    readonly_rootfs: bool = False
    no_new_privs: bool = False
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    seccomp: Seccomp = Seccomp()
    apparmor: AppArmor = AppArmor()
    user_namespace: UserNamespace | None = None


class ContainerSpec(Value, frozen=True, kw_only=True):
    """A container (CRI, ContainerConfig)."""

    name: str
    attempt: int = 0
    image: str  # as the client named it
    user_specified_image: str = ""
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    working_dir: str = ""
    envs: tuple[tuple[str, bytes], ...] = ()
    mounts: tuple[MountSpec, ...] = ()
    devices: tuple[DeviceSpec, ...] = ()
    cdi_devices: tuple[CdiRequest, ...] = ()
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    log_path: str = ""  # relative to the pod's log directory; empty: no log
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    resources: Resources = Resources()
    security: SecuritySpec = SecuritySpec()
    stop_signal: str = ""  # "SIGTERM", "SIGRTMIN+3"; empty: the image's, else SIGTERM


class ImageDefaults(Value, frozen=True, kw_only=True):
    """What the image's configuration says about running it (OCI image-spec, config.md)."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()


class ExitCode(IntEnum):
    """What a container's exit code is where its program gave none.

    A program that a signal ends has 128 plus the signal's number (CRI, ContainerStatus.exit_code).
    """

    START_ERROR = 128  # it could not be run
    KILLED = 137  # SIGKILL, with all that ran in the pod
    UNKNOWN = 255  # it has ended, and its exit code is lost


# ----------------------------------------------------------------------------------- machine


class Handler(Value, frozen=True, kw_only=True):
    """A runtime handler as configured ([handlers.NAME] in config.toml), all defaults filled in."""

    name: str
    kernel: str  # path of the guest's vmlinux; empty: that of the current guest image
    initramfs: str  # likewise
    memory_mib: int  # of a VM before it grows to its pod's needs
    vcpus: int
    accelerator: str  # "auto", or one of the hypervisor's, such as kvm or tcg
    hypervisor: str = ""  # name of the driver: see `vmm`
    options: dict[str, str] = {}  # the driver's own
    source: str = "pool"  # boot, template or pool: see `vm_pods.pool`
    pool_size: int = 0  # VMs to keep paused for later pods, with "pool"
    host_pods: str = "process"  # pods that share namespaces of the node: "process" or "refuse"


class VmSize(Value, frozen=True, kw_only=True):
    """The size of a VM that a pod needs: `plan.vm_size` computes it of a PodSpec and a Handler."""

    memory_mib: int
    vcpus: int
    huge_mib: int = 0  # part of `memory_mib`, reserved as huge pages


class GuestDisk(Value, frozen=True, kw_only=True):
    """A block device of the host as its VM has it. Permissions and owner are those of the host's node."""

    name: str  # of the node in the guest's /dev
    major: int  # numbers that the guest chose
    minor: int
    size: int  # bytes
    mode: int = 0o660
    uid: int = 0
    gid: int = 0
