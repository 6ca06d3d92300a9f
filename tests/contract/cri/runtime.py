"""The CRI's services on a real gRPC socket, over fakes of pods, containers and images."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from cri.interceptor import Interceptor
from cri.metrics import Metrics
from cri.proto import husk_v1_pb2 as husk
from cri.proto import runtime_v1_pb2 as pb
from cri.server import Server
from cri.services.image_service import image_service, transfer_service
from cri.services.runtime_service import runtime_service
from sandbox.host.flights import Flights
from tests.fakes.cri import (
    FakeContainers,
    FakeEvents,
    FakeImages,
    FakeNetworks,
    FakeNode,
    FakePods,
    FakeStats,
)
from tests.fakes.streaming import FakeStreaming
from tests.kit.eventually import eventually

Code = grpc.StatusCode
SERVICES = [*pb.DESCRIPTOR.services_by_name.values(), *husk.DESCRIPTOR.services_by_name.values()]
METHODS = {method.name: (service, method) for service in SERVICES for method in service.methods}
POD = pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name="web", uid="u", namespace="default"))
CONTAINER = pb.ContainerConfig(metadata=pb.ContainerMetadata(name="c"), image=pb.ImageSpec(image="busybox"))
SERVED = {
    *("Version", "Status", "RuntimeConfig", "UpdateRuntimeConfig"),
    *("RunPodSandbox", "StopPodSandbox", "RemovePodSandbox", "PodSandboxStatus", "ListPodSandbox"),
    *("CreateContainer", "StartContainer", "StopContainer", "RemoveContainer", "ListContainers"),
    *("ContainerStatus", "ExecSync", "ReopenContainerLog", "UpdateContainerResources"),
    *("ContainerStats", "ListContainerStats", "PodSandboxStats", "ListPodSandboxStats"),
    *("ListMetricDescriptors", "ListPodSandboxMetrics", "UpdatePodSandboxResources"),
    *("Exec", "Attach", "PortForward"),
    *("PullImage", "ListImages", "ImageStatus", "RemoveImage", "ImageFsInfo"),
}
STREAMED = {
    *("StreamPodSandboxes", "StreamContainers", "StreamImages"),
    *("StreamContainerStats", "StreamPodSandboxStats", "StreamPodSandboxMetrics", "GetContainerEvents"),
}
CRI_METHODS = [method.name for service in SERVICES[:2] for method in service.methods]


@dataclass
class Runtime:
    """A server on its socket with its fakes, and a client of it."""

    socket: Path
    pods: FakePods = field(default_factory=FakePods)
    events: FakeEvents = field(default_factory=FakeEvents)
    networks: FakeNetworks = field(default_factory=FakeNetworks)
    node: FakeNode = field(default_factory=FakeNode)
    images: FakeImages = field(default_factory=FakeImages)
    flights: Flights = field(default_factory=Flights)
    metrics: Metrics = field(default_factory=lambda: Metrics("1"))
    streaming: FakeStreaming = field(default_factory=FakeStreaming)

    def __post_init__(self) -> None:
        self.containers = FakeContainers(self.pods)
        self.pods.containers = self.containers
        self.stats = FakeStats(self.pods)

    def server(self) -> Server:
        """Return a server of these fakes that was not started."""
        services = (
            runtime_service(
                pods=self.pods,
                containers=self.containers,
                stats=self.stats,
                events=self.events,
                networks=self.networks,
                node=self.node,
                flights=self.flights,
                streaming=self.streaming,
                version="9.9",
                layers_mountpoint="/",
            ),
            image_service(
                images=self.images, flights=self.flights, metrics=self.metrics, handlers=self.node.handlers
            ),
            transfer_service(images=self.images, metrics=self.metrics),
        )
        return Server(self.socket, services, Interceptor(self.metrics))

    async def start(self) -> None:
        """Serve, and open the client's channel."""
        self._server = self.server()
        await self._server.start()
        options = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.aio.insecure_channel(f"unix:{self.socket}", options)

    async def stop(self) -> None:
        """Close the channel and stop the server."""
        await self.channel.close()
        await self.flights.close(0)
        await self._server.stop(0)

    def call(self, name: str, request: Any = None, timeout_s: float = 10) -> Any:
        """Call an rpc by its name (default: with an empty request). Returns an awaitable or a stream."""
        service, method = METHODS[name]
        connect = self.channel.unary_stream if method.server_streaming else self.channel.unary_unary
        stub: Any = connect(
            f"/{service.full_name}/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        return stub(request or GetMessageClass(method.input_type)(), timeout=timeout_s)

    async def code(self, name: str, request: Any = None) -> grpc.StatusCode:
        """Call a unary rpc and return its status code."""
        try:
            await self.call(name, request)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return Code.OK

    async def refused(self, name: str, request: Any = None) -> tuple[grpc.StatusCode, str]:
        """Call a unary rpc that must fail, and return code and details."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call(name, request)
        return caught.value.code(), caught.value.details() or ""

    async def retried(self, name: str, request: Any) -> asyncio.Future[Any]:
        """Call again after the first call exceeded its deadline; returns once the retry is being served."""
        count = self.metrics.registry.get_sample_value
        labels = {"method": name, "code": "DEADLINE_EXCEEDED"}
        await eventually(lambda: count("husk_cri_call_seconds_count", labels) == 1)
        retry: asyncio.Future[Any] = asyncio.ensure_future(self.call(name, request))
        await eventually(lambda: count("husk_cri_calls_running") == 1)
        return retry

    async def pod(self, name: str = "web", **config: Any) -> str:
        """Run a pod and return its id."""
        asked = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid="u", namespace="default"), **config
        )
        answer = await self.call("RunPodSandbox", pb.RunPodSandboxRequest(config=asked))
        return str(answer.pod_sandbox_id)

    async def container(self, pod_id: str, **config: Any) -> str:
        """Create a container and return its id."""
        asked = pb.ContainerConfig(**config)
        asked.MergeFrom(CONTAINER)
        request = pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=asked, sandbox_config=POD)
        return str((await self.call("CreateContainer", request)).container_id)

    async def started(self, pod_id: str, **config: Any) -> str:
        """Create and start a container, and return its id."""
        id = await self.container(pod_id, **config)
        await self.call("StartContainer", pb.StartContainerRequest(container_id=id))
        return id
