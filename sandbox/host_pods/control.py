"""Limits and observation of pods without a VM: files of their cgroups on the host."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from sandbox.container import Container
from sandbox.errors import GuestError, SandboxError
from sandbox.host_pods import cgroups
from sandbox.host_pods.layout import HostLayout, runtime_of
from sandbox.host_pods.network import run_in_network
from sandbox.inventory import Inventory
from sandbox.plan.resources import compile_resources
from sandbox.plan.values import CgroupFile
from sandbox.pod import Pod
from sandbox.spec import ContainerId, Resources
from sandbox.stats.kernel_files import flat_keyed, number
from sandbox.usage import CGROUP_FILES, CgroupSample, UsageSample


class ProcessControl:
    """See `engine.Control`."""

    def __init__(self, inventory: Inventory, layout: HostLayout) -> None:
        self._inventory = inventory
        self._layout = layout

    async def limit_pod(self, pod: Pod, resources: Resources, overhead: Resources) -> None:
        """Limit the pod's cgroup, which holds those of its containers. `overhead` has no effect here."""
        files = compile_resources(resources)
        current = pod.record.resources
        path = self._layout.pod_cgroup(pod)
        await self._limit(path, files, resources, compile_resources(current), current)

    async def limit(self, container: Container, resources: Resources) -> None:
        """Limit the container's cgroup, and set the OOM score of all its processes."""
        path, current = self._layout.container_cgroup(container), container.record.resources
        files = compile_resources(resources)
        if not container.running:
            return
        await self._limit(path, files, resources, compile_resources(current), current)
        hierarchies = self._layout.hierarchies
        await asyncio.to_thread(cgroups.set_oom_score, hierarchies, path, resources.oom_score_adj)

    async def _limit(
        self,
        path: str,
        files: Sequence[CgroupFile],
        resources: Resources,
        before: Sequence[CgroupFile],
        current: Resources,
    ) -> None:
        hierarchies = self._layout.hierarchies
        try:
            await asyncio.to_thread(cgroups.write_limits, hierarchies, path, files, resources)
        except GuestError:
            # one of several files was refused: restore those written before it
            with contextlib.suppress(SandboxError):
                await asyncio.to_thread(cgroups.write_limits, hierarchies, path, before, current)
            raise

    async def usage(self, pod: Pod, ids: Sequence[ContainerId], *, files: bool) -> UsageSample:
        """Read the accounting files, under the names of cgroup v2."""
        return await asyncio.to_thread(self._usage, pod, ids, files)

    def _usage(self, pod: Pod, ids: Sequence[ContainerId], files: bool) -> UsageSample:
        hierarchies = self._layout.hierarchies

        def sample(path: str) -> CgroupSample:
            contents = {name: cgroups.read(hierarchies, path, name) for name in CGROUP_FILES}
            return CgroupSample(files=contents, count=cgroups.process_count(hierarchies, path, files=files))

        top = self._layout.pod_cgroup(pod)
        return UsageSample(
            pod=sample(top),
            containers=tuple(sample(f"{top}/{id}") for id in ids),
            net_dev=run_in_network(pod, Path("/proc/thread-self/net/dev").read_bytes),
            meminfo=Path("/proc/meminfo").read_bytes(),
            wall_ns=time.time_ns(),
        )

    def host_cost(self, pod: Pod) -> tuple[float, int]:
        """Return the CPU time in seconds and the memory in bytes of all the pod's processes. Blocking."""
        path = self._layout.pod_cgroup(pod)
        usage = flat_keyed(cgroups.read(self._layout.hierarchies, path, "cpu.stat")).get(b"usage_usec", 0)
        return usage / 1e6, number(cgroups.read(self._layout.hierarchies, path, "memory.current"))

    def pids(self, container: Container) -> Mapping[str, int]:
        """Return `pid`, the container's first process."""
        held = container.record.process
        return {"pid": held.init.pid} if container.running and held and held.init else {}

    async def describe(self, pod: Pod) -> Mapping[str, object]:
        """Return the pod's cgroup, its first process, and those of its containers."""
        record, init = pod.record, runtime_of(pod).init
        containers = {
            container.id: pids["pid"]
            for container in self._inventory.containers_of(pod)
            if (pids := self.pids(container))
        }
        return {
            "hostNamespaces": list(record.spec.host_namespaces),
            "cgroup": self._layout.pod_cgroup(pod),
            "pid": init.pid if init else None,
            "containerPids": containers,
        }
