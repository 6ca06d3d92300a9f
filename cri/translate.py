"""Converts requests to specs. No other file reads the configuration of a pod or container.

Every field is used, or refused with its full path (InvalidSpec), or listed with a reason in
tests/unit/test_translate_fates.py: none is ignored silently.
Pure: no clock, files or event loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

import msgspec

from cri.fields import (
    absolute,
    absolute_or_empty,
    checked_ids,
    one_of,
    optional_id,
    refuse_message,
    required,
)
from cri.proto import runtime_v1_pb2 as pb
from cri.translate_security import (
    apparmor,
    check_namespaces,
    mount_ids,
    pid_mode,
    refuse_selinux,
    seccomp,
    security_spec,
    user_namespace,
)
from sandbox.errors import InvalidSpec
from sandbox.plan.mounts import MOUNT_OPTIONS
from sandbox.spec import (
    CdiRequest,
    ContainerSpec,
    DeviceSpec,
    Dns,
    MountSpec,
    PidMode,
    PodSpec,
    PortMapping,
    Propagation,
    Resources,
)

CDI_ANNOTATION = "cdi.k8s.io/"

# ----------------------------------------------------------------------------------------- pods


def pod_spec(config: pb.PodSandboxConfig, handler: str) -> PodSpec:
    """Convert the configuration of a pod. Raises InvalidSpec."""
    at = "config"
    refuse_message(config, "windows", at, "a pod's VM runs Linux")
    linux = config.linux
    security = linux.security_context
    security_at = f"{at}.linux.security_context"
    refuse_selinux(security.selinux_options, f"{security_at}.selinux_options")
    one_of(
        pb.SupplementalGroupsPolicy,
        security.supplemental_groups_policy,
        f"{security_at}.supplemental_groups_policy",
    )
    run_as_user = optional_id(security, "run_as_user", security_at)
    run_as_group = optional_id(security, "run_as_group", security_at)
    if run_as_group is not None and run_as_user is None:
        raise InvalidSpec(f"{security_at}.run_as_group", "is set without run_as_user", "both or none")
    spec = PodSpec(
        name=required(config.metadata.name, f"{at}.metadata.name"),
        namespace=required(config.metadata.namespace, f"{at}.metadata.namespace"),
        uid=required(config.metadata.uid, f"{at}.metadata.uid"),
        attempt=config.metadata.attempt,
        handler=handler,
        hostname=config.hostname,
        log_directory=absolute_or_empty(config.log_directory, f"{at}.log_directory"),
        labels=dict(config.labels),
        annotations=dict(config.annotations),
        dns=Dns(
            servers=tuple(config.dns_config.servers),
            searches=tuple(config.dns_config.searches),
            options=tuple(config.dns_config.options),
        ),
        port_mappings=tuple(
            _port_mapping(mapping, f"{at}.port_mappings[{n}]")
            for n, mapping in enumerate(config.port_mappings)
        ),
        sysctls=dict(linux.sysctls),
        cgroup_parent=linux.cgroup_parent,
        resources=resources(linux.resources, f"{at}.linux.resources"),
        overhead=resources(linux.overhead, f"{at}.linux.overhead"),
        pid_mode=_pod_pid_mode(security.namespace_options, f"{security_at}.namespace_options"),
        privileged=security.privileged,
        run_as_user=run_as_user,
        run_as_group=run_as_group,
        supplemental_groups=checked_ids(security.supplemental_groups, f"{security_at}.supplemental_groups"),
        readonly_rootfs=security.readonly_rootfs,
        seccomp=seccomp(security, security_at),
        apparmor=apparmor(security, security_at),
        user_namespace=user_namespace(security.namespace_options, f"{security_at}.namespace_options"),
        host_network=security.namespace_options.network == pb.NODE,
        host_ipc=security.namespace_options.ipc == pb.NODE,
    )
    if not spec.host_namespaces:
        return msgspec.structs.replace(spec, cgroup_parent=_cgroup_of_vm(linux))
    if spec.user_namespace:
        problem = f"POD cannot be combined with {spec.host_namespaces[0]} NODE"
        raise InvalidSpec(f"{security_at}.namespace_options.userns_options.mode", problem, "NODE")
    return spec


def _cgroup_of_vm(linux: pb.LinuxPodSandboxConfig) -> str:
    """Return the parent of the pod's cgroup: as requested, or "" for the daemon's own.

    The client limits the requested parent to the containers' memory and the declared overhead. Without
    overhead (no RuntimeClass, or one without it) a VM of that size does not fit, and the OOM killer would end
    the VMM as it starts. The containers are limited in the guest in either case.
    """
    limited = linux.resources.memory_limit_in_bytes > 0
    return "" if limited and not linux.overhead.memory_limit_in_bytes else linux.cgroup_parent


def _port_mapping(mapping: pb.PortMapping, at: str) -> PortMapping:
    name = one_of(pb.Protocol, mapping.protocol, f"{at}.protocol")
    for field, number in (("container_port", mapping.container_port), ("host_port", mapping.host_port)):
        if not 0 <= number <= 65535:
            raise InvalidSpec(f"{at}.{field}", f"{number} is not a port", "0 to 65535")
    if mapping.host_port and not mapping.container_port:
        raise InvalidSpec(f"{at}.container_port", "is missing", "1 to 65535")
    return PortMapping(
        protocol=name.lower(),
        container_port=mapping.container_port,
        host_port=mapping.host_port,
        host_ip=mapping.host_ip,
    )


def _pod_pid_mode(options: pb.NamespaceOption, at: str) -> PidMode:
    check_namespaces(options, at)
    mode = pid_mode(options, at)
    if mode is PidMode.TARGET:
        raise InvalidSpec(f"{at}.pid", "a pod sandbox cannot have TARGET", "POD, CONTAINER, NODE")
    return mode


# ------------------------------------------------------------------------------------ containers


def container_spec(config: pb.ContainerConfig) -> ContainerSpec:
    """Convert the configuration of a container. Raises InvalidSpec.

    The pod's configuration, which a client repeats in CreateContainer, is ignored: the pod keeps the one it
    was started with.
    """
    at = "config"
    refuse_message(config, "windows", at, "a pod's VM runs Linux")
    return ContainerSpec(
        name=required(config.metadata.name, f"{at}.metadata.name"),
        attempt=config.metadata.attempt,
        image=required(config.image.image, f"{at}.image.image"),
        user_specified_image=config.image.user_specified_image,
        command=tuple(config.command),
        args=tuple(config.args),
        working_dir=absolute_or_empty(config.working_dir, f"{at}.working_dir"),
        envs=tuple(_env(env, f"{at}.envs[{n}]") for n, env in enumerate(config.envs)),
        mounts=tuple(
            _mount(mount, config.linux.security_context.privileged, f"{at}.mounts[{n}]")
            for n, mount in enumerate(config.mounts)
        ),
        devices=tuple(_device(device, f"{at}.devices[{n}]") for n, device in enumerate(config.devices)),
        cdi_devices=tuple(_cdi_requests(config, at)),
        labels=dict(config.labels),
        annotations=dict(config.annotations),
        log_path=config.log_path,
        stdin=config.stdin,
        stdin_once=config.stdin_once,
        tty=config.tty,
        resources=resources(config.linux.resources, f"{at}.linux.resources"),
        security=security_spec(config.linux.security_context, f"{at}.linux.security_context"),
        stop_signal=_stop_signal(config.stop_signal, f"{at}.stop_signal"),
    )


def _env(env: pb.KeyValue, at: str) -> tuple[str, bytes]:
    if not env.key or "=" in env.key or "\0" in env.key:
        raise InvalidSpec(
            f"{at}.key", f"{env.key!r} is not a valid name of a variable", "a name without = and NUL"
        )
    if b"\0" in env.value:
        raise InvalidSpec(f"{at}.value", "contains a NUL byte", "bytes without NUL")
    return env.key, env.value


_PROPAGATION = {
    pb.PROPAGATION_PRIVATE: Propagation.PRIVATE,
    pb.PROPAGATION_HOST_TO_CONTAINER: Propagation.HOST_TO_CONTAINER,
    pb.PROPAGATION_BIDIRECTIONAL: Propagation.BIDIRECTIONAL,
}


def _mount(mount: pb.Mount, privileged: bool, at: str) -> MountSpec:
    propagation = _propagation(mount, privileged, at)
    if mount.recursive_read_only and not mount.readonly:
        raise InvalidSpec(f"{at}.recursive_read_only", "is set on a writable mount", "readonly as well")
    if mount.recursive_read_only and propagation is not Propagation.PRIVATE:
        raise InvalidSpec(
            f"{at}.recursive_read_only", "cannot be combined with propagation", "PROPAGATION_PRIVATE"
        )
    if mount.HasField("image"):
        _check_image_volume(mount, at)
    elif mount.image_sub_path:
        raise InvalidSpec(f"{at}.image_sub_path", "is set without an image", "an empty path")
    return MountSpec(
        container_path=absolute(mount.container_path, f"{at}.container_path"),
        host_path="" if mount.HasField("image") else absolute(mount.host_path, f"{at}.host_path"),
        readonly=mount.readonly,
        recursive_readonly=mount.recursive_read_only,
        propagation=propagation,
        selinux_relabel=mount.selinux_relabel,
        image=mount.image.image,
        user_specified_image=mount.image.user_specified_image,
        image_sub_path=mount.image_sub_path,
        options=tuple(
            _mount_option(text, f"{at}.mount_options[{n}]") for n, text in enumerate(mount.mount_options)
        ),
        ids=mount_ids(mount, at),
    )


def _check_image_volume(mount: pb.Mount, at: str) -> None:
    required(mount.image.image, f"{at}.image.image")
    if mount.host_path:
        raise InvalidSpec(f"{at}.host_path", "is set together with an image", "one of the two")
    if not mount.readonly:
        raise InvalidSpec(f"{at}.readonly", "is not set, but the source is an image", "a read-only mount")
    path = PurePosixPath(mount.image_sub_path)
    if path.is_absolute() or ".." in path.parts or "\0" in mount.image_sub_path:
        raise InvalidSpec(
            f"{at}.image_sub_path",
            f"{mount.image_sub_path!r} points outside the image",
            "a path relative to its root",
        )


def _mount_option(option: str, at: str) -> str:
    if option not in MOUNT_OPTIONS:
        raise InvalidSpec(at, f"{option!r} is not supported", ", ".join(MOUNT_OPTIONS))
    return option


def _propagation(mount: pb.Mount, privileged: bool, at: str) -> Propagation:
    one_of(pb.MountPropagation, mount.propagation, f"{at}.propagation")
    propagation = _PROPAGATION[mount.propagation]
    if propagation is Propagation.BIDIRECTIONAL and not privileged:
        problem = "PROPAGATION_BIDIRECTIONAL: the container is not privileged"
        raise InvalidSpec(f"{at}.propagation", problem, "PROPAGATION_PRIVATE, PROPAGATION_HOST_TO_CONTAINER")
    return propagation


def _device(device: pb.Device, at: str) -> DeviceSpec:
    permissions = device.permissions or "rwm"
    if set(permissions) - set("rwm"):
        raise InvalidSpec(
            f"{at}.permissions", f"{permissions!r} are not valid permissions", "any of r, w and m"
        )
    return DeviceSpec(
        container_path=absolute(device.container_path, f"{at}.container_path"),
        host_path=absolute(device.host_path, f"{at}.host_path"),
        permissions=permissions,
    )


def _cdi_requests(config: pb.ContainerConfig, at: str) -> Iterator[CdiRequest]:
    """Yield requests of the field, and of annotations, which device plug-ins of older kubelets set."""
    for number, device in enumerate(config.CDI_devices):
        yield CdiRequest(name=device.name, field=f"{at}.CDI_devices[{number}].name")
    for key, value in config.annotations.items():
        if key.startswith(CDI_ANNOTATION):
            for name in value.split(","):
                yield CdiRequest(name=name, field=f"{at}.annotations[{key!r}]")


def _stop_signal(number: int, at: str) -> str:
    name = one_of(pb.Signal, number, at).removeprefix("SIGNAL_")
    if number == pb.SIGNAL_RUNTIME_DEFAULT:
        return ""
    return name.replace("PLUS", "+").replace("MINUS", "-")


# ------------------------------------------------------------------------------------- resources


def resources(wire: pb.LinuxContainerResources, at: str) -> Resources:
    """Convert limits; 0 and "" mean "not set", in the message and in the result. Raises InvalidSpec."""
    for field in ("cpu_period", "cpu_shares", "memory_limit_in_bytes"):
        if getattr(wire, field) < 0:
            raise InvalidSpec(f"{at}.{field}", f"{getattr(wire, field)} is negative", "0 or more")
    if not -1000 <= wire.oom_score_adj <= 1000:
        raise InvalidSpec(f"{at}.oom_score_adj", f"{wire.oom_score_adj} is out of range", "-1000 to 1000")
    return Resources(
        cpu_period=wire.cpu_period,
        cpu_quota=wire.cpu_quota,
        cpu_shares=wire.cpu_shares,
        memory_limit=wire.memory_limit_in_bytes,
        memory_swap_limit=wire.memory_swap_limit_in_bytes,
        oom_score_adj=wire.oom_score_adj,
        cpuset_cpus=wire.cpuset_cpus,
        cpuset_mems=wire.cpuset_mems,
        hugepage_limits=_hugepages(wire.hugepage_limits, f"{at}.hugepage_limits"),
        unified=dict(wire.unified),
    )


def _hugepages(limits: Iterable[pb.HugepageLimit], at: str) -> dict[str, int]:
    return {required(limit.page_size, f"{at}[{n}].page_size"): limit.limit for n, limit in enumerate(limits)}


def update_resources(request: pb.UpdateContainerResourcesRequest) -> Resources:
    """Convert the limits of an update. Its annotations are hints, of which Husk defines none. Raises
    InvalidSpec."""
    refuse_message(request, "windows", "", "a pod's VM runs Linux")
    return resources(request.linux, "linux")
