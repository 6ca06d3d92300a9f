"""Steps that every kind of pod shares: what it holds of the host, one step per resource.

    run-dir   the directory of the pod's sockets, mounts and files
    cgroup    the cgroup of everything that runs for the pod
    netns     the network namespace, and the tap that will carry its first interface
    shares    where root file systems and volumes are mounted: shared, so that virtiofsd sees later
              mounts, and read-only themselves
    network   CNI attachments, address leases

Each `down` needs nothing but the pod's record. See `lifecycle` for how steps run, `vm_pods.steps` and
`host_pods.steps` for their order.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from network.attach import NetworkRequest, Networks, PublishedPort
from sandbox.host import mount_flags, mounts
from sandbox.host.cgroup import Cgroups
from sandbox.host.limiter import Limiter
from sandbox.plan.shares import MODULES_NAME
from sandbox.pod import Pod
from sandbox.records import PodState


@dataclass(frozen=True, slots=True)
class RunDir:
    """The pod's run directory, RUN/pods/ID; `down` also unmounts whatever is mounted in it."""

    name = "run-dir"

    async def up(self, pod: Pod) -> None:
        """Create the directory, for root alone: containers' files lie in it. Raises OSError."""
        make_private(pod.run_dir.parent)
        pod.run_dir.mkdir(mode=0o700)

    async def down(self, pod: Pod) -> None:
        """Unmount what is mounted in it, and delete it. Idempotent."""
        await asyncio.to_thread(remove_tree, pod.run_dir)


def make_private(directory: Path) -> None:
    """Make a directory for root alone, also of one that an earlier release left open. Raises OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)


def remove_tree(path: Path) -> None:
    """Unmount everything in a directory of ours, then delete it. Idempotent. Raises OSError."""
    mounts.unmount_tree(path)
    if path.exists():
        shutil.rmtree(path)


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The pod's cgroup: below the waiting ones while it is pooled, then below the spec's parent."""

    cgroups: Cgroups
    name = "cgroup"

    async def up(self, pod: Pod) -> None:
        """Create the cgroup; a VM of the pool is moved to it."""
        if pod.record.state is PodState.WAITING:
            await asyncio.to_thread(self.cgroups.create_pooled, pod.id)
        else:
            await asyncio.to_thread(self.cgroups.claim, pod.id, pod.record.spec.cgroup_parent)

    async def down(self, pod: Pod) -> None:
        """Kill what is left in it, and remove it. Idempotent."""
        if pod.quarantined:  # its parent is not known
            await asyncio.to_thread(self.cgroups.remove_anywhere, pod.id)
        else:
            await asyncio.to_thread(self.cgroups.remove, pod.id, pod.record.spec.cgroup_parent)


@dataclass(frozen=True, slots=True)
class Netns:
    """The network namespace and the open tap in it, which the VMM will inherit."""

    networks: Networks
    name = "netns"

    async def up(self, pod: Pod) -> None:
        """Create the namespace and open the tap. Raises NetworkError."""
        pod.tap = await self.networks.prepare(pod.id)

    async def down(self, pod: Pod) -> None:
        """Release the network and the namespace. Idempotent."""
        pod.close_tap()
        await self.networks.down(pod.id)


@dataclass(frozen=True, slots=True)
class Network:
    """CNI ADD and DEL for the pod's network. `down` keeps the namespace, which belongs to Netns."""

    networks: Networks
    stage: Limiter
    name = "network"

    async def up(self, pod: Pod) -> None:
        """Run CNI ADD and save its result. Raises NetworkError."""
        async with pod.queued(self.stage):
            pod.update(network=await self.networks.up(self._request(pod)))

    async def down(self, pod: Pod) -> None:
        """Run CNI DEL, by the pod's id. Idempotent."""
        await self.networks.detach(pod.id)

    def _request(self, pod: Pod) -> NetworkRequest:
        spec = pod.record.spec
        return NetworkRequest(
            pod_id=pod.id,
            name=spec.name,
            namespace=spec.namespace,
            uid=spec.uid,
            annotations=spec.annotations,
            ports=tuple(
                PublishedPort(
                    protocol=port.protocol,
                    container_port=port.container_port,
                    host_port=port.host_port,
                    host_ip=port.host_ip,
                )
                for port in spec.port_mappings
                if port.host_port
            ),
        )


def make_share(back: Path, share: Path) -> None:
    """Bind `share`, a new directory, read-only over its writable twin, and make it shared. The step `Shares`
    undoes it. Raises OSError."""
    share.mkdir(mode=0o755, parents=True)
    mounts.bind(back, share, recursive=False)
    mounts.make_readonly(share)
    mounts.set_propagation(share, mount_flags.MS_PRIVATE)
    mounts.set_propagation(share, mount_flags.MS_SHARED)


@dataclass(frozen=True, slots=True)
class Shares:
    """The directories that virtiofsd exports.

    `back/TAG` is where the host makes mount points; `share/TAG` is the same directory, bound read-only and
    shared: mounts made there reach virtiofsd's mount namespace, and the guest, which is not trusted, cannot
    plant a symbolic link for the host to follow.

    `modules` names the directory of the kernel modules that a pod's guest loads on demand; the guest finds
    them in its share of root filesystems. None: there are none.
    """

    modules: Callable[[Pod], Path | None] = lambda pod: None
    name = "shares"

    async def up(self, pod: Pod) -> None:
        """Bind each share read-only over its writable twin, and make it shared. Raises OSError."""
        for share in (pod.rootfs_share, pod.volumes_share):
            back = pod.back_of(share)
            back.mkdir(mode=0o755, parents=True)
            make_share(back, share)
        if modules := self.modules(pod):
            (pod.back_of(pod.rootfs_share) / MODULES_NAME).mkdir(mode=0o755)
            mounts.bind(modules, pod.rootfs_share / MODULES_NAME, recursive=False)
            mounts.make_readonly(pod.rootfs_share / MODULES_NAME)

    async def down(self, pod: Pod) -> None:
        """Unmount the shares. Idempotent."""
        await asyncio.to_thread(mounts.unmount_tree, pod.run_dir / "share")
