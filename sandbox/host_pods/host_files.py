"""Devices, volumes and limits as they are on the host, for a container's plan. Everything here blocks."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from sandbox.container import Container
from sandbox.errors import InvalidSpec
from sandbox.host_pods.oci import NodeLimits
from sandbox.plan import MountSource
from sandbox.plan.devices import RequestedDevice
from sandbox.plan.paths import container_path
from sandbox.plan.values import DevicePlan
from sandbox.spec import ContainerSpec, Propagation
from sandbox.steps.volumes import open_source

# Entries of a container's /dev that are its own, or not devices
_OWN = ("console", "fd", "mqueue", "ptmx", "pts", "shm", "stderr", "stdin", "stdout")
_KINDS = (stat.S_IFCHR, stat.S_IFBLK)


def find_volumes(container: Container) -> list[MountSource]:
    """Return the sources of the container's mounts. Raises InvalidSpec for a missing or unusable one."""
    return [_volume(container, number) for number in range(len(container.record.spec.mounts))]


def _volume(container: Container, number: int) -> MountSource:
    mount = container.record.spec.mounts[number]
    at = f"config.mounts[{number}]"
    if mount.ids is not None:
        raise InvalidSpec(f"{at}.uidMappings", "the pod has no user namespace", "an empty list")
    source = open_source(container, number, mount)
    try:
        path = str(Path(f"/proc/self/fd/{source}").readlink())  # links followed, within an image too
        if mount.propagation is Propagation.BIDIRECTIONAL and not _is_shared(source):
            problem = f"PROPAGATION_BIDIRECTIONAL: {path!r} is not on a shared mount of the host"
            raise InvalidSpec(f"{at}.propagation", problem, "a path on a shared mount")
        return MountSource(path=path, is_directory=stat.S_ISDIR(os.fstat(source).st_mode))
    finally:
        os.close(source)


def _is_shared(source: int) -> bool:
    """Return whether its mount has a peer group (proc_pid_mountinfo(5))."""
    info = Path(f"/proc/self/fdinfo/{source}").read_text()
    id = next(line.split()[1] for line in info.splitlines() if line.startswith("mnt_id:"))
    with Path("/proc/self/mountinfo").open() as table:
        lines = (line.split() for line in table)
        return any(fields[0] == id and any("shared:" in each for each in fields[6:8]) for fields in lines)


def find_devices(container: ContainerSpec) -> Sequence[RequestedDevice]:
    """Return the requested devices; a directory means all devices in it. Raises InvalidSpec."""
    found = []
    for number, device in enumerate(container.devices):
        field = f"config.devices[{number}]"
        source = Path(os.path.realpath(device.host_path))
        target = container_path(device.container_path or device.host_path, f"{field}.container_path")
        if source.is_dir():
            nodes = [
                DevicePlan(
                    f"{target}/{path.relative_to(source)}", node.major, node.minor, node.mode, node.type
                )
                for path, node in _nodes_below(source)
            ]
        else:
            node = _node(source, target)
            nodes = [node] if node else []
        if not nodes:
            raise InvalidSpec(
                f"{field}.host_path", f"{device.host_path!r} is not a device", "a device's path"
            )
        found += [RequestedDevice(node, device.permissions) for node in nodes]
    return found


def node_limits() -> NodeLimits:
    """Return the limits of the daemon, beyond which it cannot give a container anything."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    status = Path("/proc/self/status").read_text().splitlines()
    bounding = next(line.split()[1] for line in status if line.startswith("CapBnd:"))
    return NodeLimits(
        open_files=hard if hard != resource.RLIM_INFINITY else (1 << 30),
        capabilities=int(bounding, 16),
    )


def all_devices() -> list[DevicePlan]:
    """Return all devices of the host, for a privileged container."""
    return [
        node for path, node in _nodes_below(Path("/dev")) if path.relative_to("/dev").parts[0] not in _OWN
    ]


def _nodes_below(directory: Path) -> Iterator[tuple[Path, DevicePlan]]:
    for folder, _, names in os.walk(directory):
        for path in (Path(folder, name) for name in sorted(names)):
            node = _node(path, str(path))
            if node is not None:
                yield path, node


def _node(path: Path, target: str) -> DevicePlan | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    if stat.S_IFMT(status.st_mode) not in _KINDS:
        return None
    return DevicePlan(
        target,
        os.major(status.st_rdev),
        os.minor(status.st_rdev),
        mode=stat.S_IMODE(status.st_mode),
        type=stat.S_IFMT(status.st_mode),
    )
