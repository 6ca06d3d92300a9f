"""The rpcs of the RuntimeService about pod sandboxes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from cri.fields import renamed
from cri.ports import Node, Pods
from cri.proto import runtime_v1_pb2 as pb
from cri.responses import objects
from cri.responses.info import info_json
from cri.responses.list_cache import ListCache
from cri.translate import pod_spec, resources
from sandbox.errors import InvalidSpec, NotFound
from sandbox.host.flights import Flights
from sandbox.records import ContainerRecord, ContainerState, PodRecord


class PodCalls:
    """Rpcs about pods. Concurrent calls for the same pod and operation share one execution."""

    def __init__(self, pods: Pods, node: Node, flights: Flights) -> None:
        self._pods = pods
        self._node = node
        self._flights = flights
        self._items = ListCache[PodRecord](lambda record: record.id, objects.pod_item)

    async def RunPodSandbox(self, request: pb.RunPodSandboxRequest) -> pb.RunPodSandboxResponse:
        """Start a pod and return its id. A concurrent retry gets the same id."""
        spec = pod_spec(request.config, request.runtime_handler)
        if spec.user_namespace and not self._node.features.user_namespaces:
            field = "config.linux.security_context.namespace_options.userns_options.mode"
            raise InvalidSpec(field, f"POD: {self._node.features.user_namespace_obstacle}", "NODE")
        key = ("run-pod", spec.namespace, spec.name, spec.uid, spec.attempt)
        pod_id = await self._flights.join(key, lambda: self._pods.run(spec))
        return pb.RunPodSandboxResponse(pod_sandbox_id=pod_id)

    async def StopPodSandbox(self, request: pb.StopPodSandboxRequest) -> pb.StopPodSandboxResponse:
        """Stop a pod and its containers, and release its network. Idempotent."""
        id = self._full_id(request.pod_sandbox_id)
        await self._flights.join(("stop-pod", id), lambda: self._pods.stop(id))
        return pb.StopPodSandboxResponse()

    async def RemovePodSandbox(self, request: pb.RemovePodSandboxRequest) -> pb.RemovePodSandboxResponse:
        """Stop and remove a pod and its containers. Idempotent."""
        id = self._full_id(request.pod_sandbox_id)
        await self._flights.join(("remove-pod", id), lambda: self._pods.remove(id))
        return pb.RemovePodSandboxResponse()

    async def PodSandboxStatus(self, request: pb.PodSandboxStatusRequest) -> pb.PodSandboxStatusResponse:
        """Return the status of a pod and its containers; `verbose` adds the map `info`. Raises NotFound."""
        record = self._pods.find(request.pod_sandbox_id)
        response = pb.PodSandboxStatusResponse(
            status=objects.pod_status(record),
            containers_statuses=[objects.container_status(one) for one in self._containers_of(record)],
            timestamp=time.time_ns(),
        )
        if request.verbose:
            response.info["info"] = info_json(await self._pods.describe(record))
        return response

    def _full_id(self, id: str) -> str:
        """Return the full id for a prefix of it, and an unknown id as it is (for idempotent calls)."""
        try:
            return self._pods.find(id).id
        except NotFound:
            return id

    def _containers_of(self, record: PodRecord) -> list[ContainerRecord]:
        found = self._pods.containers_of(record.id)
        shown = (one for one in found if one.state is not ContainerState.CREATING)
        return sorted(shown, key=lambda one: one.created_at_ns)

    async def ListPodSandbox(self, request: pb.ListPodSandboxRequest) -> bytes:
        """List pods that match the filter, as an encoded ListPodSandboxResponse."""
        records = self._pods.list()
        self._items.keep_only(records)
        return self._items.of(objects.matching_pods(records, request.filter))

    async def StreamPodSandboxes(self, request: pb.StreamPodSandboxesRequest) -> AsyncIterator[bytes]:
        """Stream what ListPodSandbox lists, in batches of a bounded size."""
        records = self._pods.list()
        self._items.keep_only(records)
        for batch in self._items.batches(objects.matching_pods(records, request.filter)):
            yield batch

    async def UpdatePodSandboxResources(
        self, request: pb.UpdatePodSandboxResourcesRequest
    ) -> pb.UpdatePodSandboxResourcesResponse:
        """Apply new limits to a pod as a whole. Raises NotFound, InvalidSpec."""
        id = self._pods.find(request.pod_sandbox_id).id
        wanted, overhead = resources(request.resources, "resources"), resources(request.overhead, "overhead")
        with renamed("config.linux.resources", "resources"):
            await self._flights.alone(lambda: self._pods.update(id, wanted, overhead))
        return pb.UpdatePodSandboxResourcesResponse()
