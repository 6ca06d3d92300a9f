"""A container's plan: compiled and checked at CreateContainer, so that StartContainer only carries it out.

It is the last of the steps of a container, after its root filesystem (`rootfs`) and its volumes: it reads
the image's user files and makes mount points in the root.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from image.rootfs import HostTree
from image.stores import RootfsStore
from sandbox.apparmor import Policy
from sandbox.container import Container
from sandbox.host.openat import make_beneath
from sandbox.plan import MountSource, compile_start, device_filter_for
from sandbox.plan.devices import RequestedDevice
from sandbox.plan.paths import covers
from sandbox.plan.pod_files import PodFiles, pod_files
from sandbox.plan.users import resolve_user
from sandbox.plan.values import ContainerPlan, Make
from sandbox.records import PodRecord, User
from sandbox.seccomp import seccomp_for
from sandbox.spec import AppArmor, ContainerSpec
from sandbox.steps.node_files import read_node_files

# An image's passwd and group files; larger ones are refused rather than read.
MAX_USER_FILE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class CompiledPlan:
    """The callables tell what there is where the container will run."""

    store: RootfsStore
    rootfs: Callable[[Container], str]
    sources: Callable[[Container], Sequence[MountSource]]
    devices: Callable[[ContainerSpec], Sequence[RequestedDevice]]
    policy: Callable[[AppArmor], Policy]
    name = "plan"

    async def up(self, container: Container) -> None:
        await asyncio.to_thread(self._compile, container)

    async def down(self, container: Container) -> None:
        container.plan_path.unlink(missing_ok=True)

    def _compile(self, container: Container) -> None:
        record, pod, rootfs = container.record, container.pod.record, container.rootfs
        user = resolve_user(
            record.spec.security,
            record.defaults.user,
            passwd=self.store.read(rootfs, "etc/passwd", MAX_USER_FILE_BYTES),
            group=self.store.read(rootfs, "etc/group", MAX_USER_FILE_BYTES),
        )
        devices = self.devices(record.spec)
        plan = compile_start(
            record.spec,
            pod.spec,
            record.defaults,
            container_id=container.id,
            rootfs=self.rootfs(container),
            mount_sources=self.sources(container),
            user=user,
            files=_files(pod),
            seccomp=seccomp_for(record.spec.security),
            device_filter=device_filter_for(record.spec, devices),
            apparmor=self.policy(record.spec.security.apparmor),
            vcpus=container.pod.vcpus,
            devices=devices,
        )
        if isinstance(rootfs, HostTree):
            make_mount_points(Path(rootfs.path), plan)
        container.save_plan(plan)
        container.update(user=User(uid=user.uid, gid=user.gid, groups=tuple(user.groups)))


def _files(pod: PodRecord) -> PodFiles:
    ips = pod.network.ips if pod.network else ()
    return pod_files(pod.spec, read_node_files(), pod_id=pod.id, ips=ips)


def make_mount_points(rootfs: Path, plan: ContainerPlan) -> None:
    """What the agent would have to create in the root filesystem before it can mount there.

    Only a matter of speed: the guest needs several requests over virtio-fs for what is one call here.
    """
    tops = [mount.target for mount in plan.mounts]
    for mount in plan.mounts:
        if mount.make in (Make.DIRECTORY, Make.FILE) and not _beneath(mount.target, tops):
            make_beneath(rootfs, mount.target, directory=mount.make == Make.DIRECTORY)
    for file in plan.files:
        if not _beneath(file.path, tops):
            make_beneath(rootfs, file.path, directory=False)


def _beneath(path: str, tops: Sequence[str]) -> bool:
    """Whether another mount covers this place, so that nothing here will be seen there."""
    return any(top != path and covers(top, path) for top in tops)
