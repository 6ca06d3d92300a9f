"""A whole container: namespaces, root, devices, files and limits around its first process. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from sandbox.apparmor.profile import UNCONFINED, Policy
from sandbox.errors import InvalidSpec
from sandbox.host.mount_flags import MS_BIND
from sandbox.plan.devices import STANDARD, RequestedDevice
from sandbox.plan.mounts import MountSource, compile_mounts, mount_targets, rootfs_propagation
from sandbox.plan.paths import container_path, covers
from sandbox.plan.pod_files import PodFiles
from sandbox.plan.process import compile_process
from sandbox.plan.resources import compile_resources
from sandbox.plan.users import ResolvedUser
from sandbox.plan.values import ContainerPlan, DevicePlan, FilePlan, LinkPlan, Make, MountPlan
from sandbox.seccomp.profile import Filter
from sandbox.spec import ContainerSpec, ImageDefaults, PidMode, PodSpec, Resources, SecuritySpec

# OCI runtime-spec, runtime-linux.md, "Dev symbolic links", and devpts(5) for a private instance
_LINKS = (
    ("/dev/ptmx", "pts/ptmx"),
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
)


def compile_container(
    container: ContainerSpec,
    pod: PodSpec,
    defaults: ImageDefaults,
    *,
    container_id: str,
    rootfs: str,
    mount_sources: Sequence[MountSource],
    user: ResolvedUser,
    files: PodFiles,
    seccomp: Filter,
    device_filter: bytes,
    apparmor: Policy = UNCONFINED,
    vcpus: int = 0,
    devices: Sequence[RequestedDevice],
) -> ContainerPlan:
    """Return the container's plan. Raises InvalidSpec with the field.

    A privileged container gets all devices of the guest, a writable /sys and cgroup tree, and no masked
    or read-only paths (containerd, WithPrivileged). The VM isolates it, so the pod need not be privileged
    for that.
    """
    security = container.security
    _check_namespaces(security, pod)
    if security.user_namespace != pod.user_namespace:
        field = "config.linux.security_context.namespace_options.userns_options"
        raise InvalidSpec(field, "differs from the sandbox's", "what the sandbox has")
    targets = mount_targets(container)
    own_dev = not any(covers(target, "/dev") for target in targets)
    return ContainerPlan(
        id=container_id,
        rootfs=rootfs,
        process=compile_process(container, defaults, user, _hostname(pod, files), seccomp, apparmor),
        pid_namespace=security.pid_mode,
        pid_target=_pid_target(container),
        mounts=(*compile_mounts(container, defaults, mount_sources), *_bound_nodes(container, devices)),
        devices=_devices(container, devices, own_dev),
        links=_links(container, own_dev),
        files=_files(container, files, targets),
        masked_paths=_hidden(container, security.masked_paths, "masked_paths"),
        readonly_paths=_hidden(container, security.readonly_paths, "readonly_paths"),
        readonly_rootfs=security.readonly_rootfs,
        cgroup=compile_resources(container.resources, vcpus=vcpus),
        device_filter=device_filter,
        rootfs_propagation=rootfs_propagation(container),
        stdin=container.stdin,
        apparmor_policy=apparmor.binary,
    )


def limited(plan: ContainerPlan, resources: Resources, *, vcpus: int = 0) -> ContainerPlan:
    """Return the plan with other limits, for its execs and for a start still to come. Raises InvalidSpec."""
    return replace(
        plan,
        process=replace(plan.process, oom_score_adj=resources.oom_score_adj),
        cgroup=compile_resources(resources, vcpus=vcpus),
    )


def _check_namespaces(security: SecuritySpec, pod: PodSpec) -> None:
    """Raise InvalidSpec for a namespace of the node that the pod was not started with.

    POD means what the pod has, which may be the node's.
    """
    at = "config.linux.security_context.namespace_options"
    requested = {
        "network": security.host_network,
        "pid": security.pid_mode is PidMode.NODE,
        "ipc": security.host_ipc,
    }
    for field, is_requested in requested.items():
        if is_requested and field not in pod.host_namespaces:
            raise InvalidSpec(f"{at}.{field}", "NODE: the sandbox was not started with it", "POD")


def _hostname(pod: PodSpec, files: PodFiles) -> str:
    return pod.hostname or files.hostname.decode("utf-8", "replace").strip()


def _pid_target(container: ContainerSpec) -> str:
    security = container.security
    field = "config.linux.security_context.namespace_options.target_id"
    if security.pid_mode is not PidMode.TARGET:
        return ""
    if not security.pid_target:
        raise InvalidSpec(field, "is empty, and pid is TARGET", "the id of a container of this pod")
    return security.pid_target


def _devices(
    container: ContainerSpec, requested: Sequence[RequestedDevice], own_dev: bool
) -> tuple[DevicePlan, ...]:
    """Return the standard nodes, then the requested ones.

    A client's /dev gets no standard nodes, and a privileged container's has them already.
    """
    standard = STANDARD if own_dev and not container.security.privileged else ()
    nodes = {node.path: node for node in standard}
    bound = container.security.privileged
    nodes |= {each.node.path: each.node for each in requested if not (bound and each.bound)}
    return tuple(nodes.values())


def _bound_nodes(container: ContainerSpec, requested: Sequence[RequestedDevice]) -> tuple[MountPlan, ...]:
    """Return the guest's nodes of disks as mounts: privileged containers have one /dev in common, and another
    one may have a node at the same path."""
    if not container.security.privileged:
        return ()
    return tuple(
        MountPlan(source=each.bound, target=each.node.path, flags=MS_BIND, make=Make.FILE)
        for each in requested
        if each.bound
    )


def _links(container: ContainerSpec, own_dev: bool) -> tuple[LinkPlan, ...]:
    if not own_dev:
        return ()
    # the devtmpfs has a ptmx, which uses the pts next to it
    links = _LINKS[1:] if container.security.privileged else _LINKS
    return tuple(LinkPlan(path=path, target=target) for path, target in links)


def _files(container: ContainerSpec, files: PodFiles, targets: Sequence[str]) -> tuple[FilePlan, ...]:
    """Return the pod's files, less those that a mount of the client's covers (the kubelet's hosts file)."""
    ours = {
        "/etc/hostname": files.hostname,
        "/etc/hosts": files.hosts,
        "/etc/resolv.conf": files.resolv_conf,
    }
    return tuple(
        FilePlan(path=path, content=content, mode=0o644, readonly=container.security.readonly_rootfs)
        for path, content in ours.items()
        if path not in targets
    )


def _hidden(container: ContainerSpec, paths: Sequence[str], name: str) -> tuple[str, ...]:
    """Return the paths normalized. No defaults are added: clients send the usual ones (CRI, masked_paths)."""
    field = f"config.linux.security_context.{name}"
    checked = [container_path(path, f"{field}[{number}]") for number, path in enumerate(paths)]
    if "/" in checked:
        raise InvalidSpec(
            field, "the root itself is listed", "paths beneath it; readonly_rootfs for the root"
        )
    return () if container.security.privileged else tuple(dict.fromkeys(checked))
