"""What a compiled pod or container is: the output of every `compile_*` function, frozen.

The fields are named as in guest.proto, so `encode` turns a plan into the agent's message by name; pods
without a VM read the same values. A container's plan is also kept on disk as JSON, so a field may be added
with a default but never renamed or given another meaning. Pure.
"""

from __future__ import annotations

import stat
from enum import StrEnum

from sandbox.host.ids import IdRange
from sandbox.spec import PidMode, Value

# ------------------------------------------------------------------------------------- container


class Rlimit(Value, frozen=True, kw_only=True):
    """A limit of getrlimit(2)."""

    resource: int  # RLIMIT_*
    soft: int
    hard: int


class ProcessPlan(Value, frozen=True, kw_only=True):
    """A program, and all that is set up for it before its exec."""

    argv: tuple[str, ...] = ()
    env: tuple[bytes, ...] = ()  # b"NAME=value"; a value is any bytes but zero
    cwd: str = ""
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    cap_bounding: int = 0  # capability sets are bit masks, see `capabilities`
    cap_permitted: int = 0
    cap_effective: int = 0
    cap_inheritable: int = 0
    cap_ambient: int = 0
    rlimits: tuple[Rlimit, ...] = ()
    no_new_privs: bool = False
    seccomp: bytes = b""  # array of struct sock_filter; empty: unconfined
    seccomp_flags: int = 0  # SECCOMP_FILTER_FLAG_*
    oom_score_adj: int = 0
    tty: bool = False
    umask: int = 0  # 0 means 0022
    rows: int = 0  # of the terminal; 0 means 24
    columns: int = 0  # 0 means 80
    make_cwd: bool = False  # create `cwd` where it is missing
    # With ranges the container has a user namespace, and uid, gid and groups are ids inside of it.
    uid_ranges: tuple[IdRange, ...] = ()
    gid_ranges: tuple[IdRange, ...] = ()
    apparmor: str = ""  # profile that exec enters; empty: none


class Make(StrEnum):
    """What to create at a mount's target where it is missing."""

    NOTHING = "nothing"
    DIRECTORY = "directory"
    FILE = "file"


class MountPlan(Value, frozen=True, kw_only=True):
    """A mount(2), made before pivot_root(2)."""

    source: str  # of a bind; empty: the target itself
    target: str  # absolute path in the container, as `paths.container_path` spells it
    type: str = ""  # file system; empty: bind
    flags: int = 0  # MS_* of mount(2)
    data: str = ""
    propagation: int = 0  # MS_PRIVATE, MS_SLAVE or MS_SHARED, perhaps with MS_REC; 0: leave
    make: Make = Make.NOTHING
    recursive_readonly: bool = False
    submounts: tuple[str, ...] = ()  # this and the next two: see MountSource
    within: str = ""
    parts: tuple[str, ...] = ()


class DevicePlan(Value, frozen=True):
    """A device node."""

    path: str
    major: int
    minor: int
    mode: int = 0o666  # permissions
    type: int = stat.S_IFCHR  # S_IFCHR or S_IFBLK
    uid: int = 0
    gid: int = 0


class LinkPlan(Value, frozen=True, kw_only=True):
    """A symbolic link, made unless something is at its path."""

    path: str
    target: str


class FilePlan(Value, frozen=True, kw_only=True):
    """A small file that is bound over its path."""

    path: str
    content: bytes
    mode: int
    readonly: bool = False


class CgroupFile(Value, frozen=True, kw_only=True):
    """One write to a file of a cgroup v2 directory."""

    name: str  # "memory.max"
    value: str


class ContainerPlan(Value, frozen=True, kw_only=True):
    """A container as it is to be made, and its first process."""

    id: str
    rootfs: str  # directory, as seen where the container runs
    process: ProcessPlan
    pid_namespace: PidMode = PidMode.CONTAINER
    pid_target: str = ""  # container id, with TARGET
    mounts: tuple[MountPlan, ...] = ()  # in order
    devices: tuple[DevicePlan, ...] = ()
    links: tuple[LinkPlan, ...] = ()  # made after the devices
    files: tuple[FilePlan, ...] = ()
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    readonly_rootfs: bool = False
    cgroup: tuple[CgroupFile, ...] = ()  # in order
    device_filter: bytes = b""  # eBPF program of type CGROUP_DEVICE; empty: no filter
    rootfs_propagation: int = 0  # MS_PRIVATE, MS_SLAVE or MS_SHARED with MS_REC; 0: private
    stdin: bool = False  # keep an open stdin, else /dev/null
    apparmor_policy: bytes = b""  # compiled policy to load before the exec; empty: none


# ------------------------------------------------------------------------------------------- pod


class IdentityPlan(Value, frozen=True, kw_only=True):
    """What distinguishes a VM from every other copy of its template."""

    hostname: str
    entropy: bytes  # mixed into and credited to the kernel's pool
    machine_id: str  # 32 hexadecimal digits
    wall_ns: int  # the host's CLOCK_REALTIME; 0: leave the guest's clock as it is


class Sysctl(Value, frozen=True, kw_only=True):
    """A kernel setting of the pod."""

    path: str  # beneath /proc/sys
    value: str


class InterfacePlan(Value, frozen=True, kw_only=True):
    """A NIC of the VM and its configuration."""

    mac: str  # from now on
    name: str
    mtu: int = 0  # 0: leave
    addresses: tuple[str, ...] = ()  # CIDR notation
    found_mac: str = ""  # what the NIC has until then; empty: `mac`


class RoutePlan(Value, frozen=True, kw_only=True):
    """A route in the guest."""

    destination: str  # CIDR notation
    gateway: str = ""  # empty: on link
    interface: str = ""  # name after renaming
    metric: int = 0  # 0: the kernel's default
    mtu: int = 0  # 0: none
    on_link: bool = False  # the gateway is reachable though no address covers it


class NetworkPlan(Value, frozen=True, kw_only=True):
    """A pod's network in its VM, and its sysctls, some of which belong to an interface."""

    sysctls: tuple[Sysctl, ...] = ()
    interfaces: tuple[InterfacePlan, ...] = ()
    routes: tuple[RoutePlan, ...] = ()


class HugeDirectory(Value, frozen=True, kw_only=True):
    """A directory on huge pages of the guest, which containers of the pod share by its name."""

    name: str
    mode: int
    uid: int = 0
    gid: int = 0


class HostShare(Value, frozen=True, kw_only=True):
    """What a VM may use of the host.

    Numbers of CPUs and memory nodes, none: what the cgroup above has; shares and quota as in cgroup v1, 0:
    not limited here; `oom_score_adj` as in proc(5), None: it stays as it is.
    """

    cpus: frozenset[int] = frozenset()
    mems: frozenset[int] = frozenset()
    oom_score_adj: int | None = None
    cpu_shares: int = 0
    cpu_quota_us: int = 0
    cpu_period_us: int = 0
