"""Growing a running VM before limits are raised.

The seam to hot-plug: `grow` is called with a size that is in no respect smaller than the current one, and
does what its hypervisor supports. Then the guest allocates the huge pages. A VM never shrinks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from weakref import WeakKeyDictionary

from sandbox.container import Container
from sandbox.guest import guest_pb2 as pb
from sandbox.inventory import Inventory
from sandbox.plan import HUGE_PAGE_MIB, compile_resources, grown_size
from sandbox.plan.encode import encode_huge_directories
from sandbox.plan.values import HugeDirectory
from sandbox.plan.vm import HostSize, check_growth, check_limits, within_node
from sandbox.pod import Pod
from sandbox.records import ContainerState
from sandbox.spec import ContainerId, Resources, VmSize
from sandbox.vm_pods.link import link_of
from sandbox.vm_pods.runtime import runtime_of

_ALIVE = (ContainerState.CREATING, ContainerState.CREATED, ContainerState.RUNNING)
Grow = Callable[[Pod, VmSize], Awaitable[None]]


class Resizer:
    """Grows VMs to the limits of their pods and containers."""

    def __init__(self, inventory: Inventory, grow: Grow, host: HostSize) -> None:
        self._inventory = inventory
        self._grow = grow
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
        """Grow the pod's VM until it satisfies these limits of the pod and those of its containers, and
        make `directories` on huge pages in the guest.

        `changes` are limits that containers, existing or new, are about to get. One alone must not exceed
        what the node has; together they may, and the VM gets what there is. Idempotent. Raises BeyondNode
        when the VM cannot grow that far, VmmError; nothing has changed then. Raises InvalidSpec, GuestError
        when the guest cannot allocate the huge pages.
        """
        async with self._locks.setdefault(pod, asyncio.Lock()):
            await self._ensure(pod, resources, overhead, changes or {}, directories)

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
        alive = [
            each
            for each in self._inventory.containers_of(pod)
            if each.record.state in _ALIVE or each.id in changes
        ]
        asked = {each: changes.get(each.id, self._asked.get(each, each.record.resources)) for each in alive}
        started = VmSize(memory_mib=handle.spec.memory_mib, vcpus=handle.spec.vcpus)
        wanted = grown_size(current, resources, overhead, list(asked.values()), unlimited=started)
        size = within_node(wanted, current, self._host)
        if size != current:
            check_growth(handle.spec, size, self._host)
            await self._grow(pod, size)
        self._asked.update(asked)
        if size.huge_mib or directories:
            pages = pb.HugePages(
                count=size.huge_mib // HUGE_PAGE_MIB, directories=encode_huge_directories(directories)
            )
            await link_of(pod).call(pb.Request(huge_pages=pages))
