"""What is mounted in a container, and in which order. Pure.

The standard file systems (OCI runtime-spec, config-linux.md, "Default Filesystems", and what
containerd and CRI-O add), then the client's mounts, sorted so that a target is mounted after those
that it lies beneath. A client's mount replaces a standard one at or beneath its target.

The kernel propagates mounts no further than the guest: with BIDIRECTIONAL a container sees the host's later
mounts and shares its own with the namespaces that it makes. `vm_pods.propagation` repeats them on the host.

An image's VOLUME needs no mount: the writable layer lives exactly as long. Only where the root is
read-only it gets one: its own directory in the root is bound over itself, and stays writable.
"""

from __future__ import annotations

from collections.abc import Sequence

from sandbox.capabilities import capability_sets, includes
from sandbox.errors import InvalidSpec
from sandbox.host.ids import to_outside
from sandbox.host.mount_flags import (
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_SHARED,
    MS_SLAVE,
    MS_STRICTATIME,
)
from sandbox.plan.paths import container_path, covers, depth
from sandbox.plan.values import Make, MountPlan
from sandbox.spec import (
    ContainerSpec,
    ImageDefaults,
    MountSpec,
    Propagation,
    SecuritySpec,
    UserNamespace,
    Value,
)

POD_SHM = "/run/husk/shm"

# Where dockerd, containerd, buildkitd and podman keep layers by default.
ENGINE_DIRECTORIES = ("/var/lib/docker", "/var/lib/containerd", "/var/lib/buildkit", "/var/lib/containers")

_INERT = MS_NOSUID | MS_NODEV | MS_NOEXEC
_OPTIONS = {"noexec": MS_NOEXEC, "nodev": MS_NODEV, "nosuid": MS_NOSUID}
MOUNT_OPTIONS = tuple(_OPTIONS)
_PROPAGATION = {
    Propagation.PRIVATE: MS_PRIVATE | MS_REC,
    Propagation.HOST_TO_CONTAINER: MS_SLAVE | MS_REC,
    Propagation.BIDIRECTIONAL: MS_SHARED | MS_REC,
}


class MountSource(Value, frozen=True, kw_only=True):
    """The source of a specification's mount, where the container runs."""

    path: str
    is_directory: bool
    # Mount points of the host below it, relative to it, where they must not become read-only with it. The
    # guest looks them up before it sets the flag, as they would inherit the flag from their parent.
    submounts: tuple[str, ...] = ()
    within: str = ""  # what `path` is or lies beneath, no link being followed there; empty: anywhere
    parts: tuple[str, ...] = ()  # paths beneath it where the guest has other mounts that belong to it


def mount_targets(container: ContainerSpec) -> list[str]:
    """Return the targets of the client's mounts, normalized. Raises InvalidSpec."""
    targets = []
    for number, mount in enumerate(container.mounts):
        field = f"config.mounts[{number}].container_path"
        target = container_path(mount.container_path, field)
        if target == "/":
            raise InvalidSpec(field, "is the root of the container", "a path beneath it")
        targets.append(target)
    return targets


def compile_mounts(
    container: ContainerSpec, defaults: ImageDefaults, sources: Sequence[MountSource]
) -> tuple[MountPlan, ...]:
    """Return all mounts in the order of mounting; `sources` are those of the client's mounts.

    Raises InvalidSpec with the field.
    """
    targets = mount_targets(container)
    requested = [
        _bind(number, mount, target, source)
        for number, (mount, target, source) in enumerate(zip(container.mounts, targets, sources, strict=True))
    ]
    ours = [*_standard(container.security), *_volumes(container, defaults)]
    kept = [mount for mount in ours if not any(covers(target, mount.target) for target in targets)]
    return tuple(sorted([*kept, *requested], key=lambda mount: depth(mount.target)))  # stable


def plain_directories(container: ContainerSpec, defaults: ImageDefaults) -> tuple[str, ...]:
    """Return the directories of the root on which the container may want to mount overlays, none beneath
    another: only one that may mount needs them.

    They are the VOLUMEs of its image (those of Docker, podman and buildkit declare where they keep layers),
    and the places where these programs keep them by default. Raises InvalidSpec.
    """
    if not includes(capability_sets(container.security).effective, "SYS_ADMIN"):
        return ()
    volumes = [container_path(path, "the image's Volumes") for path in defaults.volumes]
    places = () if container.security.readonly_rootfs else ENGINE_DIRECTORIES
    covering = mount_targets(container)
    found: list[str] = []
    for path in sorted((*volumes, *places), key=depth):
        if path != "/" and not any(covers(other, path) for other in (*covering, *found)):
            found.append(path)
    return tuple(found)


def rootfs_propagation(container: ContainerSpec) -> int:
    """Return how the root propagates: as a slave of the guest's tree where a mount must receive from it.

    It is never a peer, as mounts of the container must not appear in the guest.
    """
    if all(mount.propagation is Propagation.PRIVATE for mount in container.mounts):
        return 0
    return MS_SLAVE | MS_REC


def _bind(number: int, mount: MountSpec, target: str, source: MountSource) -> MountPlan:
    field = f"config.mounts[{number}].recursive_read_only"
    if mount.recursive_readonly and not mount.readonly:
        raise InvalidSpec(field, "the mount is not read-only", "readonly beside it")
    if mount.recursive_readonly and mount.propagation is not Propagation.PRIVATE:
        raise InvalidSpec(field, f"propagation is {mount.propagation.value}", "PROPAGATION_PRIVATE")
    return MountPlan(
        source=source.path,
        target=target,
        flags=MS_BIND | MS_REC | (MS_RDONLY if mount.readonly else 0) | _option_flags(mount),
        propagation=_PROPAGATION[mount.propagation],
        make=Make.DIRECTORY if source.is_directory else Make.FILE,
        recursive_readonly=mount.recursive_readonly or bool(mount.image),
        submounts=source.submounts,
        within=source.within,
        parts=source.parts,
    )


def _option_flags(mount: MountSpec) -> int:
    return sum({_OPTIONS[option] for option in mount.options})


def _standard(security: SecuritySpec) -> list[MountPlan]:
    privileged = security.privileged
    kernel_tree = _INERT if privileged else _INERT | MS_RDONLY
    space = security.user_namespace
    # gid 5 is tty on every distribution; mounts are made outside of the user namespace, with ids from there
    tty = to_outside(space.gids, 5, unmapped=5) if space else 5
    return [
        _file_system("proc", "/proc", _INERT),
        _devices_of_guest() if privileged else _devices_of_container(space),
        _file_system("sysfs", "/sys", kernel_tree),
        _file_system(
            "devpts",
            "/dev/pts",
            MS_NOSUID | MS_NOEXEC,
            f"newinstance,ptmxmode=0666,mode=0620,gid={tty}",
        ),
        _file_system("mqueue", "/dev/mqueue", _INERT),
        MountPlan(source=POD_SHM, target="/dev/shm", flags=MS_BIND | _INERT, make=Make.DIRECTORY),
        _file_system("cgroup2", "/sys/fs/cgroup", kernel_tree, make=Make.NOTHING),
    ]


def _devices_of_container(space: UserNamespace | None) -> MountPlan:
    owner = ""
    if space:
        uid, gid = to_outside(space.uids, 0, unmapped=0), to_outside(space.gids, 0, unmapped=0)
        owner = f",uid={uid},gid={gid}"
    return _file_system("tmpfs", "/dev", MS_NOSUID | MS_STRICTATIME, f"mode=0755,size=65536k{owner}")


def _devices_of_guest() -> MountPlan:
    """Return the /dev of a privileged container: all devices of the guest, those to come included."""
    return _file_system("devtmpfs", "/dev", MS_NOSUID | MS_NOEXEC)


def _file_system(
    type: str, target: str, flags: int, data: str = "", *, make: Make = Make.DIRECTORY
) -> MountPlan:
    return MountPlan(source=type, target=target, type=type, flags=flags, data=data, make=make)


def _volumes(container: ContainerSpec, defaults: ImageDefaults) -> list[MountPlan]:
    if not container.security.readonly_rootfs:
        return []
    targets = (container_path(path, "the image's Volumes") for path in defaults.volumes)
    return [
        MountPlan(source="", target=target, flags=MS_BIND | MS_NOSUID | MS_NODEV, make=Make.DIRECTORY)
        for target in dict.fromkeys(targets)
        if target != "/"
    ]
