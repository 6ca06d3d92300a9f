"""What a pod without a VM holds of the host, one step per resource, and what its containers hold.

    run-dir      the directory
    cgroup       its cgroup in every hierarchy, and the supervisors' beneath
    shares       where root file systems are mounted
    network      CNI attachments in a namespace of its own, unless it has the node's
    processes    /dev/shm, and the first process, which holds the namespaces that its containers share

See `lifecycle` for the order. `processes` down kills whatever runs in the pod's cgroups.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
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
from sandbox.host.cgroup import Cgroups
from sandbox.host.limiter import Limiter
from sandbox.host.process import ProcessIdentity
from sandbox.host_pods import control
from sandbox.host_pods.host_files import find_devices, find_volumes, node_limits
from sandbox.host_pods.oci import compile_process
from sandbox.host_pods.sysctls import pod_sysctls
from sandbox.lifecycle import Step, Steps
from sandbox.plan.mounts import MS_NODEV, MS_NOEXEC, MS_NOSUID
from sandbox.plan.pod_files import pod_hostname
from sandbox.plan.shares import SHM_BYTES
from sandbox.pod import Pod
from sandbox.records import ProcessRuntime
from sandbox.spec import AppArmor, AppArmorKind, PidMode
from sandbox.steps.container import CompiledPlan
from sandbox.steps.pod import Cgroup, Network, RunDir, Shares
from sandbox.steps.rootfs import ContainerRootfs, require_tree
from sandbox.steps.volumes import mount_images, unmount_images

READY_TIMEOUT_S = 20.0
# In the namespaces: write what was asked for, say so, then stay and collect orphans. As the first process
# of a PID namespace it hears no signal of its members; what it waits for they may end, and it waits again.
_FIRST = """
while [ "$1" != -- ]; do printf %s "$2" >"/proc/sys/$1" || exit 1; shift 2; done
sleep 86400 >/dev/null 2>&1 &
echo ready
exec >/dev/null 2>&1
while :; do wait; sleep 86400 & done
"""


@dataclass(frozen=True, slots=True)
class PodCgroup:
    """Of the pod, and the supervisors' in it; both in every hierarchy, as crun joins all."""

    inner: Cgroup
    name = "cgroup"

    async def up(self, pod: Pod) -> None:
        await self.inner.up(pod)
        path = f"{pod_path(self.inner.cgroups, pod)}/{control.SUPERVISOR}"
        await asyncio.to_thread(control.make, self.inner.cgroups.layout, path)

    async def down(self, pod: Pod) -> None:
        await self.inner.down(pod)


@dataclass(frozen=True, slots=True)
class OwnNetwork:
    networks: Networks
    stage: Limiter
    name = "network"

    async def up(self, pod: Pod) -> None:
        if not pod.record.spec.host_network:
            await Network(self.networks, self.stage).up(pod)

    async def down(self, pod: Pod) -> None:
        if not pod.record.spec.host_network:
            await self.networks.down(pod.id)


@dataclass(frozen=True, slots=True)
class Processes:
    cgroups: Cgroups
    name = "processes"

    async def up(self, pod: Pod) -> None:
        await asyncio.to_thread(_make_directories, pod)
        holder = await self._start(pod)
        pod.update_runtime(holder=holder)
        init = await asyncio.to_thread(_first_process, holder, pod.record.spec.pid_mode)
        pod.update_runtime(init=init)

    async def down(self, pod: Pod) -> None:
        await asyncio.to_thread(self.end_all, pod.run_dir, pod_path(self.cgroups, pod))
        holder = runtime_of(pod).holder
        if holder is not None:
            await process.kill(holder)  # a child of ours wants to be collected
        await asyncio.to_thread(mounts.unmount_tree, Path(shm_of(pod)))

    def end_all(self, run_dir: Path, path: str) -> None:
        """What a start that was cut short has not moved to its cgroup yet is known by its arguments."""
        control.kill(self.cgroups.layout, path)
        for identity in process.find_by_argument(f"{run_dir}/"):
            control.send(identity.pid, 9)

    async def _start(self, pod: Pod) -> ProcessIdentity:
        """Returns once it has written all. Raises GuestError with the sysctl that it could not write."""
        spec = pod.record.spec
        hostname = pod_hostname(spec, pod.id, os.uname().nodename)
        settings = {"kernel/hostname": hostname, **pod_sysctls(spec)}
        words = [word for pair in settings.items() for word in pair]
        argv = ["unshare", "--uts", *([] if spec.host_ipc else ["--ipc"])]
        if spec.pid_mode is not PidMode.NODE:
            argv += ["--pid", "--fork", "--kill-child"]
        # the argument behind the end is not read: it tells whose it is
        argv += ["/bin/sh", "-c", _FIRST, "husk-pod", *words, "--", f"{pod.run_dir}/init"]
        path = f"{pod_path(self.cgroups, pod)}/{control.SUPERVISOR}"
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                first = await process.start(
                    argv,
                    cgroups=cgroup.directories(self.cgroups.layout, path),
                    netns="" if spec.host_network or not pod.record.network else pod.record.network.netns,
                    stdout=theirs,
                    stderr=theirs,
                    umask=0o022,
                )
            finally:
                os.close(theirs)
            said = await asyncio.to_thread(_hear, ours)
        finally:
            os.close(ours)
        if said != b"ready\n":
            raise InvalidContainerConfig(
                "sysctl", 0, said.decode(errors="replace").strip() or "it ended at once"
            )
        return first


def _make_directories(pod: Pod) -> None:
    for name in ("crun", "containers"):
        (pod.run_dir / name).mkdir(mode=0o700)
    if not pod.record.spec.host_ipc:
        shm = Path(shm_of(pod))
        shm.mkdir()
        flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
        syscalls.mount("shm", shm, "tmpfs", flags, f"mode=1777,size={SHM_BYTES}")


def _hear(fd: int) -> bytes:
    """Its first word, or its last ones. Raises DeadlineExceeded."""
    said = b""
    with contextlib.closing(open(fd, "rb", buffering=0, closefd=False)) as pipe:
        while said != b"ready\n":
            if not process.readable_within(fd, READY_TIMEOUT_S):
                raise DeadlineExceeded("starting the pod's first process", READY_TIMEOUT_S)
            if not (chunk := pipe.read(4096)):
                break
            said += chunk
    return said


def _first_process(holder: ProcessIdentity, mode: PidMode) -> ProcessIdentity:
    """Who holds the namespaces: unshare's child, where there is one."""
    if mode is PidMode.NODE:
        return holder
    children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
    found = process.identify(int(children[0])) if children else None
    if found is None:
        raise GuestError("unshare", 0, "the pod's first process ended at once")
    return found


def pod_path(cgroups: Cgroups, pod: Pod) -> str:
    return cgroup.pod_path(pod.record.spec.cgroup_parent, pod.id, root=cgroups.root)


def runtime_of(pod: Pod) -> ProcessRuntime:
    """Return the processes that hold the pod's namespaces."""
    runtime = pod.record.runtime
    assert isinstance(runtime, ProcessRuntime), "the engine of processes is given pods without a VM alone"
    return runtime


def shm_of(pod: Pod) -> str:
    return "/dev/shm" if pod.record.spec.host_ipc else str(pod.run_dir / "shm")


def pod_steps(cgroups: Cgroups, networks: Networks, stage: Limiter) -> Steps[Pod]:
    return (
        RunDir(),
        PodCgroup(Cgroup(cgroups)),
        Shares(),
        OwnNetwork(networks, stage),
        Processes(cgroups),
    )


# --------------------------------------------------------------------------------------- containers


@dataclass(frozen=True, slots=True)
class HostVolumes:
    """Files of the host need no preparation: the container mounts them itself. Images do."""

    store: RootfsStore
    name = "volumes"

    async def up(self, container: Container) -> None:
        await mount_images(self.store, container)

    async def down(self, container: Container) -> None:
        await unmount_images(self.store, container)


@dataclass(frozen=True, slots=True)
class Check:
    """What only a configuration for crun cannot say, told before the start."""

    name = "check"

    async def up(self, container: Container) -> None:
        await asyncio.to_thread(self.check, container)

    async def down(self, container: Container) -> None:
        """It holds nothing."""

    def check(self, container: Container) -> None:
        """Raises InvalidSpec."""
        limits = node_limits()
        compile_process(container.plan.process, limits)
        security = container.record.spec.security
        for field, names in (
            ("add_capabilities", security.add_capabilities),
            ("add_ambient_capabilities", security.ambient_capabilities),
        ):
            for name in names:
                # ALL is what there is; a name that was asked for must be had
                if name.upper() != "ALL" and mask_named(name) & ~limits.capabilities:
                    problem = f"{name}: the daemon itself does not have it on this node"
                    raise InvalidSpec(
                        f"config.linux.security_context.capabilities.{field}", problem, "others"
                    )


def container_steps(store: RootfsStore) -> Sequence[Step[Container]]:
    return (
        ContainerRootfs(store),
        HostVolumes(store),
        CompiledPlan(
            store, lambda container: str(require_tree(container.rootfs)), find_volumes, find_devices, _policy
        ),
        Check(),
    )


def _policy(wanted: AppArmor) -> Policy:
    """A profile is given to a guest's kernel, and there is none. Raises InvalidSpec."""
    if wanted.kind is not AppArmorKind.UNCONFINED:
        field = "config.linux.security_context.apparmor.profile_type"
        raise InvalidSpec(field, "the pod shares namespaces with the node and has no VM", "Unconfined")
    return UNCONFINED
