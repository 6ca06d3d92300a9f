"""A container's plan in the words of an OCI runtime configuration, for people and tools that look for
`runtimeSpec` in `crictl inspect`. It says what is done; nothing is run by it. Pure.
"""

from __future__ import annotations

from sandbox.plan import mounts
from sandbox.plan.oci_terms import PROPAGATIONS, VERSION, Json, capability_sets, device_type, mount_options
from sandbox.plan.values import ContainerPlan, DevicePlan, MountPlan, ProcessPlan


def runtime_spec(plan: ContainerPlan) -> Json:
    return {
        "ociVersion": VERSION,
        "process": _process(plan.process),
        "root": {"path": plan.rootfs, "readonly": plan.readonly_rootfs},
        "mounts": [_mount(mount) for mount in plan.mounts],
        "linux": {
            "devices": [_device(device) for device in plan.devices],
            "maskedPaths": list(plan.masked_paths),
            "readonlyPaths": list(plan.readonly_paths),
            "resources": {"unified": _files(plan)},
        },
    }


def _process(process: ProcessPlan) -> Json:
    return {
        "terminal": process.tty,
        "user": {"uid": process.uid, "gid": process.gid, "additionalGids": list(process.groups)},
        "args": list(process.argv),
        "env": [entry.decode(errors="replace") for entry in process.env],
        "cwd": process.cwd,
        "capabilities": capability_sets(process),
        "noNewPrivileges": process.no_new_privs,
        "oomScoreAdj": process.oom_score_adj,
    }


def _mount(mount: MountPlan) -> Json:
    recursive = "r" if mount.flags & mounts.MS_REC else ""
    bind = bool(mount.flags & mounts.MS_BIND)
    options = [f"{recursive}bind"] if bind else [option for option in mount.data.split(",") if option]
    options += mount_options(mount.flags)
    options += ["rro"] if mount.recursive_readonly else []
    options += [f"r{name}" for bit, name in PROPAGATIONS.items() if mount.propagation & bit]
    kind = "bind" if bind else mount.type
    return {"destination": mount.target, "type": kind, "source": mount.source, "options": options}


def _device(device: DevicePlan) -> Json:
    kind = device_type(device.type)
    return {"path": device.path, "type": kind, "major": device.major, "minor": device.minor}


def _files(plan: ContainerPlan) -> dict[str, str]:
    """A file that is written line by line has them all."""
    files: dict[str, str] = {}
    for file in plan.cgroup:
        files[file.name] = f"{files[file.name]}\n{file.value}" if file.name in files else file.value
    return files
