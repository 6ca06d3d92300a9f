"""A container's plan as an OCI runtime configuration (runtime-spec, config.md and config-linux.md).

The plan is what the agent of a VM would execute, decided and checked; here it only changes its form, so
users, environment, mounts, capabilities and filters are the same wherever a container runs. What a VM
has of its own (its devices, its shared memory) is given by `RuntimeEnv` instead. Pure.
"""

from __future__ import annotations

import base64
import stat
from collections.abc import Mapping, Sequence

from sandbox.errors import InvalidSpec
from sandbox.plan import mounts
from sandbox.plan.oci_terms import PROPAGATIONS, VERSION, Json, capability_sets, device_type, mount_options
from sandbox.plan.values import ContainerPlan, DevicePlan, MountPlan, ProcessPlan, Rlimit
from sandbox.spec import Value

_RLIMITS = {7: "RLIMIT_NOFILE"}  # asm-generic/resource.h
_SECCOMP_FLAGS = {2: "SECCOMP_FILTER_FLAG_LOG", 4: "SECCOMP_FILTER_FLAG_SPEC_ALLOW"}  # linux/seccomp.h
_RAW_SECCOMP = "run.oci.seccomp_bpf_data"  # crun(1): the filter's own bytes, in base64


class NodeLimits(Value, frozen=True, kw_only=True):
    """What the daemon itself may have, and so give. Usually everything."""

    open_files: int
    capabilities: int


class RuntimeEnv(Value, frozen=True, kw_only=True):
    """What the plan leaves to where the container runs."""

    rootfs: str
    shm: str
    namespaces: Mapping[str, str]  # by type, the file of one to join, or "" for one of its own
    files: Sequence[str]  # where each of the plan's files is
    limits: NodeLimits
    devices: Sequence[DevicePlan] = ()  # of a privileged container: all of the host


def compile_config(plan: ContainerPlan, around: RuntimeEnv) -> Json:
    """Raises InvalidSpec for what a configuration cannot say."""
    linux: Json = {
        "namespaces": [
            {"type": kind, "path": path} if path else {"type": kind}
            for kind, path in around.namespaces.items()
        ],
        "devices": [_device(each) for each in (*plan.devices, *around.devices)],
        "maskedPaths": list(plan.masked_paths),
        "readonlyPaths": list(plan.readonly_paths),
        "rootfsPropagation": _rootfs_propagation(plan),
    }
    annotations: dict[str, str] = {}
    if plan.process.seccomp:
        annotations[_RAW_SECCOMP] = base64.b64encode(plan.process.seccomp).decode()
        linux["seccomp"] = {
            "defaultAction": "SCMP_ACT_ALLOW",  # crun reads the flags alone, where there is a raw filter
            "flags": [name for bit, name in _SECCOMP_FLAGS.items() if plan.process.seccomp_flags & bit],
        }
    return {
        "ociVersion": VERSION,
        "process": compile_process(plan.process, around.limits),
        "root": {"path": around.rootfs, "readonly": plan.readonly_rootfs},
        "mounts": [_mount(each, around) for each in plan.mounts] + _files(plan, around),
        "linux": linux,
        "annotations": annotations,
    }


def compile_process(process: ProcessPlan, limits: NodeLimits) -> Json:
    """Also what `crun exec` takes. Raises InvalidSpec."""
    found: Json = {
        "terminal": process.tty,
        "user": {
            "uid": process.uid,
            "gid": process.gid,
            "additionalGids": list(process.groups),
            "umask": process.umask,
        },
        "args": list(process.argv),
        "env": [_variable(entry) for entry in process.env],
        "cwd": process.cwd,
        "capabilities": capability_sets(process, limits.capabilities),
        "rlimits": [_rlimit(limit, limits.open_files) for limit in process.rlimits],
        "noNewPrivileges": process.no_new_privs,
        "oomScoreAdj": process.oom_score_adj,
    }
    if process.tty:
        found["consoleSize"] = {"height": process.rows or 24, "width": process.columns or 80}
    return found


def _variable(entry: bytes) -> str:
    try:
        return entry.decode()
    except UnicodeDecodeError as error:
        name = entry.partition(b"=")[0].decode(errors="replace")
        raise InvalidSpec("config.envs", f"{name}: the value is not UTF-8", "UTF-8") from error


def _rlimit(limit: Rlimit, most: int) -> Json:
    soft, hard = min(limit.soft, most), min(limit.hard, most)
    return {"type": _RLIMITS[limit.resource], "soft": soft, "hard": hard}


def _device(device: DevicePlan) -> Json:
    return {
        "path": device.path,
        "type": device_type(device.type),
        "major": device.major,
        "minor": device.minor,
        "fileMode": stat.S_IMODE(device.mode),
        "uid": device.uid,
        "gid": device.gid,
    }


def _mount(mount: MountPlan, around: RuntimeEnv) -> Json:
    options = mount_options(mount.flags)
    if mount.recursive_readonly and mount.flags & mounts.MS_RDONLY:
        options.append("rro")
    propagation = _propagation(mount.propagation)
    options += [propagation] if propagation else []
    if mount.flags & mounts.MS_BIND:
        source = around.shm if mount.source == mounts.POD_SHM else mount.source
        bind = "rbind" if mount.flags & mounts.MS_REC else "bind"
        return {"destination": mount.target, "type": "bind", "source": source, "options": [bind, *options]}
    options += [option for option in mount.data.split(",") if option]
    kind = mount.type
    if kind == "devtmpfs":
        # the node's own, of which a container would remove and replace entries; so a directory of its own
        kind, options = "tmpfs", ["nosuid", "noexec", "strictatime", "mode=755", "size=65536k"]
    elif kind == "cgroup2":
        kind = "cgroup"  # whichever the host has
    return {"destination": mount.target, "type": kind, "source": kind, "options": options}


def _propagation(flags: int) -> str:
    name = PROPAGATIONS.get(flags & ~mounts.MS_REC, "")
    return f"r{name}" if name and flags & mounts.MS_REC else name


def _rootfs_propagation(plan: ContainerPlan) -> str:
    """A mount shares with the host what the tree shares that it is copied out of."""
    if any(mount.propagation & mounts.MS_SHARED for mount in plan.mounts):
        return "rshared"
    return _propagation(plan.rootfs_propagation) or "rprivate"


def _files(plan: ContainerPlan, around: RuntimeEnv) -> list[Json]:
    return [
        {
            "destination": file.path,
            "type": "bind",
            "source": source,
            "options": ["bind", "rprivate", *(["ro"] if file.readonly else [])],
        }
        for file, source in zip(plan.files, around.files, strict=True)
    ]
