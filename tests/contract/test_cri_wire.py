"""The services over a real gRPC socket, as a kubelet meets them: codes, idempotency, retries, limits.

Pods and containers are stand-ins; what is on trial is the edge. One flow is driven by the real crictl
(marked `node`, as it has to be built).
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import stat
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from cri.interceptor import Interceptor, is_read_only
from cri.metrics import Metrics
from cri.ports import Condition, Features
from cri.proto import husk_v1_pb2 as husk
from cri.proto import runtime_v1_pb2 as pb
from cri.server import Server, SocketTaken
from cri.services.image_service import image_service, transfer_service
from cri.services.runtime_service import runtime_service
from cri.streaming.session import AttachOptions, ExecOptions, PortForwardOptions
from image.errors import RegistryUnavailable
from network.attach import NetworkStatus
from sandbox.errors import PhaseFailed
from sandbox.host.flights import Flights
from tests.fakes.cri import (
    FakeContainers,
    FakeEvents,
    FakeImages,
    FakeMeter,
    FakeNetworks,
    FakeNode,
    FakePods,
)
from tests.fakes.streaming import FakeStreaming
from tests.kit.gotools import tool

Code = grpc.StatusCode
SERVICES = [*pb.DESCRIPTOR.services_by_name.values(), *husk.DESCRIPTOR.services_by_name.values()]
METHODS = {method.name: (service, method) for service in SERVICES for method in service.methods}
POD = pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name="web", uid="u", namespace="default"))
CONTAINER = pb.ContainerConfig(metadata=pb.ContainerMetadata(name="c"), image=pb.ImageSpec(image="busybox"))


@dataclass
class Runtime:
    """A server on its socket, the stand-ins behind it, and a client."""

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
        self.meter = FakeMeter(self.pods)

    def server(self) -> Server:
        services = (
            runtime_service(
                pods=self.pods,
                containers=self.containers,
                stats=self.meter,
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
        self._server = self.server()
        await self._server.start()
        options = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.aio.insecure_channel(f"unix:{self.socket}", options)

    async def stop(self) -> None:
        await self.channel.close()
        await self.flights.close(0)
        await self._server.stop(0)

    def call(self, name: str, request: Any = None, timeout_s: float = 10) -> Any:
        service, method = METHODS[name]
        connect = self.channel.unary_stream if method.server_streaming else self.channel.unary_unary
        stub: Any = connect(
            f"/{service.full_name}/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        return stub(request or GetMessageClass(method.input_type)(), timeout=timeout_s)

    async def code(self, name: str, request: Any = None) -> grpc.StatusCode:
        try:
            await self.call(name, request)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return Code.OK

    async def refused(self, name: str, request: Any = None) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call(name, request)
        return caught.value.code(), caught.value.details() or ""

    async def retried(self, name: str, request: Any) -> asyncio.Future[Any]:
        """The call again after one that ran into its deadline, once it is being served."""
        count = self.metrics.registry.get_sample_value
        labels = {"method": name, "code": "DEADLINE_EXCEEDED"}
        await settled(lambda: count("husk_cri_call_seconds_count", labels) == 1)
        retry: asyncio.Future[Any] = asyncio.ensure_future(self.call(name, request))
        await settled(lambda: count("husk_cri_calls_running") == 1)
        return retry

    async def pod(self, name: str = "web", **config: Any) -> str:
        asked = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid="u", namespace="default"), **config
        )
        answer = await self.call("RunPodSandbox", pb.RunPodSandboxRequest(config=asked))
        return str(answer.pod_sandbox_id)

    async def container(self, pod_id: str, **config: Any) -> str:
        asked = pb.ContainerConfig(**config)
        asked.MergeFrom(CONTAINER)
        request = pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=asked, sandbox_config=POD)
        return str((await self.call("CreateContainer", request)).container_id)

    async def started(self, pod_id: str, **config: Any) -> str:
        id = await self.container(pod_id, **config)
        await self.call("StartContainer", pb.StartContainerRequest(container_id=id))
        return id


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[Runtime]:
    runtime = Runtime(tmp_path / "run" / "husk.sock")
    await runtime.start()
    yield runtime
    await runtime.stop()


async def settled(condition: Any) -> None:
    """Until something that other tasks bring about is so."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


# --------------------------------------------------------------------------------------- socket


async def test_the_socket_is_roots_alone(runtime: Runtime) -> None:
    assert stat.S_IMODE(runtime.socket.stat().st_mode) == 0o600


async def test_a_socket_that_somebody_answers_on_is_left_alone(runtime: Runtime) -> None:
    with pytest.raises(SocketTaken, match="another daemon"):
        await runtime.server().start()
    assert await runtime.code("Version") is Code.OK


async def test_a_socket_that_a_killed_daemon_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "husk.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    runtime = Runtime(path)
    await runtime.start()
    assert await runtime.code("Version") is Code.OK
    await runtime.stop()
    assert not path.exists()


async def test_what_is_no_socket_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "husk.sock"
    path.write_text("precious")
    with pytest.raises(SocketTaken, match="not a socket"):
        await Runtime(path).server().start()
    assert path.read_text() == "precious"


# ------------------------------------------------------------------------------------- the node


async def test_version(runtime: Runtime) -> None:
    answer = await runtime.call("Version", pb.VersionRequest(version="0.1.0"))
    assert (answer.runtime_name, answer.runtime_version, answer.runtime_api_version) == ("husk", "9.9", "v1")
    assert answer.version


async def test_status_has_both_conditions_and_the_handlers(runtime: Runtime) -> None:
    answer = await runtime.call("Status")
    assert {condition.type: condition.status for condition in answer.status.conditions} == {
        "RuntimeReady": True,
        "NetworkReady": True,
    }
    assert [handler.name for handler in answer.runtime_handlers] == ["", "small"]
    assert not answer.runtime_handlers[0].features.user_namespaces
    assert answer.features.supplemental_groups_policy
    assert not answer.info


async def test_status_says_why_not(runtime: Runtime) -> None:
    runtime.networks.state = NetworkStatus(ready=False, reason="NoConfig", message="no CNI configuration")
    runtime.node.state = Condition(ready=False, reason="NoGuest", message="husk guest build")
    answer = await runtime.call("Status", pb.StatusRequest(verbose=True))
    conditions = {condition.type: condition for condition in answer.status.conditions}
    assert (conditions["NetworkReady"].status, conditions["NetworkReady"].reason) == (False, "NoConfig")
    assert conditions["RuntimeReady"].message == "husk guest build"
    assert json.loads(answer.info["accelerator"]) == {"name": "tcg", "reason": "no /dev/kvm"}


async def test_runtime_configuration(runtime: Runtime) -> None:
    answer = await runtime.call("RuntimeConfig")
    assert answer.linux.cgroup_driver == pb.CGROUPFS
    config = pb.RuntimeConfig(network_config=pb.NetworkConfig(pod_cidr="10.1.0.0/24"))
    await runtime.call("UpdateRuntimeConfig", pb.UpdateRuntimeConfigRequest(runtime_config=config))
    assert runtime.networks.cidr == "10.1.0.0/24"
    await runtime.call("UpdateRuntimeConfig")
    assert runtime.networks.cidr == "10.1.0.0/24", "an empty update changes nothing"


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


@pytest.mark.parametrize("name", [name for name in CRI_METHODS if name not in SERVED | STREAMED])
async def test_what_is_not_served_says_so(runtime: Runtime, name: str) -> None:
    _, method = METHODS[name]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if method.server_streaming:
            [answer async for answer in runtime.call(name)]
        else:
            await runtime.call(name)
    assert caught.value.code() is Code.UNIMPLEMENTED
    assert caught.value.details() == f"husk does not implement {name}"


async def test_every_served_call_has_an_answer_of_its_own(runtime: Runtime) -> None:
    """With an empty request: an answer or a refusal, never UNIMPLEMENTED or a bug."""
    codes = {name: await runtime.code(name) for name in SERVED}
    assert not {name for name, code in codes.items() if code in (Code.UNIMPLEMENTED, Code.INTERNAL)}


# ---------------------------------------------------------------------------------------- pods


async def test_a_pod_from_run_to_remove(runtime: Runtime) -> None:
    id = await runtime.pod(labels={"app": "web"}, annotations={"note": "x"})
    answer = await runtime.call(
        "PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=id[:13], verbose=True)
    )
    assert (answer.status.id, answer.status.state) == (id, pb.SANDBOX_READY)
    assert answer.status.metadata.namespace == "default"
    assert answer.status.network.ip == "10.9.0.2"
    assert (dict(answer.status.labels), dict(answer.status.annotations)) == ({"app": "web"}, {"note": "x"})
    assert json.loads(answer.info["info"])["accelerator"] == "tcg"
    assert answer.timestamp > 0
    container = await runtime.container(id)
    answer = await runtime.call("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=id))
    assert [one.id for one in answer.containers_statuses] == [container]
    assert not answer.info
    await runtime.call("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id=id))
    listed = await runtime.call("ListPodSandbox")
    assert [(item.id, item.state) for item in listed.items] == [(id, pb.SANDBOX_NOTREADY)]
    await runtime.call("RemovePodSandbox", pb.RemovePodSandboxRequest(pod_sandbox_id=id))
    assert not (await runtime.call("ListPodSandbox")).items
    assert (
        await runtime.code("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=id))
        is Code.NOT_FOUND
    )


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id="nobody")),
        ("RemovePodSandbox", pb.RemovePodSandboxRequest(pod_sandbox_id="nobody")),
        ("StopContainer", pb.StopContainerRequest(container_id="nobody")),
        ("RemoveContainer", pb.RemoveContainerRequest(container_id="nobody")),
        ("RemoveImage", pb.RemoveImageRequest(image=pb.ImageSpec(image="nobody"))),
        ("ImageStatus", pb.ImageStatusRequest(image=pb.ImageSpec(image="nobody"))),
        ("ListPodSandbox", pb.ListPodSandboxRequest(filter=pb.PodSandboxFilter(id="nobody"))),
        ("ListContainers", pb.ListContainersRequest(filter=pb.ContainerFilter(id="nobody"))),
        ("ListContainerStats", pb.ListContainerStatsRequest(filter=pb.ContainerStatsFilter(id="nobody"))),
    ],
)
async def test_unknown_ids_that_are_fine(runtime: Runtime, name: str, request_: Any) -> None:
    assert await runtime.code(name, request_) is Code.OK


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id="nobody")),
        ("ContainerStatus", pb.ContainerStatusRequest(container_id="nobody")),
        ("StartContainer", pb.StartContainerRequest(container_id="nobody")),
        ("ExecSync", pb.ExecSyncRequest(container_id="nobody", cmd=["true"])),
        ("ContainerStats", pb.ContainerStatsRequest(container_id="nobody")),
        ("UpdateContainerResources", pb.UpdateContainerResourcesRequest(container_id="nobody")),
        ("ReopenContainerLog", pb.ReopenContainerLogRequest(container_id="nobody")),
        ("CreateContainer", pb.CreateContainerRequest(pod_sandbox_id="nobody", config=CONTAINER)),
    ],
)
async def test_unknown_ids_that_are_gone(runtime: Runtime, name: str, request_: Any) -> None:
    assert await runtime.code(name, request_) is Code.NOT_FOUND


async def test_a_name_is_taken_once(runtime: Runtime) -> None:
    await runtime.pod()
    assert (
        await runtime.code("RunPodSandbox", pb.RunPodSandboxRequest(config=POD)) is Code.FAILED_PRECONDITION
    )


async def test_a_user_namespace_is_refused_where_the_disk_cannot_shift_owners(runtime: Runtime) -> None:
    config = pb.PodSandboxConfig()
    config.CopyFrom(POD)
    ids = pb.IDMapping(container_id=0, host_id=1000, length=10)
    space = pb.UserNamespace(mode=pb.POD, uids=[ids], gids=[ids])
    config.linux.security_context.namespace_options.userns_options.CopyFrom(space)
    request = pb.RunPodSandboxRequest(config=config)
    runtime.node.features = Features(user_namespace_obstacle="the disk cannot")
    code, details = await runtime.refused("RunPodSandbox", request)
    assert code is Code.INVALID_ARGUMENT
    assert "userns_options.mode" in details
    assert "the disk cannot" in details
    runtime.node.features = Features(user_namespaces=True)
    await runtime.call("RunPodSandbox", request)


async def test_bytes_that_are_no_message_are_the_clients_mistake(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    """gRPC's own answer would be INTERNAL, and a traceback in the daemon's log."""
    stub: Any = runtime.channel.unary_unary("/runtime.v1.RuntimeService/RunPodSandbox")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub(b"\xff")
    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith("request: cannot be parsed")
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_token_that_fits_no_header_is_refused_and_not_repeated(runtime: Runtime) -> None:
    auth = pb.AuthConfig(registry_token="sécret")
    request = pb.PullImageRequest(image=pb.ImageSpec(image="a"), auth=auth)
    code, details = await runtime.refused("PullImage", request)
    assert code is Code.INVALID_ARGUMENT
    assert "auth.registry_token" in details
    assert "cret" not in details


async def test_a_refused_field_is_named_by_its_path(runtime: Runtime) -> None:
    config = pb.PodSandboxConfig()
    config.CopyFrom(POD)
    config.linux.security_context.namespace_options.network = pb.CONTAINER
    code, details = await runtime.refused("RunPodSandbox", pb.RunPodSandboxRequest(config=config))
    assert code is Code.INVALID_ARGUMENT
    assert details.startswith("config.linux.security_context.namespace_options.network: CONTAINER")
    assert runtime.pods.runs == 0


async def test_a_client_that_leaves_cancels_nothing_and_a_retry_joins(runtime: Runtime) -> None:
    runtime.pods.gate = asyncio.Event()
    request = pb.RunPodSandboxRequest(config=POD)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await runtime.call("RunPodSandbox", request, timeout_s=0.2)
    assert caught.value.code() is Code.DEADLINE_EXCEEDED
    retry = await runtime.retried("RunPodSandbox", request)
    runtime.pods.gate.set()
    assert (await retry).pod_sandbox_id in runtime.pods.records
    assert runtime.pods.runs == 1


async def test_a_failure_tells_the_phase_and_the_consoles_end(runtime: Runtime, caplog: Any) -> None:
    console = "\n".join(f"[{n}] starting ü" for n in range(5000)) + "\nKernel panic"
    runtime.pods.failure = PhaseFailed("vm", 2.5, "the guest did not answer", console)
    with caplog.at_level(logging.INFO, logger="cri"):
        code, details = await runtime.refused("RunPodSandbox", pb.RunPodSandboxRequest(config=POD))
    assert code is Code.INTERNAL
    assert details.startswith("vm failed after 2.50 s: the guest did not answer")
    assert details.endswith("Kernel panic")
    (record,) = [record for record in caplog.records if record.name == "cri"]
    assert record.levelno == logging.ERROR
    assert "[42] starting" in record.fields["error"], "the log has the whole console"


async def test_a_bug_is_told_with_an_id_that_the_log_has_too(runtime: Runtime, caplog: Any) -> None:
    runtime.pods.failure = KeyError("oops")
    with caplog.at_level(logging.DEBUG, logger="cri"):
        code, details = await runtime.refused("RunPodSandbox", pb.RunPodSandboxRequest(config=POD))
    assert code is Code.INTERNAL
    assert details.startswith("internal error ")
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.fields["error"] for record in errors] == [details]
    assert any(record.levelno == logging.DEBUG and record.exc_info for record in caplog.records)


# ---------------------------------------------------------------------------------- containers


async def test_a_container_from_create_to_remove(runtime: Runtime) -> None:
    pod_id = await runtime.pod()
    id = await runtime.container(pod_id[:13], labels={"a": "b"}, stop_signal=pb.SIGNAL_SIGUSR1)
    status = (await runtime.call("ContainerStatus", pb.ContainerStatusRequest(container_id=id[:13]))).status
    assert (status.id, status.state, status.image.image) == (id, pb.CONTAINER_CREATED, "busybox")
    assert status.image_ref and status.created_at and status.stop_signal == pb.SIGNAL_SIGUSR1
    assert (status.started_at, status.finished_at) == (0, 0)
    await runtime.call("StartContainer", pb.StartContainerRequest(container_id=id))
    again = await runtime.code("StartContainer", pb.StartContainerRequest(container_id=id))
    assert again is Code.FAILED_PRECONDITION
    await runtime.call("StopContainer", pb.StopContainerRequest(container_id=id[:13], timeout=7))
    assert runtime.containers.stops == [(id, 7.0)]
    answer = await runtime.call("ContainerStatus", pb.ContainerStatusRequest(container_id=id, verbose=True))
    assert (answer.status.state, answer.status.exit_code) == (pb.CONTAINER_EXITED, 137)
    assert json.loads(answer.info["info"]) == {"rootfs": "/somewhere"}
    await runtime.call("RemoveContainer", pb.RemoveContainerRequest(container_id=id))
    assert not (await runtime.call("ListContainers")).containers


async def test_a_stop_in_more_of_a_hurry_does_not_wait(runtime: Runtime) -> None:
    id = await runtime.started(await runtime.pod())
    for timeout in (30, 0, -5):
        await runtime.call("StopContainer", pb.StopContainerRequest(container_id=id, timeout=timeout))
    assert [seconds for _, seconds in runtime.containers.stops] == [30.0, 0.0, 0.0]


async def test_exec(runtime: Runtime) -> None:
    id = await runtime.started(await runtime.pod())
    answer = await runtime.call("ExecSync", pb.ExecSyncRequest(container_id=id, cmd=["a", "b"], timeout=5))
    assert (answer.exit_code, answer.stdout, answer.stderr) == (3, b"out\n", b"err\n")
    await runtime.call("ExecSync", pb.ExecSyncRequest(container_id=id, cmd=["a"]))
    assert runtime.containers.execs == [(["a", "b"], 5.0), (["a"], None)]
    assert await runtime.code("ExecSync", pb.ExecSyncRequest(container_id=id)) is Code.INVALID_ARGUMENT


async def test_exec_before_the_start(runtime: Runtime) -> None:
    id = await runtime.container(await runtime.pod())
    request = pb.ExecSyncRequest(container_id=id, cmd=["a"])
    assert await runtime.code("ExecSync", request) is Code.FAILED_PRECONDITION


async def test_limits_in_force_are_shown(runtime: Runtime) -> None:
    id = await runtime.started(await runtime.pod())
    linux = pb.LinuxContainerResources(cpu_quota=20000, memory_limit_in_bytes=1 << 28)
    await runtime.call(
        "UpdateContainerResources", pb.UpdateContainerResourcesRequest(container_id=id, linux=linux)
    )
    status = (await runtime.call("ContainerStatus", pb.ContainerStatusRequest(container_id=id))).status
    assert status.resources.linux.memory_limit_in_bytes == 1 << 28
    await runtime.call("ReopenContainerLog", pb.ReopenContainerLogRequest(container_id=id))
    assert runtime.containers.reopened == [id]


# -------------------------------------------------------------------------------------- images


async def test_an_image_from_pull_to_remove(runtime: Runtime) -> None:
    auth = pb.AuthConfig(username="me", password="secret", server_address="example.test")
    spec = pb.ImageSpec(image="example.test/a:1")
    answer = await runtime.call("PullImage", pb.PullImageRequest(image=spec, auth=auth))
    ((ref, used),) = runtime.images.pulls
    assert used is not None and (ref, used.username, used.password) == ("example.test/a:1", "me", "secret")
    status = await runtime.call("ImageStatus", pb.ImageStatusRequest(image=spec, verbose=True))
    assert (status.image.id, status.image.uid.value, status.image.username) == (answer.image_ref, 1003, "")
    assert json.loads(status.info["info"])["created"] == "then"
    listed = await runtime.call("ListImages", pb.ListImagesRequest(filter=pb.ImageFilter(image=spec)))
    assert listed.images == [status.image]
    other = pb.ImageFilter(image=pb.ImageSpec(image="other"))
    assert not (await runtime.call("ListImages", pb.ListImagesRequest(filter=other))).images
    await runtime.call("RemoveImage", pb.RemoveImageRequest(image=spec))
    assert not (await runtime.call("ListImages")).images
    assert not (await runtime.call("ImageStatus", pb.ImageStatusRequest(image=spec))).HasField("image")
    assert runtime.metrics.registry.get_sample_value("husk_image_pull_bytes_total") == 1000


async def test_image_filesystem(runtime: Runtime) -> None:
    (usage,) = (await runtime.call("ImageFsInfo")).image_filesystems
    assert (usage.fs_id.mountpoint, usage.used_bytes.value) == ("/var/lib/husk/images", 4096)
    assert usage.timestamp > 0


async def test_a_pull_goes_on_without_its_client_and_a_retry_joins(runtime: Runtime) -> None:
    runtime.images.gate = asyncio.Event()
    request = pb.PullImageRequest(image=pb.ImageSpec(image="a"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await runtime.call("PullImage", request, timeout_s=0.2)
    assert caught.value.code() is Code.DEADLINE_EXCEEDED
    retry = await runtime.retried("PullImage", request)
    runtime.images.gate.set()
    assert (await retry).image_ref
    assert (len(runtime.images.pulls), runtime.images.cancelled) == (1, 0)


async def test_a_registry_that_cannot_be_had_is_named_as_kubelets_look_for_it(runtime: Runtime) -> None:
    runtime.images.failure = RegistryUnavailable("example.test", "GET manifest", "connection refused")
    code, details = await runtime.refused("PullImage", pb.PullImageRequest(image=pb.ImageSpec(image="a")))
    assert code is Code.UNAVAILABLE
    assert details.startswith("RegistryUnavailable")


async def test_an_unknown_handler_of_an_image_is_refused_by_name(runtime: Runtime) -> None:
    spec = pb.ImageSpec(image="a", runtime_handler="huge")
    code, details = await runtime.refused("PullImage", pb.PullImageRequest(image=spec))
    assert (code, details) == (
        Code.INVALID_ARGUMENT,
        "image.runtime_handler: 'huge' is not configured; accepted: '', 'small'",
    )


async def test_progress_is_streamed_and_the_result_comes_last(runtime: Runtime) -> None:
    pulled = [one async for one in runtime.call("Pull", husk.PullRequest(image="a"))]
    assert [(one.step, one.current, one.total) for one in pulled[:-1]] == [("download", 1000, 1000)]
    assert list(pulled[-1].done.names) == ["example.test/a:latest"]
    imported = [one async for one in runtime.call("Import", husk.ImportRequest(path="/x/b.tar"))]
    assert list(imported[-1].done.names) == ["example.test/b:latest"]


async def test_a_person_who_leaves_ends_the_pull(runtime: Runtime) -> None:
    runtime.images.gate = asyncio.Event()
    call = runtime.call("Pull", husk.PullRequest(image="a"))
    assert (await call.read()).current == 600
    call.cancel()
    await settled(lambda: runtime.images.cancelled == 1)


async def test_a_failed_pull_ends_the_stream_with_its_error(runtime: Runtime) -> None:
    runtime.images.failure = RegistryUnavailable("example.test", "GET manifest", "refused")
    call = runtime.call("Pull", husk.PullRequest(image="a"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [one async for one in call]
    assert caught.value.code() is Code.UNAVAILABLE


# ---------------------------------------------------------------------------------------- edge


async def test_calls_are_measured_and_logged_once(runtime: Runtime, caplog: Any) -> None:
    with caplog.at_level(logging.DEBUG, logger="cri"):
        await runtime.call("Version")
        await runtime.pod()
    logged = [(record.getMessage(), record.levelname, record.fields["code"]) for record in caplog.records]
    assert logged == [("Version", "DEBUG", "OK"), ("RunPodSandbox", "INFO", "OK")]
    count = runtime.metrics.registry.get_sample_value
    assert count("husk_cri_call_seconds_count", {"method": "RunPodSandbox", "code": "OK"}) == 1
    assert count("husk_cri_calls_running") == 0


def test_calls_that_only_ask_are_quiet() -> None:
    quiet = {name for name in CRI_METHODS if is_read_only(name)}
    assert {"Version", "Status", "ListContainers", "ContainerStats", "ImageFsInfo", "RuntimeConfig"} <= quiet
    assert {"StreamContainers", "ListPodSandboxMetrics", "ListMetricDescriptors"} <= quiet
    assert not quiet & {"UpdatePodSandboxResources", "GetContainerEvents", "RemovePodSandbox"}
    assert not quiet & {"RunPodSandbox", "ExecSync", "UpdateRuntimeConfig", "PullImage", "RemoveImage"}


async def test_a_deadline_is_told_apart_from_a_client_that_left(runtime: Runtime) -> None:
    runtime.pods.gate = asyncio.Event()
    count = runtime.metrics.registry.get_sample_value

    def ended(code: str) -> bool:
        return count("husk_cri_call_seconds_count", {"method": "RunPodSandbox", "code": code}) == 1

    request = pb.RunPodSandboxRequest(config=POD)
    with pytest.raises(grpc.aio.AioRpcError):
        await runtime.call("RunPodSandbox", request, timeout_s=0.2)
    await settled(lambda: ended("DEADLINE_EXCEEDED"))
    call = runtime.call("RunPodSandbox", request)
    await settled(lambda: count("husk_cri_calls_running") == 1)
    call.cancel()
    await settled(lambda: ended("CANCELLED"))


async def test_messages_may_have_16_mib_and_no_more(runtime: Runtime) -> None:
    id = await runtime.pod(annotations={"big": "x" * (15 << 20)})
    answer = await runtime.call("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=id))
    assert len(answer.status.annotations["big"]) == 15 << 20
    request = pb.RunPodSandboxRequest(config=POD, runtime_handler="x" * (17 << 20))
    assert await runtime.code("RunPodSandbox", request) is Code.RESOURCE_EXHAUSTED


async def test_long_lists_come_whole(runtime: Runtime) -> None:
    ids = {await runtime.pod(f"pod-{n}") for n in range(100)}
    for _ in range(2):
        assert {item.id for item in (await runtime.call("ListPodSandbox")).items} == ids


# -------------------------------------------------------------------------------------- crictl


@pytest.fixture
def crictl() -> str:
    """The real client."""
    return str(tool("crictl"))


# ------------------------------------------------------------------------------------ streaming


async def test_urls_of_streams(runtime: Runtime) -> None:
    pod = await runtime.pod()
    id = await runtime.started(pod)
    exec = pb.ExecRequest(container_id=id[:13], cmd=["sh", "-c", "x"], tty=True, stdin=True, stdout=True)
    assert (await runtime.call("Exec", exec)).url == "http://127.0.0.1:1/1"
    attach = pb.AttachRequest(container_id=id, stdout=True, stderr=True)
    assert (await runtime.call("Attach", attach)).url == "http://127.0.0.1:1/2"
    forward = pb.PortForwardRequest(pod_sandbox_id=pod[:13], port=[80, 65535])
    assert (await runtime.call("PortForward", forward)).url == "http://127.0.0.1:1/3"
    assert runtime.streaming.requests == [
        ExecOptions(id, ("sh", "-c", "x"), tty=True, stdin=True, stdout=True, stderr=False),
        AttachOptions(id, tty=False, stdin=False, stdout=True, stderr=True),
        PortForwardOptions(pod, (80, 65535)),
    ]


async def test_streams_that_cannot_be(runtime: Runtime) -> None:
    pod = await runtime.pod()
    id = await runtime.started(pod)
    for request, told in (
        (pb.ExecRequest(container_id=id, cmd=["x"]), "stdin, stdout, stderr"),
        (pb.ExecRequest(container_id=id, cmd=["x"], tty=True, stdout=True, stderr=True), "stderr"),
        (pb.ExecRequest(container_id=id, stdout=True), "cmd"),
        (pb.AttachRequest(container_id=id), "stdin, stdout, stderr"),
        (pb.AttachRequest(container_id=id, tty=True, stderr=True), "stderr"),
        (pb.PortForwardRequest(pod_sandbox_id=pod, port=[0]), "port"),
        (pb.PortForwardRequest(pod_sandbox_id=pod, port=[65536]), "port"),
    ):
        name = type(request).__name__.removesuffix("Request")
        code, details = await runtime.refused(name, request)
        assert code is Code.INVALID_ARGUMENT
        assert details.startswith(told)


async def test_streams_of_what_is_gone_or_stopped(runtime: Runtime) -> None:
    pod = await runtime.pod()
    id = await runtime.container(pod)  # not started
    exec = pb.ExecRequest(container_id=id, cmd=["x"], stdout=True)
    attach = pb.AttachRequest(container_id=id, stdout=True)
    forward = pb.PortForwardRequest(pod_sandbox_id=pod)
    assert await runtime.code("PortForward", forward) is Code.OK
    await runtime.call("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    for name, request in (("Exec", exec), ("Attach", attach), ("PortForward", forward)):
        assert await runtime.code(name, request) is Code.FAILED_PRECONDITION
    exec.container_id = attach.container_id = forward.pod_sandbox_id = "nobody"
    for name, request in (("Exec", exec), ("Attach", attach), ("PortForward", forward)):
        assert await runtime.code(name, request) is Code.NOT_FOUND


async def test_too_many_streams_that_nobody_begins(runtime: Runtime) -> None:
    runtime.streaming.full = True
    forward = pb.PortForwardRequest(pod_sandbox_id=await runtime.pod())
    assert await runtime.code("PortForward", forward) is Code.RESOURCE_EXHAUSTED


@pytest.mark.node
async def test_the_real_crictl_drives_a_pod(runtime: Runtime, crictl: str, tmp_path: Path) -> None:
    pod, container, config = (tmp_path / name for name in ("pod.json", "container.json", "crictl.yaml"))
    pod.write_text(json.dumps({"metadata": {"name": "p", "namespace": "d", "uid": "u"}, "linux": {}}))
    container.write_text(
        json.dumps({"metadata": {"name": "c"}, "image": {"image": "busybox"}, "command": ["sh"]})
    )
    endpoint = f"unix://{runtime.socket}"
    config.write_text(f"runtime-endpoint: {endpoint}\nimage-endpoint: {endpoint}\ntimeout: 10\n")

    async def run(*words: object) -> str:
        argv = [crictl, "--config", str(config), *map(str, words)]
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert "RuntimeName:  husk" in await run("version")
    assert json.loads(await run("info"))["runtimeHandlers"][1]["name"] == "small"
    assert "runtime-config" not in await run("runtime-config")
    pod_id = await run("runp", pod)
    assert pod_id[:13] in await run("pods")
    assert await run("pods", "-q", "--id", pod_id[:13]) == pod_id
    assert json.loads(await run("inspectp", pod_id[:13]))["status"]["network"]["ip"] == "10.9.0.2"
    await run("pull", "busybox")
    assert "busybox" in await run("images")
    assert json.loads(await run("inspecti", "busybox"))["status"]["uid"]["value"] == "1003"
    assert "imagefsinfo" not in await run("imagefsinfo")
    id = await run("create", pod_id[:13], container, pod)
    await run("start", id[:13])
    assert await run("ps", "-q") == id
    assert json.loads(await run("inspect", id[:13]))["status"]["state"] == "CONTAINER_RUNNING"
    assert id[:13] in await run("stats", id[:13])
    await run("update", "--memory", "1000000", id[:13])
    assert runtime.containers.find(id).resources.memory_limit == 1000000
    await run("stop", id[:13])
    await run("rm", id[:13])
    await run("stopp", pod_id[:13])
    await run("rmp", pod_id[:13])
    await run("rmi", "busybox")
    assert await run("pods", "-q") == ""
