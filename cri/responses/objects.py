"""Converts records of pods, containers and images to CRI messages. Pure: no clock, files or event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cri.proto import runtime_v1_pb2 as pb
from image.index import Image
from sandbox.host.ids import IdRange
from sandbox.plan.users import image_user
from sandbox.records import ContainerRecord, ContainerState, ContainerUser, PodRecord
from sandbox.spec import (
    MountSpec,
    PodSpec,
    Propagation,
    Resources,
    UserNamespace,
)

# ----------------------------------------------------------------------------------------- pods


def pod_state(record: PodRecord) -> pb.PodSandboxState.ValueType:
    """Return READY or NOTREADY."""
    return pb.SANDBOX_READY if record.ready else pb.SANDBOX_NOTREADY


def pod_metadata(spec: PodSpec) -> pb.PodSandboxMetadata:
    """Return the metadata as it was requested."""
    return pb.PodSandboxMetadata(name=spec.name, uid=spec.uid, namespace=spec.namespace, attempt=spec.attempt)


def pod_item(record: PodRecord) -> pb.PodSandbox:
    """Return the item of ListPodSandbox."""
    return pb.PodSandbox(
        id=record.id,
        metadata=pod_metadata(record.spec),
        state=pod_state(record),
        created_at=record.created_at_ns,
        labels=record.spec.labels,
        annotations=record.spec.annotations,
        runtime_handler=record.spec.handler,
    )


def pod_status(record: PodRecord) -> pb.PodSandboxStatus:
    """Return the status. A stopped pod keeps its addresses, as a kubelet still reads them."""
    ips = record.network.ips if record.network else ()
    options = pb.NamespaceOption(
        network=pb.NODE if record.spec.host_network else pb.POD,
        pid=pb.NamespaceMode.Value(record.spec.pid_mode.name),
        ipc=pb.NODE if record.spec.host_ipc else pb.POD,
        userns_options=_user_namespace(record.spec.user_namespace),
    )
    return pb.PodSandboxStatus(
        id=record.id,
        metadata=pod_metadata(record.spec),
        state=pod_state(record),
        created_at=record.created_at_ns,
        network=pb.PodSandboxNetworkStatus(
            ip=ips[0] if ips else "", additional_ips=[pb.PodIP(ip=ip) for ip in ips[1:]]
        ),
        linux=pb.LinuxPodSandboxStatus(namespaces=pb.Namespace(options=options)),
        labels=record.spec.labels,
        annotations=record.spec.annotations,
        runtime_handler=record.spec.handler,
    )


# ------------------------------------------------------------------------------------ containers

_STATES = {
    ContainerState.CREATING: pb.CONTAINER_CREATED,  # not listed, as its client does not have the id yet
    ContainerState.CREATED: pb.CONTAINER_CREATED,
    ContainerState.RUNNING: pb.CONTAINER_RUNNING,
    ContainerState.EXITED: pb.CONTAINER_EXITED,
    ContainerState.UNKNOWN: pb.CONTAINER_UNKNOWN,
}


def container_state(record: ContainerRecord) -> pb.ContainerState.ValueType:
    """Return the state in the CRI's terms."""
    return _STATES[record.state]


def container_metadata(record: ContainerRecord) -> pb.ContainerMetadata:
    """Return the metadata as it was requested."""
    return pb.ContainerMetadata(name=record.spec.name, attempt=record.spec.attempt)


def _image_spec(record: ContainerRecord) -> pb.ImageSpec:
    return pb.ImageSpec(image=record.spec.image, user_specified_image=record.spec.user_specified_image)


def container_item(record: ContainerRecord) -> pb.Container:
    """Return the item of ListContainers."""
    return pb.Container(
        id=record.id,
        pod_sandbox_id=record.pod_id,
        metadata=container_metadata(record),
        image=_image_spec(record),
        image_ref=record.image_ref,
        image_id=record.image_id,
        state=container_state(record),
        created_at=record.created_at_ns,
        labels=record.spec.labels,
        annotations=record.spec.annotations,
    )


def container_status(record: ContainerRecord) -> pb.ContainerStatus:
    """Return the status."""
    return pb.ContainerStatus(
        id=record.id,
        metadata=container_metadata(record),
        state=container_state(record),
        created_at=record.created_at_ns,
        started_at=record.started_at_ns,
        finished_at=record.finished_at_ns,
        exit_code=record.exit_code,
        image=_image_spec(record),
        image_ref=record.image_ref,
        image_id=record.image_id,
        reason=record.reason,
        message=record.message,
        labels=record.spec.labels,
        annotations=record.spec.annotations,
        mounts=[_mount(number, mount, record) for number, mount in enumerate(record.spec.mounts)],
        log_path=record.log_path,
        resources=pb.ContainerResources(linux=_resources(record.resources)),
        user=_user(record.user),
        stop_signal=stop_signal(record.stop_signal),
    )


_PROPAGATION = {
    Propagation.PRIVATE: pb.PROPAGATION_PRIVATE,
    Propagation.HOST_TO_CONTAINER: pb.PROPAGATION_HOST_TO_CONTAINER,
    Propagation.BIDIRECTIONAL: pb.PROPAGATION_BIDIRECTIONAL,
}


def _user_namespace(space: UserNamespace | None) -> pb.UserNamespace | None:
    if space is None:
        return None
    return pb.UserNamespace(mode=pb.POD, uids=_id_ranges(space.uids), gids=_id_ranges(space.gids))


def _id_ranges(ranges: Sequence[IdRange]) -> list[pb.IDMapping]:
    return [
        pb.IDMapping(container_id=each.inside, host_id=each.outside, length=each.length) for each in ranges
    ]


def _mount(number: int, mount: MountSpec, record: ContainerRecord) -> pb.Mount:
    return pb.Mount(
        container_path=mount.container_path,
        host_path=mount.host_path,
        readonly=mount.readonly,
        recursive_read_only=mount.recursive_readonly,
        propagation=_PROPAGATION[mount.propagation],
        selinux_relabel=mount.selinux_relabel,
        image=_image_volume(number, mount, record),
        image_sub_path=mount.image_sub_path,
        mount_options=mount.options,
        uidMappings=_id_ranges(mount.ids.uids) if mount.ids else (),
        gidMappings=_id_ranges(mount.ids.gids) if mount.ids else (),
    )


def _image_volume(number: int, mount: MountSpec, record: ContainerRecord) -> pb.ImageSpec | None:
    """Return the image of a mount, with the id that its name was resolved to."""
    for volume in record.image_volumes:
        if volume.mount == number:
            return pb.ImageSpec(
                image=mount.image,
                user_specified_image=mount.user_specified_image,
                image_ref=volume.image_id,
            )
    return None


def _resources(resources: Resources) -> pb.LinuxContainerResources:
    return pb.LinuxContainerResources(
        cpu_period=resources.cpu_period,
        cpu_quota=resources.cpu_quota,
        cpu_shares=resources.cpu_shares,
        memory_limit_in_bytes=resources.memory_limit,
        memory_swap_limit_in_bytes=resources.memory_swap_limit,
        oom_score_adj=resources.oom_score_adj,
        cpuset_cpus=resources.cpuset_cpus,
        cpuset_mems=resources.cpuset_mems,
        hugepage_limits=[
            pb.HugepageLimit(page_size=size, limit=limit) for size, limit in resources.hugepage_limits.items()
        ],
        unified=resources.unified,
    )


def _user(user: ContainerUser) -> pb.ContainerUser:
    return pb.ContainerUser(
        linux=pb.LinuxContainerUser(uid=user.uid, gid=user.gid, supplemental_groups=user.groups)
    )


_SIGNALS = dict(pb.Signal.items())


def stop_signal(name: str) -> pb.Signal.ValueType:
    """Return the CRI's value for a name such as "SIGRTMIN+3"; RUNTIME_DEFAULT if it has none."""
    return _SIGNALS.get(
        f"SIGNAL_{name.replace('+', 'PLUS').replace('-', 'MINUS')}", pb.SIGNAL_RUNTIME_DEFAULT
    )


# -------------------------------------------------------------------------------------- images


def image(image: Image) -> pb.Image:
    """Return the item of ListImages."""
    uid, username = image_user(image.config.user)
    return pb.Image(
        id=image.id,
        repo_tags=image.repo_tags,
        repo_digests=image.repo_digests,
        size=image.size,
        uid=None if uid is None else pb.Int64Value(value=uid),
        username=username,
        pinned=image.pinned,
    )


def filesystem(mountpoint: str, at_ns: int, used_bytes: int, inodes: int) -> pb.FilesystemUsage:
    """Return usage of a filesystem at a time in nanoseconds since the epoch."""
    return pb.FilesystemUsage(
        timestamp=at_ns,
        fs_id=pb.FilesystemIdentifier(mountpoint=mountpoint),
        used_bytes=pb.UInt64Value(value=used_bytes),
        inodes_used=pb.UInt64Value(value=inodes),
    )


# -------------------------------------------------------------------------------------- filters


def labels_match(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether the labels have every pair of the selector."""
    return all(labels.get(key) == value for key, value in selector.items())


def matching_pods(
    records: Sequence[PodRecord], filter: pb.PodSandboxFilter | pb.PodSandboxStatsFilter
) -> list[PodRecord]:
    """Return the pods that meet every condition. An id may be a prefix, as crictl prints 13 digits."""
    if not filter.ByteSize():  # the kubelet's request
        return list(records)
    state = (
        filter.state.state if isinstance(filter, pb.PodSandboxFilter) and filter.HasField("state") else None
    )
    id, labels = filter.id, dict(filter.label_selector)
    return [
        record
        for record in records
        if record.id.startswith(id)
        and (state is None or pod_state(record) == state)
        and labels_match(record.spec.labels, labels)
    ]


def matching_containers(
    records: Sequence[ContainerRecord], filter: pb.ContainerFilter | pb.ContainerStatsFilter
) -> list[ContainerRecord]:
    """Return the containers that meet every condition. Ids may be prefixes."""
    if not filter.ByteSize():
        return list(records)
    state = (
        filter.state.state if isinstance(filter, pb.ContainerFilter) and filter.HasField("state") else None
    )
    id, pod_id, labels = filter.id, filter.pod_sandbox_id, dict(filter.label_selector)
    return [
        record
        for record in records
        if record.id.startswith(id)
        and record.pod_id.startswith(pod_id)
        and (state is None or container_state(record) == state)
        and labels_match(record.spec.labels, labels)
    ]
