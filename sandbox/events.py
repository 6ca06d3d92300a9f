"""Events of pods and containers for subscribers (CRI, GetContainerEvents).

Events come from the state changes of records, so there is one for every change that a client can see. Each
holds the records as they were then. Nothing is kept for later: a client that subscribes again lists the
state first. A subscription ends with FellBehind once QUEUE_MAX events wait for its reader; nothing ever
waits for a reader.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from enum import StrEnum

from sandbox.container import Container
from sandbox.errors import FellBehind
from sandbox.inventory import Inventory
from sandbox.pod import Pod
from sandbox.records import ContainerRecord, ContainerState, PodRecord, PodState
from sandbox.spec import Value

QUEUE_MAX = 1000  # as many as a kubelet keeps on its side


class EventKind(StrEnum):
    """The CRI's types of events (ContainerEventType)."""

    CREATED = "created"
    STARTED = "started"
    STOPPED = "stopped"
    DELETED = "deleted"


class Event(Value, frozen=True, kw_only=True):
    """One event. `id` is of a container, or of the pod itself; `at_ns` (wall clock) rises with each event."""

    kind: EventKind
    id: str
    at_ns: int
    pod: PodRecord
    containers: tuple[ContainerRecord, ...]


_OF_POD = {
    PodState.READY: (EventKind.CREATED, EventKind.STARTED),
    PodState.NOT_READY: (EventKind.STOPPED,),
}
_OF_CONTAINER = {
    ContainerState.CREATED: (EventKind.CREATED,),
    ContainerState.RUNNING: (EventKind.STARTED,),
    ContainerState.EXITED: (EventKind.STOPPED,),
}


class Subscription:
    """An asynchronous iterator over events, for one reader. Raises FellBehind once the reader is too slow;
    ends with `end`, after the events that wait."""

    def __init__(self) -> None:
        self._queue: deque[Event] = deque()
        self._news = asyncio.Event()
        self._ended = False
        self._behind = False

    def put(self, event: Event) -> None:
        """Queue an event. When the queue is full, drop all, and fail the reader."""
        if len(self._queue) >= QUEUE_MAX:
            self._behind = True
            self._queue.clear()
        if not self._behind:
            self._queue.append(event)
        self._news.set()

    def end(self) -> None:
        """End the iteration after the events that wait. Idempotent."""
        self._ended = True
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            while self._queue and not self._behind:
                yield self._queue.popleft()
            if self._behind:
                raise FellBehind(QUEUE_MAX)
            if self._ended:
                return
            self._news.clear()
            await self._news.wait()


class Events:
    """Turns changes of the inventory into events for all subscriptions. Belongs to one event loop."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._subscriptions: set[Subscription] = set()
        self._last_ns = 0
        self._closed = False
        inventory.observe(self)

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """Subscribe to all events from now on, for the length of the context. Ended at once after `close`."""
        subscription = Subscription()
        self._subscriptions.add(subscription)
        if self._closed:
            subscription.end()
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def close(self) -> None:
        """End every subscription, now and later."""
        self._closed = True
        for subscription in self._subscriptions:
            subscription.end()

    # ------------------------------------------------------------------------- observer

    def pod_changed(self, pod: Pod) -> None:
        """Emit what the pod's new state means: READY is created and started."""
        for kind in _OF_POD.get(pod.record.state, ()):
            self._emit(kind, pod.id, pod)

    def pod_deleted(self, pod: Pod) -> None:
        """Emit the deletion of a pod that clients have seen."""
        if pod.record.state is not PodState.STARTING:
            self._emit(EventKind.DELETED, pod.id, pod)

    def container_changed(self, container: Container) -> None:
        """Emit what the container's new state means."""
        for kind in _OF_CONTAINER.get(container.record.state, ()):
            self._emit(kind, container.id, container.pod)

    def container_deleted(self, container: Container) -> None:
        """Emit the deletion of a container that clients have seen. It is out of the inventory by now, so the
        event lists the containers that remain."""
        if container.record.state is not ContainerState.CREATING:
            self._emit(EventKind.DELETED, container.id, container.pod)

    def _emit(self, kind: EventKind, id: str, pod: Pod) -> None:
        if not self._subscriptions:
            return
        self._last_ns = max(time.time_ns(), self._last_ns + 1)
        containers = (each.record for each in self._inventory.containers_of(pod))
        shown = sorted(
            (each for each in containers if each.state is not ContainerState.CREATING),
            key=lambda each: each.created_at_ns,
        )
        event = Event(kind=kind, id=id, at_ns=self._last_ns, pod=pod.record, containers=tuple(shown))
        for subscription in self._subscriptions:
            subscription.put(event)
