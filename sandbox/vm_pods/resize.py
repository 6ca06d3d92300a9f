"""Makes a running VM large enough for limits that are about to be raised.

The seam to hot-plug: `grow` is asked for a size that is no smaller than what the VM has in either
respect, and does what its hypervisor can. Of what it has then, huge pages are set aside in the guest.
Lowered limits shrink nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from sandbox.guest import guest_pb2 as pb
from sandbox.inventory import Inventory
from sandbox.plan import HUGE_PAGE_MIB, grown_size
from sandbox.plan.encode import encode_huge_directories
from sandbox.plan.values import HugeDirectory
from sandbox.pod import Pod
from sandbox.records import ContainerState
from sandbox.spec import ContainerId, Resources, VmSize
from sandbox.vm_pods.runtime import runtime_of

_ALIVE = (ContainerState.CREATED, ContainerState.RUNNING)
Grow = Callable[[Pod, VmSize], Awaitable[None]]


class Resizer:
    def __init__(self, inventory: Inventory, grow: Grow) -> None:
        self._inventory = inventory
        self._grow = grow

    async def make(
        self,
        pod: Pod,
        resources: Resources,
        overhead: Resources,
        changes: Mapping[ContainerId, Resources] | None = None,
        directories: Sequence[HugeDirectory] = (),
    ) -> None:
        """For these limits of the pod, and of its containers as they are or are about to be (`changes`);
        and `directories` on huge pages. Raises VmmError when the VM cannot grow so far; nothing has
        changed then. Raises InvalidSpec, GuestError for huge pages that cannot be had."""
        current = runtime_of(pod).size
        if current is None:
            return
        limits = {
            container.id: container.record.resources
            for container in self._inventory.containers_of(pod)
            if container.record.state in _ALIVE
        }
        size = grown_size(current, resources, overhead, list({**limits, **(changes or {})}.values()))
        if size != current:
            await self._grow(pod, size)
        if size.huge_mib or directories:
            wish = pb.HugePages(
                count=size.huge_mib // HUGE_PAGE_MIB, directories=encode_huge_directories(directories)
            )
            await pod.call(pb.Request(huge_pages=wish))
