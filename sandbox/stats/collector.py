"""Reads the usage of pods: one round trip to the guest for each pod, in parallel, bounded in time.

A pod has at most one read of a kind under way, which all callers share. A caller waits for it until it is
WAIT_S old, then leaves the pod out, so that the rest of a list is not held up. So a guest that does not
answer costs the first caller WAIT_S and the next ones nothing, until it answers or the timeout of the request
itself ends the read and the next caller begins another.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from weakref import WeakKeyDictionary, WeakSet

from msgspec.structs import replace

from sandbox.container import Container
from sandbox.engine import Engines
from sandbox.errors import SandboxError
from sandbox.host.flights import Flights, ShuttingDown
from sandbox.inventory import Inventory
from sandbox.pod import Pod
from sandbox.spec import PodId
from sandbox.stats import parse
from sandbox.stats.layer_usage import LayerUsage
from sandbox.stats.parse import CgroupStats, PodStats

log = logging.getLogger(__name__)

WAIT_S = 3.0
RATE_WINDOW_NS = 500_000_000  # samples closer than this yield no new rate


class Rate:
    """CPU time per wall time between two samples of one counter."""

    def __init__(self) -> None:
        self._at_ns = 0
        self._cpu_ns = 0
        self._rate: int | None = None

    def sample(self, at_ns: int, cpu_ns: int) -> int | None:
        """Add a sample and return the current rate in billionths of a CPU (the CRI's nano cores).

        None at the first sample, and when the counter has fallen, as it does when it starts from zero again.
        """
        elapsed = at_ns - self._at_ns
        if self._at_ns and elapsed < RATE_WINDOW_NS:
            return self._rate
        used = cpu_ns - self._cpu_ns
        self._rate = used * 1_000_000_000 // elapsed if self._at_ns and used >= 0 else None
        self._at_ns, self._cpu_ns = at_ns, cpu_ns
        return self._rate


class StatsCollector:
    """Collects the usage of all pods on request. Belongs to one event loop; `close` it at the end."""

    def __init__(self, inventory: Inventory, engines: Engines, layers: LayerUsage) -> None:
        self._inventory = inventory
        self._engines = engines
        self._layers = layers
        self._flights = Flights()
        self._rates: WeakKeyDictionary[Pod | Container, Rate] = WeakKeyDictionary()
        self._silent: WeakSet[Pod] = WeakSet()

    async def read(self, pod_ids: Iterable[PodId], *, files: bool = False) -> AsyncIterator[PodStats]:
        """Yield each pod's usage as it arrives, in any order, within WAIT_S and a little.

        Leaves out pods that are gone, not ready, or do not answer in time. With `files`, open descriptors and
        sockets are counted too, which takes the guest longer.
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
        """Cancel all reads and wait for their end; readers get nothing more."""
        await self._flights.close(0)
        await self._layers.close()

    # ---------------------------------------------------------------------------- one pod

    async def _await(self, pod: Pod, files: bool) -> PodStats | None:
        try:
            found = await self._flights.join(
                (pod.id, files), lambda: self._read_or_error(pod, files), within_s=WAIT_S
            )
        except TimeoutError:
            self._log_silence(pod, f"no answer within {WAIT_S:g} s")
            return None
        except ShuttingDown:
            return None
        if isinstance(found, SandboxError):
            self._log_silence(pod, str(found))
            return None
        self._silent.discard(pod)
        return found

    def _log_silence(self, pod: Pod, problem: str) -> None:
        """Log once until the pod answers again, however often a kubelet asks."""
        if pod not in self._silent and pod.record.ready:
            self._silent.add(pod)
            log.warning("cannot read the usage of pod %s, leaving it out of stats: %s", pod.id, problem)

    async def _read_or_error(self, pod: Pod, files: bool) -> PodStats | SandboxError:
        """Return the error as a value: a read may fail after its callers have stopped waiting."""
        try:
            return await self._read(pod, files)
        except SandboxError as error:
            return error

    async def _read(self, pod: Pod, files: bool) -> PodStats:
        """Raises SandboxError."""
        containers = [container for container in self._inventory.containers_of(pod) if container.running]
        ids = [container.id for container in containers]
        sent_ns = time.time_ns()
        sample = await self._engines.of(pod).control.usage(pod, ids, files=files)
        # the guest's time of reading is the exact one, as far as it lies between request and reply
        at_ns = min(max(sample.wall_ns, sent_ns), time.time_ns())
        found = parse.parse(pod.id, ids, _interfaces(pod), sample, at_ns)
        return await self._completed(pod, containers, found)

    async def _completed(self, pod: Pod, containers: Sequence[Container], found: PodStats) -> PodStats:
        """Add what the guest cannot know: rates, and what containers wrote to the host's disk."""
        layers = await self._layers.sample(containers)
        complete = [
            replace(one, usage=self._rated(container, one.at_ns, one.usage), layer=layer)
            for container, one, layer in zip(containers, found.containers, layers, strict=True)
        ]
        usage = self._rated(pod, found.at_ns, found.usage)
        return replace(found, usage=usage, containers=tuple(complete))

    def _rated(self, subject: Pod | Container, at_ns: int, usage: CgroupStats) -> CgroupStats:
        rate = self._rates.setdefault(subject, Rate()).sample(at_ns, usage.cpu.usage_ns)
        return replace(usage, cpu=replace(usage.cpu, nano_cores=rate))


def _interfaces(pod: Pod) -> list[str]:
    network = pod.record.network
    return [nic.name for nic in network.interfaces] if network else []
