"""What a container holds of the host: its root filesystem, its volumes, its plan.

rootfs    the overlay mount, in the share that the guest sees as GUEST_ROOTFS/<id>
volumes   one bind per mount of the specification, seen as GUEST_VOLUMES/<id>/<n>
plan      what the agent will be told, compiled and checked
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from image.stores import RootfsStore
from sandbox import mounts
from sandbox.container import Container
from sandbox.environment import pod_files
from sandbox.errors import InvalidSpec
from sandbox.plan import MountSource, compile_start, device_filter_for, seccomp_for
from sandbox.records import User
from sandbox.rooted import read_beneath
from sandbox.spec import MountSpec, Propagation
from sandbox.steps import GUEST_ROOTFS, GUEST_VOLUMES, remove_tree
from sandbox.users import resolve_user

# An image's passwd and group files; larger ones are refused rather than read.
MAX_USER_FILE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Rootfs:
    store: RootfsStore
    name = "rootfs"

    async def up(self, container: Container) -> None:
        target = container.pod.back_of(container.pod.rootfs_share) / container.id
        await asyncio.to_thread(target.mkdir, 0o755, exist_ok=True)
        await self.store.up(container.id, container.record.chain_ids, container.rootfs)

    async def down(self, container: Container) -> None:
        await self.store.down(container.id, container.rootfs)
        target = container.pod.back_of(container.pod.rootfs_share) / container.id
        if target.exists():
            await asyncio.to_thread(target.rmdir)


@dataclass(frozen=True, slots=True)
class Volumes:
    name = "volumes"

    async def up(self, container: Container) -> None:
        if container.record.spec.mounts:
            await asyncio.to_thread(self._bind_all, container)

    async def down(self, container: Container) -> None:
        back = container.pod.back_of(container.pod.volumes_share) / container.id
        await asyncio.to_thread(mounts.unmount_tree, container.volumes)
        await asyncio.to_thread(remove_tree, back)

    def _bind_all(self, container: Container) -> None:
        back = container.pod.back_of(container.pod.volumes_share) / container.id
        back.mkdir(mode=0o755, exist_ok=True)
        for number, mount in enumerate(container.record.spec.mounts):
            source = resolved_source(number, mount)
            point = back / str(number)
            if source.is_dir():
                point.mkdir(mode=0o755)
            else:
                point.touch(mode=0o644)
            self._bind(source, container.volumes / str(number), mount)

    def _bind(self, source: Path, target: Path, mount: MountSpec) -> None:
        mounts.bind(source, target)
        # out of the source's peer group: what is mounted below here stays here
        mounts.set_propagation(target, mounts.MS_PRIVATE | mounts.MS_REC)
        if mount.propagation is Propagation.HOST_TO_CONTAINER:
            mounts.unmount_tree(target)
            mounts.bind(source, target)
            mounts.set_propagation(target, mounts.MS_SLAVE | mounts.MS_REC)
        mounts.set_propagation(target, mounts.MS_SHARED | mounts.MS_REC)
        if mount.readonly:
            mounts.make_readonly(target, recursive=mount.recursive_readonly)


def resolved_source(number: int, mount: MountSpec) -> Path:
    """The host path with links followed, as it is now. Raises InvalidSpec when there is none."""
    source = Path(os.path.realpath(mount.host_path))
    if not source.exists():
        raise InvalidSpec(f"config.mounts[{number}].host_path", f"{mount.host_path!r} does not exist")
    return source


@dataclass(frozen=True, slots=True)
class Plan:
    name = "plan"

    async def up(self, container: Container) -> None:
        await asyncio.to_thread(self._compile, container)

    async def down(self, container: Container) -> None:
        container.plan_path.unlink(missing_ok=True)

    def _compile(self, container: Container) -> None:
        record, pod = container.record, container.pod.record
        user = resolve_user(
            record.spec.security,
            record.defaults.user,
            passwd=read_beneath(container.rootfs, "etc/passwd", MAX_USER_FILE_BYTES),
            group=read_beneath(container.rootfs, "etc/group", MAX_USER_FILE_BYTES),
        )
        plan = compile_start(
            record.spec,
            pod.spec,
            record.defaults,
            container_id=container.id,
            rootfs=f"{GUEST_ROOTFS}/{container.id}",
            mount_sources=[
                MountSource(
                    path=f"{GUEST_VOLUMES}/{container.id}/{number}",
                    is_directory=resolved_source(number, mount).is_dir(),
                )
                for number, mount in enumerate(record.spec.mounts)
            ],
            user=user,
            files=pod_files(pod),
            seccomp=seccomp_for(record.spec.security),
            device_filter=device_filter_for(record.spec),
            vcpus=container.pod.vcpus,
        )
        container.save_plan(plan)
        container.update(user=User(uid=user.uid, gid=user.gid, groups=tuple(user.groups)))
