"""The CRI's calls about containers."""

from __future__ import annotations

from collections.abc import AsyncIterator

from cri.fields import renamed
from cri.log_format import set_pod_context
from cri.ports import Containers
from cri.proto import runtime_v1_pb2 as pb
from cri.responses import objects
from cri.responses.info import info_json
from cri.responses.list_cache import ListCache
from cri.translate import container_spec, update_resources
from sandbox.errors import InvalidSpec, NotFound
from sandbox.host.flights import Flights
from sandbox.records import ContainerRecord

# A negative or absurd timeout would be a wait for ever, or an overflow of the clock.
TIMEOUT_MAX_S = 10 * 365 * 24 * 3600


class ContainerCalls:
    def __init__(self, containers: Containers, flights: Flights) -> None:
        self._containers = containers
        self._flights = flights
        self._items = ListCache[ContainerRecord](lambda record: record.id, objects.container_item)

    # ------------------------------------------------------------------------------ life cycle

    async def CreateContainer(self, request: pb.CreateContainerRequest) -> pb.CreateContainerResponse:
        pod_id = request.pod_sandbox_id
        spec = container_spec(request.config)
        key = ("create-container", pod_id, spec.name, spec.attempt)
        id = await self._flights.join(key, lambda: self._containers.create(pod_id, spec))
        return pb.CreateContainerResponse(container_id=id)

    async def StartContainer(self, request: pb.StartContainerRequest) -> pb.StartContainerResponse:
        id = self._found(request.container_id).id
        await self._flights.join(("start-container", id), lambda: self._containers.start(id))
        return pb.StartContainerResponse()

    async def StopContainer(self, request: pb.StopContainerRequest) -> pb.StopContainerResponse:
        id = self._noted(request.container_id)
        timeout_s = float(min(max(request.timeout, 0), TIMEOUT_MAX_S))
        # a retry in more of a hurry must not wait for the first one's patience
        key = ("stop-container", id, timeout_s)
        await self._flights.join(key, lambda: self._containers.stop(id, timeout_s))
        return pb.StopContainerResponse()

    async def RemoveContainer(self, request: pb.RemoveContainerRequest) -> pb.RemoveContainerResponse:
        id = self._noted(request.container_id)
        await self._flights.join(("remove-container", id), lambda: self._containers.remove(id))
        return pb.RemoveContainerResponse()

    # ------------------------------------------------------------------------------- questions

    async def ListContainers(self, request: pb.ListContainersRequest) -> bytes:
        records = self._containers.list()
        self._items.keep_only(records)
        return self._items.of(objects.matching_containers(records, request.filter))

    async def StreamContainers(self, request: pb.StreamContainersRequest) -> AsyncIterator[bytes]:
        records = self._containers.list()
        self._items.keep_only(records)
        for batch in self._items.batches(objects.matching_containers(records, request.filter)):
            yield batch

    async def ContainerStatus(self, request: pb.ContainerStatusRequest) -> pb.ContainerStatusResponse:
        record = self._found(request.container_id)
        response = pb.ContainerStatusResponse(status=objects.container_status(record))
        if request.verbose:
            response.info["info"] = info_json(await self._containers.describe(record))
        return response

    # -------------------------------------------------------------------------------- the rest

    async def ExecSync(self, request: pb.ExecSyncRequest) -> pb.ExecSyncResponse:
        """No flight: a client that goes away takes its process with it."""
        id = self._found(request.container_id).id
        if not request.cmd:
            raise InvalidSpec("cmd", "is empty", "a program and its arguments")
        if request.timeout < 0:
            raise InvalidSpec("timeout", f"{request.timeout} is negative", "seconds; 0: for ever")
        timeout_s = float(min(request.timeout, TIMEOUT_MAX_S)) or None
        result = await self._containers.exec_sync(id, list(request.cmd), timeout_s)
        return pb.ExecSyncResponse(stdout=result.stdout, stderr=result.stderr, exit_code=result.exit_code)

    async def ReopenContainerLog(
        self, request: pb.ReopenContainerLogRequest
    ) -> pb.ReopenContainerLogResponse:
        id = self._found(request.container_id).id
        await self._flights.join(("reopen-log", id), lambda: self._containers.reopen_log(id))
        return pb.ReopenContainerLogResponse()

    async def UpdateContainerResources(
        self, request: pb.UpdateContainerResourcesRequest
    ) -> pb.UpdateContainerResourcesResponse:
        id = self._found(request.container_id).id
        resources = update_resources(request)
        with renamed("config.linux.resources", "linux"):
            await self._flights.alone(lambda: self._containers.update(id, resources))
        return pb.UpdateContainerResourcesResponse()

    def _found(self, id: str) -> ContainerRecord:
        """Raises NotFound."""
        record = self._containers.find(id)
        set_pod_context(record.pod_id[:13])
        return record

    def _noted(self, id: str) -> str:
        """The whole id, where an unknown one is fine."""
        try:
            return self._found(id).id
        except NotFound:
            return id
