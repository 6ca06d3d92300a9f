"""Growing a running VM before limits are raised, and what it may use of the host.

The seam to hot-plug: `grow` is called with a size that is in no respect smaller than the current one, and
does what its hypervisor supports. Then the guest allocates the huge pages. A VM never shrinks. The seam to
the host's cgroups: `confine` is called with the share of all containers that run or are about to.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from weakref import WeakKeyDictionary

from sandbox.container import Container
from sandbox.errors import SandboxError
from sandbox.guest import guest_pb2 as pb
from sandbox.inventory import Inventory
from sandbox.plan import HUGE_PAGE_MIB, compile_resources, grown_size
from sandbox.plan.encode import encode_huge_directories
from sandbox.plan.host_share import host_share
from sandbox.plan.values import HostShare, HugeDirectory
from sandbox.plan.vm import HostSize, check_growth, check_limits, within_node
from sandbox.pod import Pod
from sandbox.records import ContainerState
from sandbox.spec import ContainerId, Resources, VmSize
from sandbox.vm_pods.link import link_of
from sandbox.vm_pods.runtime import runtime_of

log = logging.getLogger(__name__)

_ALIVE = (ContainerState.CREATING, ContainerState.CREATED, ContainerState.RUNNING)
Grow = Callable[[Pod, VmSize], Awaitable[None]]
Confine = Callable[[Pod, HostShare], Awaitable[None]]


class Resizer:
    """Grows VMs to the limits of their pods and containers."""

    def __init__(self, inventory: Inventory, grow: Grow, confine: Confine, host: HostSize) -> None:
        self._inventory = inventory
        self._grow = grow
        self._confine = confine
        self._host = host
        self._locks: WeakKeyDictionary[Pod, asyncio.Lock] = WeakKeyDictionary()
        # limits that containers are about to get: their records have them once they are in force
        self._asked: WeakKeyDictionary[Container, Resources] = WeakKeyDictionary()

    async def ensure_capacity(
        self,
        pod: Pod,
        resources: Resources,
        overhead: Resources,
        changes: Mapping[ContainerId, Resources] | None = None,
        directories: Sequence[HugeDirectory] = (),
    ) -> None:
        """Grow the pod's VM until it satisfies these limits of the pod and those of its containers, set its
        share of the host, and make `directories` on huge pages in the guest.

        `changes` are limits that containers, existing or new, are about to get. One alone must not exceed
        what the node has; together they may, and the VM gets what there is. Idempotent. Raises BeyondNode
        when the VM cannot grow that far, VmmError; nothing has changed then. Raises InvalidSpec for CPUs that
        the host does not have for the pod, when the VM may have grown; InvalidSpec, GuestError when the guest
        cannot allocate the huge pages.
        """
        async with self._locks.setdefault(pod, asyncio.Lock()):
            await self._ensure(pod, resources, overhead, changes or {}, directories)

    async def release(self, container: Container) -> None:
        """Give back to the host what this container alone had of it. Idempotent. Never raises."""
        pod = container.pod
        async with self._locks.setdefault(pod, asyncio.Lock()):
            self._asked.pop(container, None)
            if not pod.record.ready or runtime_of(pod).handle is None:
                return  # its VM ends, and its cgroup with it; or it is not known
            alive = [each for each in self._alive(pod) if each is not container]
            asked = [self._asked.get(each, each.record.resources) for each in alive]
            try:
                await self._confine(pod, self._share(pod, pod.record.resources, pod.record.overhead, asked))
            except (SandboxError, OSError) as error:
                log.warning(
                    "pod %s: its share of the host is as with container %s: %s", pod.id, container.id, error
                )

    def _alive(self, pod: Pod) -> list[Container]:
        return [each for each in self._inventory.containers_of(pod) if each.record.state in _ALIVE]

    def _share(
        self, pod: Pod, resources: Resources, overhead: Resources, containers: Iterable[Resources]
    ) -> HostShare:
        whole = not pod.record.spec.cgroup_parent
        return host_share(resources, overhead, list(containers), whole=whole)

    async def _ensure(
        self,
        pod: Pod,
        resources: Resources,
        overhead: Resources,
        changes: Mapping[ContainerId, Resources],
        directories: Sequence[HugeDirectory],
    ) -> None:
        current, handle = runtime_of(pod).size, runtime_of(pod).handle
        if current is None or handle is None:
            return
        asked_for = [*changes.values(), *([resources] if resources != pod.record.resources else [])]
        for each in asked_for:
            compile_resources(each, vcpus=current.vcpus)  # an invalid one is found before anything changes
            check_limits(each, current, self._host)
        changed = [each for each in self._inventory.containers_of(pod) if each.id in changes]
        alive = list(dict.fromkeys([*self._alive(pod), *changed]))
        asked = {each: changes.get(each.id, self._asked.get(each, each.record.resources)) for each in alive}
        started = VmSize(memory_mib=handle.spec.memory_mib, vcpus=handle.spec.vcpus)
        wanted = grown_size(current, resources, overhead, list(asked.values()), unlimited=started)
        size = within_node(wanted, current, self._host)
        if size != current:
            check_growth(handle.spec, size, self._host)
            await self._grow(pod, size)
        await self._confine(pod, self._share(pod, resources, overhead, asked.values()))
        self._asked.update(asked)
        if size.huge_mib or directories:
            pages = pb.HugePages(
                count=size.huge_mib // HUGE_PAGE_MIB, directories=encode_huge_directories(directories)
            )
            await link_of(pod).call(pb.Request(huge_pages=pages))
