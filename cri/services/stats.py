"""The rpcs of the RuntimeService about usage: statistics and metrics, also streamed.

A list samples every pod's guest concurrently and omits those that do not answer in time. A call about a
single pod or container whose guest does not answer fails with UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path

from cri.log_format import set_pod_context
from cri.ports import Containers, Pods, StatsCollector
from cri.proto import runtime_v1_pb2 as pb
from cri.responses import objects, pod_metrics, usage
from cri.responses.pod_metrics import Filesystem, Measured
from sandbox.errors import GuestUnreachable
from sandbox.records import ContainerRecord, ContainerState, PodRecord
from sandbox.spec import ContainerId, PodId
from sandbox.stats.parse import ContainerStats as ContainerUsage
from sandbox.stats.parse import PodStats


class StatsCalls:
    """Rpcs about usage. `layers_mountpoint` is a path on the filesystem of the writable layers."""

    def __init__(
        self, pods: Pods, containers: Containers, stats: StatsCollector, layers_mountpoint: str
    ) -> None:
        self._pods = pods
        self._containers = containers
        self._stats = stats
        self._mountpoint = layers_mountpoint

    # ------------------------------------------------------------------------------ containers

    async def ContainerStats(self, request: pb.ContainerStatsRequest) -> pb.ContainerStatsResponse:
        """Return usage of a container; only its attributes if it does not run. Raises NotFound."""
        record = self._containers.find(request.container_id)
        set_pod_context(record.pod_id[:13])
        found = None
        if record.state is ContainerState.RUNNING:
            pod = await self._one(record.pod_id)
            # None if it has exited meanwhile
            found = next((one for one in pod.containers if one.container_id == record.id), None)
        return pb.ContainerStatsResponse(stats=self._container(record, found))

    async def ListContainerStats(
        self, request: pb.ListContainerStatsRequest
    ) -> pb.ListContainerStatsResponse:
        """List usage of the running containers that match the filter."""
        batches = [batch async for batch in self._container_batches(request.filter)]
        return pb.ListContainerStatsResponse(stats=[stats for batch in batches for stats in batch])

    async def StreamContainerStats(
        self, request: pb.StreamContainerStatsRequest
    ) -> AsyncIterator[pb.StreamContainerStatsResponse]:
        """Stream what ListContainerStats lists, a message per pod."""
        async for batch in self._container_batches(request.filter):
            yield pb.StreamContainerStatsResponse(container_stats=batch)

    async def _container_batches(
        self, filter: pb.ContainerStatsFilter
    ) -> AsyncIterator[Sequence[pb.ContainerStats]]:
        """Yield usage of the running containers, one pod at a time."""
        wanted = {
            record.id: record
            for record in objects.matching_containers(self._containers.list(), filter)
            if record.state is ContainerState.RUNNING
        }
        async for pod in self._stats.read({record.pod_id for record in wanted.values()}):
            batch = [
                self._container(wanted[one.container_id], one)
                for one in pod.containers
                if one.container_id in wanted
            ]
            if batch:
                yield batch

    def _container(self, record: ContainerRecord, stats: ContainerUsage | None) -> pb.ContainerStats:
        return usage.container_stats(record, stats, self._mountpoint)

    # ------------------------------------------------------------------------------------ pods

    async def PodSandboxStats(self, request: pb.PodSandboxStatsRequest) -> pb.PodSandboxStatsResponse:
        """Return usage of a pod; only its attributes if it is not ready. Raises NotFound."""
        record = self._pods.find(request.pod_sandbox_id)
        stats = await self._one(record.id) if record.ready else None
        return pb.PodSandboxStatsResponse(stats=self._pod(record, stats))

    async def ListPodSandboxStats(
        self, request: pb.ListPodSandboxStatsRequest
    ) -> pb.ListPodSandboxStatsResponse:
        """List usage of the ready pods that match the filter."""
        stats = [one async for one in self._pod_stats(request.filter)]
        return pb.ListPodSandboxStatsResponse(stats=stats)

    async def StreamPodSandboxStats(
        self, request: pb.StreamPodSandboxStatsRequest
    ) -> AsyncIterator[pb.StreamPodSandboxStatsResponse]:
        """Stream what ListPodSandboxStats lists, a message per pod."""
        async for stats in self._pod_stats(request.filter):
            yield pb.StreamPodSandboxStatsResponse(pod_sandbox_stats=[stats])

    async def _pod_stats(self, filter: pb.PodSandboxStatsFilter) -> AsyncIterator[pb.PodSandboxStats]:
        wanted = _ready(objects.matching_pods(self._pods.list(), filter))
        async for stats in self._stats.read(wanted):
            yield self._pod(wanted[stats.pod_id], stats)

    def _pod(self, record: PodRecord, stats: PodStats | None) -> pb.PodSandboxStats:
        if stats is None:
            return usage.pod_stats(record, None, [])
        records = self._records_of(record.id)
        containers = [
            self._container(records[one.container_id], one)
            for one in stats.containers
            if one.container_id in records  # otherwise removed meanwhile
        ]
        return usage.pod_stats(record, stats, containers)

    # --------------------------------------------------------------------------------- metrics

    async def ListMetricDescriptors(
        self, request: pb.ListMetricDescriptorsRequest
    ) -> pb.ListMetricDescriptorsResponse:
        """List name, help and labels of every metric of ListPodSandboxMetrics."""
        return pb.ListMetricDescriptorsResponse(descriptors=pod_metrics.descriptors())

    async def ListPodSandboxMetrics(
        self, request: pb.ListPodSandboxMetricsRequest
    ) -> pb.ListPodSandboxMetricsResponse:
        """List the metrics of every ready pod and its containers."""
        return pb.ListPodSandboxMetricsResponse(pod_metrics=[one async for one in self._metrics()])

    async def StreamPodSandboxMetrics(
        self, request: pb.StreamPodSandboxMetricsRequest
    ) -> AsyncIterator[pb.StreamPodSandboxMetricsResponse]:
        """Stream what ListPodSandboxMetrics lists, a message per pod."""
        async for metrics in self._metrics():
            yield pb.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=[metrics])

    async def _metrics(self) -> AsyncIterator[pb.PodSandboxMetrics]:
        wanted, filesystem = _ready(self._pods.list()), find_filesystem(self._mountpoint)
        async for stats in self._stats.read(wanted, files=True):
            records = self._records_of(stats.pod_id)
            measured = [
                Measured(
                    record=records[one.container_id],
                    stats=one,
                    open_files_limit=self._containers.open_files_limit(one.container_id),
                    filesystem=filesystem,
                    now_ns=time.time_ns(),
                )
                for one in stats.containers
                if one.container_id in records
            ]
            yield pod_metrics.pod_metrics(wanted[stats.pod_id], stats, measured)
            await asyncio.sleep(0)  # a pod is some hundred messages: let other tasks run in between

    # --------------------------------------------------------------------------------- common

    async def _one(self, pod_id: PodId) -> PodStats:
        """Raises GuestUnreachable."""
        found = [stats async for stats in self._stats.read([pod_id])]
        if not found:
            raise GuestUnreachable(f"sandbox {pod_id}: its agent did not answer with its usage in time")
        return found[0]

    def _records_of(self, pod_id: PodId) -> Mapping[ContainerId, ContainerRecord]:
        return {record.id: record for record in self._pods.containers_of(pod_id)}


def _ready(records: Iterable[PodRecord]) -> Mapping[PodId, PodRecord]:
    return {record.id: record for record in records if record.ready}


def find_filesystem(path: str) -> Filesystem:
    """Return size and inodes of the filesystem at `path` by statvfs(3), which does not wait for a disk.

    Raises OSError.
    """
    found, device = os.statvfs(path), Path(path).stat().st_dev
    return Filesystem(
        device=f"{os.major(device)}:{os.minor(device)}",
        total_bytes=found.f_blocks * found.f_frsize,
        total_inodes=found.f_files,
        free_inodes=found.f_ffree,
    )
