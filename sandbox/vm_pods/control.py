"""Limits and observation of pods in VMs: cgroup files of the guest, and the size of the VM."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence

from sandbox.container import Container
from sandbox.errors import GuestError, GuestUnreachable, SandboxError
from sandbox.guest import guest_pb2 as pb
from sandbox.host.proc import oom_score_adj
from sandbox.inventory import Inventory
from sandbox.plan.encode import encode_cgroup_files
from sandbox.plan.resources import compile_resources
from sandbox.pod import Pod
from sandbox.spec import ContainerId, Resources
from sandbox.stats.host_usage import HostUsage
from sandbox.usage import UsageSample
from sandbox.vm_pods.link import GUEST_CALL_TIMEOUT_S, link_of
from sandbox.vm_pods.resize import Resizer
from sandbox.vm_pods.runtime import runtime_of
from sandbox.vm_pods.usage import POD_CGROUP, decode_usage, usage_request


class VmControl:
    """See `engine.Control`. `host_usage` reads files of the host and may block."""

    def __init__(
        self, inventory: Inventory, resizer: Resizer, host_usage: Callable[[Pod], HostUsage]
    ) -> None:
        self._inventory = inventory
        self._resizer = resizer
        self._host_usage = host_usage

    async def limit_pod(self, pod: Pod, resources: Resources, overhead: Resources) -> None:
        """Write the limits to the guest's cgroup that holds those of all containers, after the VM was given
        the memory and CPUs that it lacks. A cpuset counts the host's CPUs, so it is applied on the host
        alone (see `compile_resources`)."""
        files = compile_resources(resources, vcpus=pod.vcpus)
        await self._resizer.ensure_capacity(pod, resources, overhead)
        write = pb.WriteCgroup(container_id=POD_CGROUP, files=encode_cgroup_files(files))
        await link_of(pod).call(pb.Request(write_cgroup=write))

    async def limit(self, container: Container, resources: Resources) -> None:
        """Grow the VM if it must, then write the files of the container's cgroup in the guest."""
        pod, current = container.pod, container.record.resources
        await self._resizer.ensure_capacity(
            pod, pod.record.resources, pod.record.overhead, {container.id: resources}
        )
        if not container.running:
            return
        try:
            await link_of(pod).call(_limits(container, resources))
        except GuestError:
            # one of several files was refused: restore those written before it
            with contextlib.suppress(SandboxError):
                await link_of(pod).call(_limits(container, current))
            with contextlib.suppress(SandboxError):
                await self._resizer.ensure_capacity(
                    pod, pod.record.resources, pod.record.overhead, {container.id: current}
                )
            raise

    async def usage(self, pod: Pod, ids: Sequence[ContainerId], *, files: bool) -> UsageSample:
        """Read all files in one request to the agent."""
        client = link_of(pod).client
        if client is None:
            raise GuestUnreachable(f"pod {pod.id}: no connection to its agent")
        reply = await client.call(usage_request(ids, files=files), GUEST_CALL_TIMEOUT_S)
        return decode_usage(reply.values, len(ids))

    def pids(self, container: Container) -> Mapping[str, int]:
        """Return `pid`, the VMM's, and `guestPid`, the first process as the guest's kernel counts."""
        handle = runtime_of(container.pod).handle
        if not container.running or handle is None:
            return {}
        return {"pid": handle.vmm.pid, "guestPid": container.pid}

    async def describe(self, pod: Pod) -> Mapping[str, object]:
        """Return facts of the VM: size, source, processes, cost on the host, state of the VMM."""
        runtime, handle = runtime_of(pod), runtime_of(pod).handle
        facts: dict[str, object] = {
            "accelerator": runtime.accelerator,
            "source": runtime.source,
            "guestKernel": runtime.guest_kernel,
            "size": {
                "memoryMiB": runtime.size.memory_mib,
                "vcpus": runtime.size.vcpus,
                "hugePagesMiB": runtime.size.huge_mib,
            }
            if runtime.size
            else None,
            "console": str(pod.run_dir / "console.log"),
            "guestPids": {
                container.id: container.pid
                for container in self._inventory.containers_of(pod)
                if container.running
            },
        }
        if handle is not None:
            facts["pid"] = handle.vmm.pid
            facts["oomScoreAdj"] = await asyncio.to_thread(oom_score_adj, handle.vmm.pid)
            facts["helpers"] = {name: identity.pid for name, identity in handle.helpers.items()}
            facts["hostUsage"] = _usage_facts(await asyncio.to_thread(self._host_usage, pod))
        machine = link_of(pod).machine
        if machine is not None:
            facts["vmm"] = dict(await machine.describe())
        return facts


def _limits(container: Container, resources: Resources) -> pb.Request:
    files = encode_cgroup_files(compile_resources(resources, vcpus=container.pod.vcpus))
    score = pb.OomScore(adj=resources.oom_score_adj)
    return pb.Request(write_cgroup=pb.WriteCgroup(container_id=container.id, files=files, oom_score=score))


def _usage_facts(usage: HostUsage) -> Mapping[str, object]:
    return {
        "guestMemoryBytes": usage.guest_memory_bytes,
        "overheadMemoryBytes": usage.overhead_memory_bytes,
        "vmmCpuSeconds": usage.vmm.cpu_seconds,
        "vmmMemoryBytes": usage.vmm.own_bytes,
        "helpersCpuSeconds": usage.helpers.cpu_seconds,
        "helpersMemoryBytes": usage.helpers.own_bytes,
    }
