"""A container's plan: compiled and checked at CreateContainer, so that StartContainer only carries it out.

It is the last of the steps of a container, after its root filesystem (`rootfs`) and its volumes: it reads
the image's user files and makes mount points in the root.
"""

from __future__ import annotations

import asyncio
import posixpath
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from image.rootfs import HostTree
from image.stores import RootfsStore
from sandbox.apparmor import Policy
from sandbox.container import Container
from sandbox.host.openat import make_at, opened_root
from sandbox.plan import MountSource, compile_container, device_filter_for
from sandbox.plan.devices import RequestedDevice
from sandbox.plan.pod_files import PodFiles, pod_files
from sandbox.plan.users import resolve_user
from sandbox.plan.values import ContainerPlan, Make
from sandbox.records import ContainerUser, PodRecord
from sandbox.seccomp import seccomp_for
from sandbox.spec import AppArmor
from sandbox.steps.node_files import read_node_files

# Of an image's passwd and group files; larger ones are rejected, not read.
MAX_USER_FILE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class CompiledPlan:
    """The plan's file. The callables answer for the place where the container will run; all may block."""

    store: RootfsStore
    rootfs: Callable[[Container], str]  # the directory of the root, as it is seen there
    sources: Callable[[Container], Sequence[MountSource]]  # of its mounts, as they are found there
    devices: Callable[[Container], Sequence[RequestedDevice]]
    policy: Callable[[AppArmor], Policy]
    name = "plan"

    async def up(self, container: Container) -> None:
        """Compile the plan, save it, and record the user. Raises InvalidSpec with the field."""
        await asyncio.to_thread(self._compile, container)

    async def down(self, container: Container) -> None:
        """Delete the plan. Idempotent."""
        container.drop_plan()

    def _compile(self, container: Container) -> None:
        record, pod, rootfs = container.record, container.pod.record, container.rootfs
        user = resolve_user(
            record.spec.security,
            record.defaults.user,
            passwd=self.store.read(rootfs, "etc/passwd", MAX_USER_FILE_BYTES),
            group=self.store.read(rootfs, "etc/group", MAX_USER_FILE_BYTES),
        )
        devices = self.devices(container)
        plan = compile_container(
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
        container.record_user(ContainerUser(uid=user.uid, gid=user.gid, groups=tuple(user.groups)))


def _files(pod: PodRecord) -> PodFiles:
    ips = pod.network.ips if pod.network else ()
    return pod_files(pod.spec, read_node_files(), pod_id=pod.id, ips=ips)


def make_mount_points(rootfs: Path, plan: ContainerPlan) -> None:
    """Create in the root filesystem what the agent would otherwise create before it can mount there.

    This is for speed only: the guest needs several requests over virtio-fs for what is one call here. What
    cannot be created is left for the agent to report. Blocking.
    """
    tops = frozenset(mount.target for mount in plan.mounts)
    with opened_root(rootfs) as root:
        for mount in plan.mounts:
            if mount.make in (Make.DIRECTORY, Make.FILE) and not _beneath(mount.target, tops):
                make_at(root, mount.target, directory=mount.make == Make.DIRECTORY)
        for file in plan.files:
            if not _beneath(file.path, tops):
                make_at(root, file.path, directory=False)


def _beneath(path: str, tops: Collection[str]) -> bool:
    """Return whether another mount covers this path, so that nothing created here would be visible."""
    while path != "/":
        path = posixpath.dirname(path)
        if path in tops:
            return True
    return False
