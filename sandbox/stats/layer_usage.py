"""How much containers wrote to their root filesystems, measured in the background.

Measuring means reading a directory tree, which can take seconds. So a caller gets the last known values
at once, and values older than FRESH_S are measured again in the background, one tree at a time. A tree that
takes long to read is read less often. Values of a container go with it, and none survive the daemon.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

from image.stores import Usage
from sandbox.stats.parse import LayerStats

log = logging.getLogger(__name__)

FRESH_S = 10.0  # the period of the kubelet's eviction manager
REST_FACTOR = 20  # measuring a tree may take a twentieth of the time
FIRST_WAIT_S = 0.1  # for a container that was never measured; its tree is usually small


class Measurable(Protocol):
    """The part of a RootfsStore that is needed here."""

    def usage(self, key: str) -> Usage:
        """Measure a writable layer. Blocking. Raises OSError."""
        ...


class Subject(Protocol):
    """A container, as far as it is needed here: hashable by identity, and weakly referenceable."""

    @property
    def id(self) -> str:
        """Key of its root filesystem in the store."""
        ...


@dataclass(slots=True)
class _Known:
    stats: LayerStats
    fresh_until: float  # loop time


class LayerUsage:
    """Keeps the usage of writable layers. Belongs to one event loop; `close` it at the end."""

    def __init__(self, store: Measurable) -> None:
        self._store = store
        self._known: WeakKeyDictionary[Subject, _Known] = WeakKeyDictionary()
        self._tasks: dict[Subject, asyncio.Task[None]] = {}
        self._one_at_a_time = asyncio.Semaphore(1)

    async def sample(self, containers: Sequence[Subject]) -> Sequence[LayerStats | None]:
        """Return what is known of each, and start measuring where it is no longer fresh.

        Waits at most FIRST_WAIT_S for containers that were never measured; None: no value yet.
        """
        now = asyncio.get_running_loop().time()
        for container in containers:
            known = self._known.get(container)
            if (known is None or now > known.fresh_until) and container not in self._tasks:
                self._begin(container)
        new = [self._tasks[one] for one in containers if one not in self._known and one in self._tasks]
        if new:
            await asyncio.wait(new, timeout=FIRST_WAIT_S)
        found = (self._known.get(container) for container in containers)
        return [known.stats if known else None for known in found]

    def _begin(self, container: Subject) -> None:
        task = asyncio.create_task(self._measure(container))
        self._tasks[container] = task
        task.add_done_callback(lambda _: self._tasks.pop(container, None))

    async def _measure(self, container: Subject) -> None:
        async with self._one_at_a_time:
            began = time.monotonic()
            try:
                usage = await asyncio.to_thread(self._store.usage, container.id)
            except OSError as error:
                log.warning("cannot measure the writable layer of container %s: %s", container.id, error)
                return
            took = time.monotonic() - began
        rest = max(FRESH_S, REST_FACTOR * took)
        stats = LayerStats(at_ns=time.time_ns(), bytes=usage.bytes, inodes=usage.inodes)
        self._known[container] = _Known(stats, asyncio.get_running_loop().time() + rest)

    async def close(self) -> None:
        """Cancel all measuring and wait for its end; a tree that is being read is read to its end first."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
