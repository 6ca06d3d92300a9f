"""How much containers wrote to their root filesystems, without anybody waiting for it.

Knowing means walking a directory, which can take seconds: so what is known is answered at once, and
when it has grown old a walk begins behind it, one at a time. A tree that takes long to walk is walked
less often. Nothing is kept of a container that is gone, and nothing survives the daemon.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from image.stores import RootfsStore
from sandbox.container import Container
from sandbox.stats.parse import LayerStats

log = logging.getLogger(__name__)

FRESH_S = 10.0  # as the kubelet's own look at eviction comes round
REST_FACTOR = 20  # a walk may take a twentieth of the time
FIRST_WAIT_S = 0.1  # for a container that was never looked at, whose tree is small as a rule


@dataclass(slots=True)
class _Known:
    stats: LayerStats
    fresh_until: float


class LayerUsage:
    """Belongs to one event loop; `close` in the end."""

    def __init__(self, store: RootfsStore) -> None:
        self._store = store
        self._known: WeakKeyDictionary[Container, _Known] = WeakKeyDictionary()
        self._walks: dict[Container, asyncio.Task[None]] = {}
        self._turn = asyncio.Semaphore(1)

    async def look(self, containers: Sequence[Container]) -> Sequence[LayerStats | None]:
        """What is known of each, at once; new containers are given a moment."""
        now = asyncio.get_running_loop().time()
        for container in containers:
            known = self._known.get(container)
            if (known is None or now > known.fresh_until) and container not in self._walks:
                self._begin(container)
        new = [self._walks[one] for one in containers if one not in self._known and one in self._walks]
        if new:
            await asyncio.wait(new, timeout=FIRST_WAIT_S)
        found = (self._known.get(container) for container in containers)
        return [known.stats if known else None for known in found]

    def _begin(self, container: Container) -> None:
        walk = asyncio.create_task(self._walk(container))
        self._walks[container] = walk
        walk.add_done_callback(lambda _: self._walks.pop(container, None))

    async def _walk(self, container: Container) -> None:
        async with self._turn:
            began = time.monotonic()
            try:
                usage = await asyncio.to_thread(self._store.usage, container.id)
            except OSError as error:
                log.warning("container %s: its writable layer cannot be measured: %s", container.id, error)
                return
            took = time.monotonic() - began
        rest = max(FRESH_S, REST_FACTOR * took)
        stats = LayerStats(at_ns=time.time_ns(), bytes=usage.bytes, inodes=usage.inodes)
        self._known[container] = _Known(stats, asyncio.get_running_loop().time() + rest)

    async def close(self) -> None:
        walks = list(self._walks.values())
        for walk in walks:
            walk.cancel()
        await asyncio.gather(*walks, return_exceptions=True)
