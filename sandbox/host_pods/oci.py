"""A container's plan as the OCI configuration that crun runs on this host. Pure.

The plan is what the agent of a VM would execute, decided and checked. `fit` changes what a VM has and the
host has not (devices, shared memory, unlimited rights) to what there is here, and `plan.oci` renders the
result; so users, environment, mounts, capabilities and filters are the same wherever a container runs.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from sandbox.errors import InvalidSpec
from sandbox.host import mount_flags
from sandbox.plan import mounts
from sandbox.plan.oci import Json, linux_spec, process_spec, runtime_spec
from sandbox.plan.values import ContainerPlan, DevicePlan, MountPlan, ProcessPlan, Rlimit
from sandbox.spec import Value

_SECCOMP_FLAGS = {2: "SECCOMP_FILTER_FLAG_LOG", 4: "SECCOMP_FILTER_FLAG_SPEC_ALLOW"}  # linux/seccomp.h
_RAW_SECCOMP = "run.oci.seccomp_bpf_data"  # crun(1): the filter's own bytes, in base64


class NodeLimits(Value, frozen=True, kw_only=True):
    """What the daemon itself may have, and so give. Usually everything."""

    open_files: int  # hard RLIMIT_NOFILE
    capabilities: int  # its bounding set, as a mask


class RuntimeEnv(Value, frozen=True, kw_only=True):
    """Where the container runs: what its plan leaves open."""

    shm: str  # the pod's /dev/shm, on the host
    namespaces: Mapping[str, str]  # by type, the file of one to join; "": a new one
    files: Sequence[str]  # paths of the plan's files on the host, in their order
    limits: NodeLimits
    places: Mapping[str, str] = {}  # of targets that are bound on themselves: where the host has them
    devices: Sequence[DevicePlan] = ()  # of a privileged container: all of the host


def compile_config(plan: ContainerPlan, env: RuntimeEnv) -> Json:
    """Return config.json of a bundle. Raises InvalidSpec for what it cannot say."""
    fitted = fit(plan, env)
    linux: Json = {
        "namespaces": [
            {"type": kind, "path": path} if path else {"type": kind} for kind, path in env.namespaces.items()
        ],
        **linux_spec(fitted),
    }
    annotations: dict[str, str] = {}
    if plan.process.seccomp:
        annotations[_RAW_SECCOMP] = base64.b64encode(plan.process.seccomp).decode()
        linux["seccomp"] = {
            "defaultAction": "SCMP_ACT_ALLOW",  # crun reads the flags alone, where there is a raw filter
            "flags": [name for bit, name in _SECCOMP_FLAGS.items() if plan.process.seccomp_flags & bit],
        }
    return {**runtime_spec(fitted), "linux": linux, "annotations": annotations}


def compile_process(process: ProcessPlan, limits: NodeLimits) -> Json:
    """Return process.json for `crun exec`. Raises InvalidSpec."""
    return process_spec(fit_process(process, limits))


def fit(plan: ContainerPlan, env: RuntimeEnv) -> ContainerPlan:
    """Return the plan as it can be carried out on this host. Raises InvalidSpec.

    Limits are left out: `cgroups` writes them, as crun is started with cgroups disabled.
    """
    shared = any(mount.propagation & mount_flags.MS_SHARED for mount in plan.mounts)
    return replace(
        plan,
        process=fit_process(plan.process, env.limits),
        mounts=(*(_fit_mount(mount, env) for mount in plan.mounts), *_files(plan, env)),
        devices=(*plan.devices, *env.devices),
        cgroup=(),
        # a mount shares with the host what the tree shares that it is copied out of
        rootfs_propagation=mount_flags.MS_SHARED | mount_flags.MS_REC if shared else plan.rootfs_propagation,
    )


def fit_process(process: ProcessPlan, limits: NodeLimits) -> ProcessPlan:
    """Return the process with no more than the daemon can give. Raises InvalidSpec."""
    for entry in process.env:
        _check_text(entry)
    most, mask = limits.open_files, limits.capabilities
    return replace(
        process,
        cap_bounding=process.cap_bounding & mask,
        cap_permitted=process.cap_permitted & mask,
        cap_effective=process.cap_effective & mask,
        cap_inheritable=process.cap_inheritable & mask,
        cap_ambient=process.cap_ambient & mask,
        rlimits=tuple(
            Rlimit(resource=each.resource, soft=min(each.soft, most), hard=min(each.hard, most))
            for each in process.rlimits
        ),
    )


def _check_text(entry: bytes) -> None:
    """JSON holds text alone, so an environment variable must be UTF-8. Raises InvalidSpec."""
    try:
        entry.decode()
    except UnicodeDecodeError as error:
        name = entry.partition(b"=")[0].decode(errors="replace")
        raise InvalidSpec("config.envs", f"{name}: the value is not UTF-8", "UTF-8") from error


def _fit_mount(mount: MountPlan, env: RuntimeEnv) -> MountPlan:
    if mount.source == mounts.POD_SHM:
        return replace(mount, source=env.shm)
    if mount.flags & mount_flags.MS_BIND and not mount.source:
        return replace(mount, source=env.places[mount.target])
    if mount.type == "devtmpfs":
        # it would be the node's, whose entries a container could remove and replace: a tmpfs, then
        flags = mount_flags.MS_NOSUID | mount_flags.MS_NOEXEC | mount_flags.MS_STRICTATIME
        return replace(mount, source="tmpfs", type="tmpfs", flags=flags, data="mode=755,size=65536k")
    if mount.type == "cgroup2":
        return replace(mount, source="cgroup", type="cgroup")  # whichever version the host has
    return mount


def _files(plan: ContainerPlan, env: RuntimeEnv) -> list[MountPlan]:
    return [
        MountPlan(
            source=source,
            target=file.path,
            flags=mount_flags.MS_BIND | (mount_flags.MS_RDONLY if file.readonly else 0),
            propagation=mount_flags.MS_PRIVATE | mount_flags.MS_REC,
        )
        for file, source in zip(plan.files, env.files, strict=True)
    ]
