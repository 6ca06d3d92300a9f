"""Where a pod without a VM and its containers lie on the host: their cgroups and directories."""

from __future__ import annotations

from dataclasses import dataclass

from sandbox.container import Container
from sandbox.host import cgroup
from sandbox.host.cgroup import Cgroups, Layout
from sandbox.host_pods.conmon import Bundle
from sandbox.pod import Pod
from sandbox.records import ProcessRuntime

SUPERVISOR = "supervisor"  # a pod's cgroup of its first process and of the conmon of each container


@dataclass(frozen=True, slots=True)
class HostLayout:
    """Names derive from the pod's record and the ids alone. A cgroup path is the same in each hierarchy."""

    cgroups: Cgroups

    @property
    def hierarchies(self) -> Layout:
        """The hierarchies of cgroups that are mounted on this host."""
        return self.cgroups.layout

    def pod_cgroup(self, pod: Pod) -> str:
        """Return the path of a pod's cgroup."""
        return cgroup.pod_path(pod.record.spec.cgroup_parent, pod.id, root=self.cgroups.root)

    def supervisor_cgroup(self, pod: Pod) -> str:
        """Return the path of the cgroup of what supervises the pod's containers."""
        return f"{self.pod_cgroup(pod)}/{SUPERVISOR}"

    def container_cgroup(self, container: Container) -> str:
        """Return the path of a container's cgroup."""
        return f"{self.pod_cgroup(container.pod)}/{container.id}"

    def bundle(self, container: Container) -> Bundle:
        """Return a container's bundle, which need not exist."""
        run_dir = container.pod.run_dir
        return Bundle(id=container.id, path=run_dir / "containers" / container.id, state=run_dir / "crun")


def runtime_of(pod: Pod) -> ProcessRuntime:
    """Return the processes that hold the pod's namespaces."""
    runtime = pod.record.runtime
    assert isinstance(runtime, ProcessRuntime), "this engine is given pods without a VM alone"
    return runtime


def shm_of(pod: Pod) -> str:
    """Return the host's directory that is /dev/shm in the pod's containers."""
    return "/dev/shm" if pod.record.spec.host_ipc else str(pod.run_dir / "shm")
