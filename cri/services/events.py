"""The rpc of the RuntimeService that streams events of containers."""

from __future__ import annotations

from collections.abc import AsyncIterator

from cri.ports import Events
from cri.proto import runtime_v1_pb2 as pb
from cri.responses import objects
from sandbox.events import Event, EventKind

_KINDS = {
    EventKind.CREATED: pb.CONTAINER_CREATED_EVENT,
    EventKind.STARTED: pb.CONTAINER_STARTED_EVENT,
    EventKind.STOPPED: pb.CONTAINER_STOPPED_EVENT,
    EventKind.DELETED: pb.CONTAINER_DELETED_EVENT,
}


class EventCalls:
    """GetContainerEvents."""

    def __init__(self, events: Events) -> None:
        self._events = events

    async def GetContainerEvents(
        self, request: pb.GetEventsRequest
    ) -> AsyncIterator[pb.ContainerEventResponse]:
        """Stream events until the client cancels, falls behind (RESOURCE_EXHAUSTED), or the daemon stops."""
        with self._events.subscribe() as subscription:
            async for event in subscription:
                yield event_response(event)


def event_response(event: Event) -> pb.ContainerEventResponse:
    """Convert an event to its CRI message."""
    return pb.ContainerEventResponse(
        container_id=event.id,
        container_event_type=_KINDS[event.kind],
        created_at=event.at_ns,
        pod_sandbox_status=objects.pod_status(event.pod),
        containers_statuses=[objects.container_status(record) for record in event.containers],
    )
