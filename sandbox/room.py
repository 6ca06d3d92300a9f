"""Makes a running VM large enough for limits that are about to be raised.

The seam to hot-plug: `grow` is asked for a size that is no smaller than what the VM has in either
respect, and does what its hypervisor can. Lowered limits shrink nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from sandbox.plan import grown_size
from sandbox.pod import Pod
from sandbox.records import ContainerState
from sandbox.registry import Registry
from sandbox.spec import ContainerId, Resources, VmSize

_ALIVE = (ContainerState.CREATED, ContainerState.RUNNING)
Grow = Callable[[Pod, VmSize], Awaitable[None]]


class Room:
    def __init__(self, registry: Registry, grow: Grow) -> None:
        self._registry = registry
        self._grow = grow

    async def make(
        self,
        pod: Pod,
        resources: Resources,
        overhead: Resources,
        changes: Mapping[ContainerId, Resources] | None = None,
    ) -> None:
        """For these limits of the pod, and of its containers as they are or are about to be (`changes`).
        Raises VmmError when the VM cannot grow so far; nothing has changed then."""
        current = pod.record.size
        if current is None:
            return
        limits = {
            container.id: container.record.resources
            for container in self._registry.containers_of(pod)
            if container.record.state in _ALIVE
        }
        size = grown_size(current, resources, overhead, list({**limits, **(changes or {})}.values()))
        if size != current:
            await self._grow(pod, size)
