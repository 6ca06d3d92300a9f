"""The rpcs of the RuntimeService about containers."""

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

# A negative or absurd timeout would wait for ever, or overflow the clock.
TIMEOUT_MAX_S = 10 * 365 * 24 * 3600


class ContainerCalls:
    """Rpcs about containers. Concurrent calls for the same container and operation share one execution."""

    def __init__(self, containers: Containers, flights: Flights) -> None:
        self._containers = containers
        self._flights = flights
        self._items = ListCache[ContainerRecord](lambda record: record.id, objects.container_item)
        # a ContainerStatusResponse without `info` has the form of a list of one status
        self._statuses = ListCache[ContainerRecord](lambda record: record.id, objects.container_status)

    # ------------------------------------------------------------------------------ life cycle

    async def CreateContainer(self, request: pb.CreateContainerRequest) -> pb.CreateContainerResponse:
        """Create a container in a ready pod. A concurrent retry gets the same id."""
        pod_id = request.pod_sandbox_id
        spec = container_spec(request.config)
        key = ("create-container", pod_id, spec.name, spec.attempt)
        id = await self._flights.join(key, lambda: self._containers.create(pod_id, spec))
        return pb.CreateContainerResponse(container_id=id)

    async def StartContainer(self, request: pb.StartContainerRequest) -> pb.StartContainerResponse:
        """Start a created container. Raises NotFound, WrongState."""
        id = self._find(request.container_id).id
        await self._flights.join(("start-container", id), lambda: self._containers.start(id))
        return pb.StartContainerResponse()

    async def StopContainer(self, request: pb.StopContainerRequest) -> pb.StopContainerResponse:
        """Stop a container with its stop signal, then SIGKILL after the timeout. Idempotent."""
        id = self._full_id(request.container_id)
        timeout_s = float(min(max(request.timeout, 0), TIMEOUT_MAX_S))
        # the timeout is part of the key: a retry with a shorter one must not wait for the first call's
        key = ("stop-container", id, timeout_s)
        await self._flights.join(key, lambda: self._containers.stop(id, timeout_s))
        return pb.StopContainerResponse()

    async def RemoveContainer(self, request: pb.RemoveContainerRequest) -> pb.RemoveContainerResponse:
        """Stop and remove a container. Idempotent."""
        id = self._full_id(request.container_id)
        await self._flights.join(("remove-container", id), lambda: self._containers.remove(id))
        self._statuses.drop(id)
        return pb.RemoveContainerResponse()

    # ---------------------------------------------------------------------------------- status

    async def ListContainers(self, request: pb.ListContainersRequest) -> bytes:
        """List containers that match the filter, as an encoded ListContainersResponse."""
        records = self._containers.list()
        self._items.keep_only(records)
        self._statuses.keep_only(records)  # also those removed together with their pod
        return self._items.of(objects.matching_containers(records, request.filter))

    async def StreamContainers(self, request: pb.StreamContainersRequest) -> AsyncIterator[bytes]:
        """Stream what ListContainers lists, in batches of a bounded size."""
        records = self._containers.list()
        self._items.keep_only(records)
        for batch in self._items.batches(objects.matching_containers(records, request.filter)):
            yield batch

    async def ContainerStatus(self, request: pb.ContainerStatusRequest) -> pb.ContainerStatusResponse | bytes:
        """Return the status of a container; `verbose` adds the map `info`. Raises NotFound."""
        record = self._find(request.container_id)
        if not request.verbose:
            return self._statuses.of([record])
        response = pb.ContainerStatusResponse(status=objects.container_status(record))
        response.info["info"] = info_json(await self._containers.describe(record))
        return response

    # ------------------------------------------------------------------- exec, logs, resources

    async def ExecSync(self, request: pb.ExecSyncRequest) -> pb.ExecSyncResponse:
        """Run a command and return its output and exit code.

        Not shared between calls: a client that disconnects ends its process.
        """
        id = self._find(request.container_id).id
        if not request.cmd:
            raise InvalidSpec("cmd", "is empty", "a program and its arguments")
        if request.timeout < 0:
            raise InvalidSpec("timeout", f"{request.timeout} is negative", "seconds; 0 for no limit")
        timeout_s = float(min(request.timeout, TIMEOUT_MAX_S)) or None
        result = await self._containers.exec_sync(id, list(request.cmd), timeout_s)
        return pb.ExecSyncResponse(stdout=result.stdout, stderr=result.stderr, exit_code=result.exit_code)

    async def ReopenContainerLog(
        self, request: pb.ReopenContainerLogRequest
    ) -> pb.ReopenContainerLogResponse:
        """Open the container's log file again after a rotation. Raises NotFound, WrongState."""
        id = self._find(request.container_id).id
        await self._flights.join(("reopen-log", id), lambda: self._containers.reopen_log(id))
        return pb.ReopenContainerLogResponse()

    async def UpdateContainerResources(
        self, request: pb.UpdateContainerResourcesRequest
    ) -> pb.UpdateContainerResourcesResponse:
        """Apply new limits to a created or running container. Raises NotFound, InvalidSpec."""
        id = self._find(request.container_id).id
        resources = update_resources(request)
        with renamed("config.linux.resources", "linux"):
            await self._flights.alone(lambda: self._containers.update(id, resources))
        return pb.UpdateContainerResourcesResponse()

    def _find(self, id: str) -> ContainerRecord:
        """Raises NotFound."""
        record = self._containers.find(id)
        set_pod_context(record.pod_id[:13])
        return record

    def _full_id(self, id: str) -> str:
        """Return the full id for a prefix of it, and an unknown id as it is (for idempotent calls)."""
        try:
            return self._find(id).id
        except NotFound:
            return id
