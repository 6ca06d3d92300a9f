"""Reads what pods use: one round trip to the guest per pod, in parallel, bounded in time.

A pod has at most one read of a kind under way, and whoever asks meanwhile shares it. A guest that does
not answer costs the first who asks PATIENCE_S and the next ones nothing, until it answers or the call's
own timeout makes room for another try: it is left out, and the rest of a list is not held up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakSet

from msgspec.structs import replace

from sandbox.container import Container
from sandbox.engine import Engines
from sandbox.errors import ProtocolError, SandboxError
from sandbox.inventory import Inventory
from sandbox.pod import Pod
from sandbox.spec import PodId
from sandbox.stats import parse
from sandbox.stats.layer_usage import LayerUsage
from sandbox.stats.parse import CgroupStats, PodStats

log = logging.getLogger(__name__)

PATIENCE_S = 3.0
RATE_WINDOW_NS = 500_000_000  # between two looks closer than this there is no rate


@dataclass(slots=True)
class _Flight:
    task: asyncio.Task[PodStats]
    began: float  # loop time


class Rate:
    """CPU time per time, between two looks."""

    def __init__(self) -> None:
        self._at_ns = 0
        self._cpu_ns = 0
        self._rate: int | None = None

    def look(self, at_ns: int, cpu_ns: int) -> int | None:
        """The rate by now, in billionths of a CPU; None at first and when the counter began anew."""
        elapsed = at_ns - self._at_ns
        if self._at_ns and elapsed < RATE_WINDOW_NS:
            return self._rate
        used = cpu_ns - self._cpu_ns
        self._rate = used * 1_000_000_000 // elapsed if self._at_ns and used >= 0 else None
        self._at_ns, self._cpu_ns = at_ns, cpu_ns
        return self._rate


class StatsCollector:
    """Belongs to one event loop; `close` in the end."""

    def __init__(self, inventory: Inventory, engines: Engines, layers: LayerUsage) -> None:
        self._inventory = inventory
        self._engines = engines
        self._layers = layers
        self._flights: dict[tuple[PodId, bool], _Flight] = {}
        self._rates: WeakKeyDictionary[Pod | Container, Rate] = WeakKeyDictionary()
        self._silent: WeakSet[Pod] = WeakSet()

    async def read(self, pod_ids: Iterable[PodId], *, files: bool = False) -> AsyncIterator[PodStats]:
        """Each pod's usage as it comes; pods that are gone, not ready or silent are left out.

        `files`: count open descriptors too, which takes the guest longer.
        """
        pods = [pod for id in pod_ids if (pod := self._inventory.pods.get(id)) and pod.record.ready]
        waits = [asyncio.create_task(self._await(pod, files)) for pod in pods]
        try:
            for wait in asyncio.as_completed(waits):
                found = await wait
                if found is not None:
                    yield found
        finally:
            for each in waits:
                each.cancel()

    async def close(self) -> None:
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._layers.close()

    # ---------------------------------------------------------------------------- one pod

    async def _await(self, pod: Pod, files: bool) -> PodStats | None:
        flight = self._flights.get((pod.id, files)) or self._begin(pod, files)
        patience = flight.began + PATIENCE_S - asyncio.get_running_loop().time()
        await asyncio.wait({flight.task}, timeout=max(0.0, patience))
        if not flight.task.done():
            self._note(pod, f"no answer within {PATIENCE_S:g} s")
            return None
        if flight.task.cancelled():
            return None
        error = flight.task.exception()
        if isinstance(error, SandboxError):
            self._note(pod, str(error))
            return None
        found = flight.task.result()
        self._silent.discard(pod)
        return found

    def _note(self, pod: Pod, problem: str) -> None:
        """Once, however often a kubelet asks."""
        if pod not in self._silent and pod.record.ready:
            self._silent.add(pod)
            log.warning("pod %s: its usage cannot be read: %s", pod.id, problem)

    def _begin(self, pod: Pod, files: bool) -> _Flight:
        key = (pod.id, files)
        flight = _Flight(asyncio.create_task(self._read(pod, files)), asyncio.get_running_loop().time())
        self._flights[key] = flight
        flight.task.add_done_callback(lambda task: self._ended(key, task))
        return flight

    def _ended(self, key: tuple[PodId, bool], task: asyncio.Task[PodStats]) -> None:
        del self._flights[key]
        if not task.cancelled():
            task.exception()  # seen, even if nobody had the patience

    async def _read(self, pod: Pod, files: bool) -> PodStats:
        """Raises SandboxError."""
        containers = [container for container in self._inventory.containers_of(pod) if container.running]
        ids = [container.id for container in containers]
        sent_ns = time.time_ns()
        values = await self._engines.of(pod).usage(pod, ids, files=files)
        # who looked tells best when, as far as it can be true
        at_ns = min(max(values.wall_ns, sent_ns), time.time_ns())
        found = parse.parse(pod.id, ids, _interfaces(pod), values, at_ns)
        if found is None:
            raise ProtocolError(f"pod {pod.id}: its agent sent other values than it was asked for")
        return await self._completed(pod, containers, found)

    async def _completed(self, pod: Pod, containers: Sequence[Container], found: PodStats) -> PodStats:
        """With what the guest cannot know: rates, and what was written to the host's disk."""
        layers = await self._layers.look(containers)
        complete = [
            replace(one, usage=self._rated(container, one.at_ns, one.usage), layer=layer)
            for container, one, layer in zip(containers, found.containers, layers, strict=True)
        ]
        usage = self._rated(pod, found.at_ns, found.usage)
        return replace(found, usage=usage, containers=tuple(complete))

    def _rated(self, subject: Pod | Container, at_ns: int, usage: CgroupStats) -> CgroupStats:
        rate = self._rates.setdefault(subject, Rate()).look(at_ns, usage.cpu.usage_ns)
        return replace(usage, cpu=replace(usage.cpu, nano_cores=rate))


def _interfaces(pod: Pod) -> list[str]:
    network = pod.record.network
    return [nic.name for nic in network.interfaces] if network else []
