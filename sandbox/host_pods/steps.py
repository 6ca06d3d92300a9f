"""The resources of a pod without a VM, one step each, and of its containers.

    run-dir      its directory
    cgroup       its cgroup in every hierarchy, and the supervisors' beneath
    shares       where root filesystems are mounted
    network      CNI attachments in a network namespace, unless it has the node's
    processes    /dev/shm, and the first process, which holds the namespaces that its containers share

See `lifecycle` for the order. Releasing `processes` kills everything that runs in the pod's cgroups.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from image.stores import RootfsStore
from network.attach import Networks
from sandbox.apparmor.profile import UNCONFINED, Policy
from sandbox.capabilities import mask_named
from sandbox.container import Container
from sandbox.errors import DeadlineExceeded, GuestError, InvalidContainerConfig, InvalidSpec
from sandbox.host import cgroup, mounts, process, syscalls
from sandbox.host.limiter import Limiter
from sandbox.host.mount_flags import MS_NODEV, MS_NOEXEC, MS_NOSUID
from sandbox.host.process import ProcessIdentity
from sandbox.host_pods import cgroups
from sandbox.host_pods.host_files import find_devices, find_volumes, node_limits
from sandbox.host_pods.layout import HostLayout, runtime_of, shm_of
from sandbox.host_pods.oci import compile_process
from sandbox.host_pods.sysctls import pod_sysctls
from sandbox.lifecycle import Step, Steps
from sandbox.plan.pod_files import pod_hostname
from sandbox.plan.shares import SHM_BYTES
from sandbox.pod import Pod
from sandbox.spec import AppArmor, AppArmorKind, PidMode
from sandbox.steps.container import CompiledPlan
from sandbox.steps.pod import Cgroup, Network, RunDir, Shares
from sandbox.steps.rootfs import ContainerRootfs, require_tree
from sandbox.steps.volumes import mount_images, unmount_images

READY_TIMEOUT_S = 20.0
# In the new namespaces: write the sysctls, print "ready", then stay and reap orphans. As the first process of
# a PID namespace it cannot be killed by its members; they may kill the sleep, which is then started again.
_READY = b"ready\n"
_FIRST = """
while [ "$1" != -- ]; do printf %s "$2" >"/proc/sys/$1" || exit 1; shift 2; done
sleep 86400 >/dev/null 2>&1 &
echo ready
exec >/dev/null 2>&1
while :; do wait; sleep 86400 & done
"""


@dataclass(frozen=True, slots=True)
class PodCgroup:
    """The pod's cgroup, and the supervisors' in it; both in every hierarchy, as crun joins all."""

    layout: HostLayout
    name = "cgroup"

    async def up(self, pod: Pod) -> None:
        """Create both."""
        await Cgroup(self.layout.cgroups).up(pod)
        path = self.layout.supervisor_cgroup(pod)
        await asyncio.to_thread(cgroups.make, self.layout.hierarchies, path)

    async def down(self, pod: Pod) -> None:
        """Kill what runs in them and delete them. Idempotent."""
        await Cgroup(self.layout.cgroups).down(pod)


@dataclass(frozen=True, slots=True)
class OwnNetwork:
    """CNI attachments of a pod that does not share the node's network."""

    networks: Networks
    stage: Limiter
    name = "network"

    async def up(self, pod: Pod) -> None:
        """Make a network namespace and attach it."""
        if not pod.record.spec.host_network:
            await Network(self.networks, self.stage).up(pod)

    async def down(self, pod: Pod) -> None:
        """Detach and delete the namespace. Idempotent."""
        if not pod.record.spec.host_network:
            await self.networks.down(pod.id)


@dataclass(frozen=True, slots=True)
class Processes:
    """The pod's first process, and what its containers need of it."""

    layout: HostLayout
    name = "processes"

    async def up(self, pod: Pod) -> None:
        """Start it, and record it. Raises InvalidContainerConfig for a sysctl that cannot be set."""
        await asyncio.to_thread(_make_directories, pod)
        holder = await self._start(pod)
        pod.update_runtime(holder=holder)
        init = await asyncio.to_thread(_first_process, holder, pod.record.spec.pid_mode)
        pod.update_runtime(init=init)

    async def down(self, pod: Pod) -> None:
        """Kill everything that runs in the pod, and unmount /dev/shm. Idempotent."""
        await asyncio.to_thread(end_all, self.layout, pod.run_dir, self.layout.pod_cgroup(pod))
        holder = runtime_of(pod).holder
        if holder is not None:
            await process.kill(holder)  # which also reaps a child of ours
        await asyncio.to_thread(mounts.unmount_tree, Path(shm_of(pod)))

    async def _start(self, pod: Pod) -> ProcessIdentity:
        """Return once every sysctl is written. Raises InvalidContainerConfig with the one that failed."""
        spec = pod.record.spec
        hostname = pod_hostname(spec, pod.id, os.uname().nodename)
        settings = {"kernel/hostname": hostname, **pod_sysctls(spec)}
        words = [word for pair in settings.items() for word in pair]
        argv = ["unshare", "--uts", *([] if spec.host_ipc else ["--ipc"])]
        if spec.pid_mode is not PidMode.NODE:
            argv += ["--pid", "--fork", "--kill-child"]
        # the last argument is not read: processes are found by it (see `end_all`)
        argv += ["/bin/sh", "-c", _FIRST, "husk-pod", *words, "--", f"{pod.run_dir}/init"]
        path = self.layout.supervisor_cgroup(pod)
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                first = await process.start(
                    argv,
                    cgroups=cgroup.directories(self.layout.hierarchies, path),
                    netns="" if spec.host_network or not pod.record.network else pod.record.network.netns,
                    stdout=theirs,
                    stderr=theirs,
                    umask=0o022,
                )
            finally:
                os.close(theirs)
            output = await asyncio.to_thread(_read_output, ours)
        finally:
            os.close(ours)
        if output != _READY:
            problem = output.decode(errors="replace").strip() or "the pod's first process ended at once"
            raise InvalidContainerConfig("sysctl", 0, problem)
        return first


def end_all(layout: HostLayout, run_dir: Path, path: str) -> None:
    """Kill what runs in the pod's cgroup at `path`, and what has the run directory in its arguments.

    The latter finds what an interrupted start had not moved to its cgroup yet. Blocking. Raises
    DeadlineExceeded.
    """
    cgroups.kill(layout.hierarchies, path)
    for identity in process.find_by_argument(f"{run_dir}/"):
        cgroups.send(identity.pid, signal.SIGKILL)


def _make_directories(pod: Pod) -> None:
    for name in ("crun", "containers"):
        (pod.run_dir / name).mkdir(mode=0o700)
    if not pod.record.spec.host_ipc:
        shm = Path(shm_of(pod))
        shm.mkdir()
        flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
        syscalls.mount("shm", shm, "tmpfs", flags, f"mode=1777,size={SHM_BYTES}")


def _read_output(fd: int) -> bytes:
    """Return "ready", or all that the process printed until it ended. Raises DeadlineExceeded."""
    output = b""
    with contextlib.closing(open(fd, "rb", buffering=0, closefd=False)) as pipe:
        while output != _READY:
            if not process.readable_within(fd, READY_TIMEOUT_S):
                raise DeadlineExceeded("starting the pod's first process", READY_TIMEOUT_S)
            if not (chunk := pipe.read(4096)):
                break
            output += chunk
    return output


def _first_process(holder: ProcessIdentity, mode: PidMode) -> ProcessIdentity:
    """Return the process in the namespaces: with a PID namespace it is unshare's child."""
    if mode is PidMode.NODE:
        return holder
    children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
    found = process.identify(int(children[0])) if children else None
    if found is None:
        raise GuestError("unshare", 0, "the pod's first process ended at once")
    return found


def pod_steps(layout: HostLayout, networks: Networks, stage: Limiter) -> Steps[Pod]:
    """Return the steps of a pod; `stage` limits how many networks are attached at once."""
    return (RunDir(), PodCgroup(layout), Shares(), OwnNetwork(networks, stage), Processes(layout))


# --------------------------------------------------------------------------------------- containers


@dataclass(frozen=True, slots=True)
class HostVolumes:
    """Images that are volumes. Files of the host need no preparation, as crun mounts them."""

    store: RootfsStore
    name = "volumes"

    async def up(self, container: Container) -> None:
        """Mount the images."""
        await mount_images(self.store, container)

    async def down(self, container: Container) -> None:
        """Unmount them. Idempotent."""
        await unmount_images(self.store, container)


@dataclass(frozen=True, slots=True)
class Check:
    """Checks at CreateContainer that crun's configuration can express the plan."""

    name = "check"

    async def up(self, container: Container) -> None:
        """Raises InvalidSpec with the field."""
        await asyncio.to_thread(self._check, container)

    async def down(self, container: Container) -> None:
        """Nothing: it holds no resource."""

    def _check(self, container: Container) -> None:
        limits = node_limits()
        compile_process(container.plan.process, limits)
        security = container.record.spec.security
        for field, names in (
            ("add_capabilities", security.add_capabilities),
            ("add_ambient_capabilities", security.ambient_capabilities),
        ):
            for name in names:
                # ALL means all that there are; a capability that is named must be available
                if name.upper() != "ALL" and mask_named(name) & ~limits.capabilities:
                    problem = f"{name}: the daemon does not have it on this node"
                    raise InvalidSpec(
                        f"config.linux.security_context.capabilities.{field}", problem, "others"
                    )


def container_steps(store: RootfsStore) -> Sequence[Step[Container]]:
    """Return the steps of a container."""
    return (
        ContainerRootfs(store),
        HostVolumes(store),
        CompiledPlan(
            store,
            lambda container: str(require_tree(container.rootfs)),
            find_volumes,
            lambda container: find_devices(container.record.spec),
            _policy,
        ),
        Check(),
    )


def _policy(requested: AppArmor) -> Policy:
    """Raises InvalidSpec for a profile, as only a guest's kernel is given one."""
    if requested.kind is not AppArmorKind.UNCONFINED:
        field = "config.linux.security_context.apparmor.profile_type"
        raise InvalidSpec(field, "the pod shares namespaces with the node and has no VM", "Unconfined")
    return UNCONFINED
