"""A container's plan as an OCI runtime configuration (runtime-spec, config.md and config-linux.md). Pure.

It is what `crictl inspect` shows as `runtimeSpec`, for people and tools that read it there; in a VM nothing
is run by it. Pods without a VM give it to crun, with what depends on the host (see `host_pods.oci`).
"""

from __future__ import annotations

import stat

from sandbox import capabilities
from sandbox.host import mount_flags
from sandbox.plan.process import RLIMIT_NOFILE
from sandbox.plan.values import ContainerPlan, DevicePlan, MountPlan, ProcessPlan, Rlimit

Json = dict[str, object]

VERSION = "1.0.2"
_ROWS, _COLUMNS = 24, 80  # of a terminal whose size is not known
_RLIMITS = {RLIMIT_NOFILE: "RLIMIT_NOFILE"}
_MOUNT_OPTIONS = {
    mount_flags.MS_RDONLY: "ro",
    mount_flags.MS_NOSUID: "nosuid",
    mount_flags.MS_NODEV: "nodev",
    mount_flags.MS_NOEXEC: "noexec",
    mount_flags.MS_STRICTATIME: "strictatime",
}
_PROPAGATIONS = {
    mount_flags.MS_PRIVATE: "private",
    mount_flags.MS_SLAVE: "slave",
    mount_flags.MS_SHARED: "shared",
}


def runtime_spec(plan: ContainerPlan) -> Json:
    """Return the configuration, without namespaces and filters."""
    return {
        "ociVersion": VERSION,
        "process": process_spec(plan.process),
        "root": {"path": plan.rootfs, "readonly": plan.readonly_rootfs},
        "mounts": [_mount(mount, plan.rootfs) for mount in plan.mounts],
        "linux": linux_spec(plan),
    }


def linux_spec(plan: ContainerPlan) -> Json:
    """Return the Linux part of the configuration; limits only where the plan has some."""
    found: Json = {
        "devices": [_device(device) for device in plan.devices],
        "maskedPaths": list(plan.masked_paths),
        "readonlyPaths": list(plan.readonly_paths),
        "rootfsPropagation": _propagation(plan.rootfs_propagation) or "rprivate",
    }
    if plan.cgroup:
        found["resources"] = {"unified": _unified(plan)}
    return found


def process_spec(process: ProcessPlan) -> Json:
    """Return the process, also as `crun exec` takes it. Bytes that are not UTF-8 become U+FFFD."""
    found: Json = {
        "terminal": process.tty,
        "user": {
            "uid": process.uid,
            "gid": process.gid,
            "additionalGids": list(process.groups),
            "umask": process.umask,
        },
        "args": list(process.argv),
        "env": [entry.decode(errors="replace") for entry in process.env],
        "cwd": process.cwd,
        "capabilities": {
            "bounding": capabilities.names_of(process.cap_bounding),
            "permitted": capabilities.names_of(process.cap_permitted),
            "effective": capabilities.names_of(process.cap_effective),
            "inheritable": capabilities.names_of(process.cap_inheritable),
            "ambient": capabilities.names_of(process.cap_ambient),
        },
        "rlimits": [_rlimit(limit) for limit in process.rlimits],
        "noNewPrivileges": process.no_new_privs,
        "oomScoreAdj": process.oom_score_adj,
    }
    if process.tty:
        found["consoleSize"] = {"height": process.rows or _ROWS, "width": process.columns or _COLUMNS}
    return found


def _rlimit(limit: Rlimit) -> Json:
    return {"type": _RLIMITS[limit.resource], "soft": limit.soft, "hard": limit.hard}


def _mount(mount: MountPlan, rootfs: str) -> Json:
    """Options in the order: bind, flags, recursive flags, propagation, the file system's own."""
    options = [name for bit, name in _MOUNT_OPTIONS.items() if mount.flags & bit]
    if mount.recursive_readonly and mount.flags & mount_flags.MS_RDONLY:
        options.append("rro")
    if propagation := _propagation(mount.propagation):
        options.append(propagation)
    kind = mount.type
    if mount.flags & mount_flags.MS_BIND:
        kind = "bind"
        options.insert(0, "rbind" if mount.flags & mount_flags.MS_REC else "bind")
    else:
        options += [option for option in mount.data.split(",") if option]
    source = mount.source or f"{rootfs}{mount.target}"
    return {"destination": mount.target, "type": kind, "source": source, "options": options}


def _propagation(flags: int) -> str:
    name = _PROPAGATIONS.get(flags & ~mount_flags.MS_REC, "")
    return f"r{name}" if name and flags & mount_flags.MS_REC else name


def _device(device: DevicePlan) -> Json:
    return {
        "path": device.path,
        "type": "b" if stat.S_ISBLK(device.type) else "c",
        "major": device.major,
        "minor": device.minor,
        "fileMode": stat.S_IMODE(device.mode),
        "uid": device.uid,
        "gid": device.gid,
    }


def _unified(plan: ContainerPlan) -> dict[str, str]:
    """Return the files of the cgroup; one that takes a line per write has all its lines."""
    files: dict[str, str] = {}
    for file in plan.cgroup:
        files[file.name] = f"{files[file.name]}\n{file.value}" if file.name in files else file.value
    return files
