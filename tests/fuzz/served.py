"""A whole daemon on its socket, over a host of fakes, with a census of everything that it holds.

Real are the interceptor, services, pods, containers, images (from a registry in this process), statistics,
events and streaming tokens.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from cri.proto import husk_v1_pb2 as husk
from cri.proto import runtime_v1_pb2 as pb
from image.auth import Auth
from image.image_store import ImageStore
from image.options import ImageOptions
from image.registry import Timing
from sandbox.guest import guest_pb2
from sandbox.host.mounts import mounts_below
from tests.fakes.daemon import FakeHost, kill
from tests.fakes.guest import FakeAgent, FakeProgram
from tests.fakes.registry import FakeRegistry, make_layer
from tests.faults.test_usage_faults import Guest
from tests.kit.eventually import eventually
from tests.kit.messages import message_class

SERVICES = [*pb.DESCRIPTOR.services_by_name.values(), *husk.DESCRIPTOR.services_by_name.values()]
METHODS = {method.name: (service, method) for service in SERVICES for method in service.methods}
IMAGE = "example.test/web:1"
AUTH = Auth(username="user", password="hunter2-secret")  # what the registry wants
QUICK = Timing(connect_s=2, stall_s=0.3, answer_s=1, attempts=2, backoff_s=0.001, backoff_limit_s=0.01)
SETTLED_S = 10.0
# coroutines of gRPC around the handler of a call
HANDLERS = ("_schedule_rpc_coro", "_handle_exceptions")
# A stream of events has no end; it is read for this time.
STREAM_S = 0.05


@dataclass
class Base:
    """What every request finds: a pod with a running container and a created one."""

    pod: str
    running: str
    created: str

    @property
    def words(self) -> tuple[str, ...]:
        return (
            self.pod,
            self.running,
            self.created,
            self.pod[:13],
            self.running[:13],
            IMAGE,
            "true",
            "/bin/true",
        )


@dataclass
class Served:
    root: Path
    registry: FakeRegistry
    agents: list[FakeAgent] = field(default_factory=list)
    held_up: bool = False  # guests do not answer while it is set
    base: Base | None = None

    async def start(self) -> None:
        self.logs = self.root / "logs"
        self.volume = self.root / "volume"
        for directory in (self.logs, self.volume, self.root / "hosts" / "_default"):
            directory.mkdir(parents=True)
        self.registry.put_image("web", "1", [make_layer({"bin": None, "bin/true": b"#!"})])
        config = f'server = "http://{self.registry.address}"\n'
        (self.root / "hosts" / "_default" / "hosts.toml").write_text(config)
        images = ImageOptions(config_path=self.root / "hosts", timing=QUICK, pull_timeout_s=20)
        self.images = ImageStore(self.root / "images", images)
        self.images.load()
        self.registry.sign_in = "bearer"
        await self.images.pull(IMAGE, AUTH)
        await self._images_settled()
        self.host = FakeHost(self.root / "d")
        self.host.hypervisor.make_agent = self._agent
        self.daemon = self.host.build(self.images)
        await self.daemon.start()
        self.socket = Path(self.daemon.config.socket)
        options = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.aio.insecure_channel(f"unix:{self.socket}", options)
        await self.channel.channel_ready()
        await self.prepare()
        await self.clear()
        self.empty = self.census()

    def _agent(self) -> FakeAgent:
        guest = Guest(FakeAgent())
        guest.agent.programs["true"] = FakeProgram(stdout=b"out\n")

        def answer(request: guest_pb2.Request) -> guest_pb2.Reply | bool | None:
            return None if self.held_up else guest.answer(request)

        guest.agent.answer = answer
        self.agents.append(guest.agent)
        return guest.agent

    async def stop(self) -> None:
        await self.clear()
        await self.channel.close()
        await self.daemon.stop()
        await kill(self.daemon)

    # --------------------------------------------------------------------------------- calls

    async def call(self, name: str, request: Message | bytes, timeout_s: float | None = None) -> Any:
        """Return code, response and details. Streams are read to their end, endless ones for STREAM_S."""
        service, method = METHODS[name]
        data = request if isinstance(request, bytes) else request.SerializeToString()
        kind = message_class(method.output_type)
        path = f"/{service.full_name}/{name}"
        connect: Any = self.channel.unary_stream if method.server_streaming else self.channel.unary_unary
        stub = connect(path, request_serializer=None, response_deserializer=kind.FromString)
        endless = name == "GetContainerEvents"
        call = stub(data, timeout=timeout_s or (STREAM_S if endless else 30.0))
        try:
            if method.server_streaming:
                return grpc.StatusCode.OK, [answer async for answer in call], ""
            return grpc.StatusCode.OK, await call, ""
        except grpc.aio.AioRpcError as error:
            if endless and timeout_s is None and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return grpc.StatusCode.OK, [], ""
            return error.code(), None, error.details() or ""

    def follow(self, name: str, answer: Any) -> Iterator[tuple[str, Message]]:
        """Yield calls that use what was made: what was accepted must not be refused, or fail, later."""
        if name == "RunPodSandbox":
            pod = pb.PodSandboxStatusRequest(pod_sandbox_id=answer.pod_sandbox_id, verbose=True)
            yield "PodSandboxStatus", pod
            yield "ListPodSandbox", pb.ListPodSandboxRequest()
            yield "CreateContainer", _create(self, Base(answer.pod_sandbox_id, "", ""))
        if name == "CreateContainer":
            id = answer.container_id
            yield "StartContainer", pb.StartContainerRequest(container_id=id)
            yield "ExecSync", pb.ExecSyncRequest(container_id=id, cmd=["true"])
            yield "UpdateContainerResources", pb.UpdateContainerResourcesRequest(container_id=id)
            yield "ReopenContainerLog", pb.ReopenContainerLogRequest(container_id=id)
        if name in ("RunPodSandbox", "CreateContainer", "UpdateContainerResources"):
            yield "ListContainers", pb.ListContainersRequest()
            yield "ListContainerStats", pb.ListContainerStatsRequest()
            yield "ListPodSandboxMetrics", pb.ListPodSandboxMetricsRequest()
            for record in self.daemon.containers.list():
                yield "ContainerStatus", pb.ContainerStatusRequest(container_id=record.id, verbose=True)

    async def undo(self, name: str, answer: Any) -> bool:
        """Remove what was made and nothing else; return whether that is possible."""
        if name == "RunPodSandbox":
            request = pb.RemovePodSandboxRequest(pod_sandbox_id=answer.pod_sandbox_id)
            await self.good("RemovePodSandbox", request)
        if name == "CreateContainer":
            await self.good("RemoveContainer", pb.RemoveContainerRequest(container_id=answer.container_id))
        return name in ("RunPodSandbox", "CreateContainer")

    async def good(self, name: str, request: Message) -> Any:
        code, answer, details = await self.call(name, request)
        assert code is grpc.StatusCode.OK, f"{name}: {code} {details}"
        return answer

    # ---------------------------------------------------------------------------------- state

    async def prepare(self) -> Base:
        """Return the base, created again where the last request changed it."""
        if self.base is None:
            pod = await self.good("RunPodSandbox", self.valid("RunPodSandbox", None))
            base = Base(pod.pod_sandbox_id, "", "")
            ids = []
            for name in ("first", "second"):
                request = self.valid("CreateContainer", base)
                request.config.metadata.name = name
                ids.append((await self.good("CreateContainer", request)).container_id)
            base = Base(base.pod, *ids)
            await self.good("StartContainer", pb.StartContainerRequest(container_id=base.running))
            self.base = base
        return self.base

    async def clear(self) -> None:
        """Remove all pods, and images other than the base's."""
        self.base = None
        for pod in list(self.daemon.inventory.pods.values()):
            await self.daemon.pods.remove(pod.id)
        for image in self.images.list():
            if IMAGE not in image.repo_tags:
                await self.images.remove(image.id)
        if not self.images.list():
            await self.images.pull(IMAGE, AUTH)
        self.agents.clear()

    async def settle(self, wanted: Counter[str] | None = None) -> Counter[str]:
        """Return what is held once the work of all calls has ended, or once it is what is wanted."""
        until = asyncio.get_running_loop().time() + SETTLED_S
        while True:
            await self._images_settled()
            now = self.census()
            quiet = not self.daemon.flights and not any(now[f"task {name}"] for name in HANDLERS)
            if quiet and (wanted is None or now == wanted):
                return now
            if asyncio.get_running_loop().time() > until:
                assert quiet, now
                return now
            await asyncio.sleep(0.005)

    async def _images_settled(self) -> None:
        """Wait for pulls, which go on without their clients, and for what is written after them."""
        await eventually(
            lambda: not self.images.puller._flights and not self.images._background,
            timeout_s=SETTLED_S,
            describe="no pull is running, and everything pulled is on the disk",
        )

    def census(self) -> Counter[str]:
        """Everything that could be left behind."""
        daemon = self.daemon
        found: Counter[str] = Counter()
        found.update(f"pod {pod.id}" for pod in daemon.inventory.pods.values())
        found.update(f"container {container.id}" for container in daemon.inventory.containers.values())
        found.update(f"name {name}" for name in daemon.inventory.starting)
        found.update(self.host.ledger.held)
        found.update(f"mount {path}" for path in mounts_below(self.root))
        for directory in ("pods", "containers", "run"):
            for at, _, files in os.walk(self.root / "d" / directory):  # while a pod is being removed, too
                found.update(f"file {at}/{name}" for name in (".", *files))
        staged = (self.root / "images" / "images" / name for name in ("staging", "trash"))
        found.update(f"file {path}" for directory in staged for path in directory.iterdir())
        found.update(f"image {image.id}" for image in self.images.list())
        found["subscriptions"] = len(daemon.events._subscriptions)
        found.update(f"fd {target}" for target in _open_files())
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        found.update(f"task {task.get_coro().__qualname__}" for task in tasks)  # type: ignore[union-attr]
        return found

    # ------------------------------------------------------------------------------- requests

    def valid(self, name: str, base: Base | None) -> Any:
        """Return a request that is granted, to start from; the empty message if none was written."""
        kind = message_class(METHODS[name][1].input_type)
        make = SEEDS.get(name)
        return make(self, base or Base("", "", "")) if make else kind()

    def fenced(self, request: Message) -> Message:
        """Replace paths of this machine, as a bug could delete what is in a mounted directory."""
        if isinstance(request, pb.RunPodSandboxRequest) and request.config.log_directory.startswith("/"):
            request.config.log_directory = f"{self.logs}{request.config.log_directory[:100]}"
        if isinstance(request, pb.CreateContainerRequest):
            for mount in request.config.mounts:
                there = mount.host_path.startswith("/") and "\0" not in mount.host_path
                if there and not mount.host_path.startswith(str(self.volume)):
                    mount.host_path = f"{self.volume}{mount.host_path[:100]}".replace("..", "")
        return request


def _open_files() -> list[str]:
    """List open files without sockets: those of the registry and of gRPC change at any time."""
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = str(fd.readlink())
        except FileNotFoundError:
            continue  # of the listing itself
        if not target.startswith(("socket:", "/proc/")):
            found.append(target)
    return found


def _run_pod(served: Served, base: Base) -> pb.RunPodSandboxRequest:
    config = pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name="web" if base.pod else "base", uid="u", namespace="default"),
        hostname="web",
        log_directory=str(served.logs),
        labels={"a": "b"},
        dns_config=pb.DNSConfig(servers=["10.0.0.1"], searches=["test"], options=["ndots:2"]),
        port_mappings=[pb.PortMapping(container_port=80, host_port=8080)],
    )
    config.linux.cgroup_parent = "/test"
    config.linux.sysctls["net.ipv4.ip_forward"] = "1"
    config.linux.resources.memory_limit_in_bytes = 64 << 20
    return pb.RunPodSandboxRequest(config=config)


def _create(served: Served, base: Base) -> pb.CreateContainerRequest:
    config = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name="main"),
        image=pb.ImageSpec(image=IMAGE),
        command=["/bin/true"],
        envs=[pb.KeyValue(key="A", value=b"b")],
        mounts=[pb.Mount(container_path="/data", host_path=str(served.volume))],
        devices=[pb.Device(container_path="/dev/fuse", host_path="/dev/fuse", permissions="rw")],
        log_path="main.log",
    )
    config.linux.resources.memory_limit_in_bytes = 1 << 20
    config.linux.resources.unified["memory.high"] = "1000000"
    security = config.linux.security_context
    security.run_as_user.value = 1000
    security.capabilities.add_capabilities.append("KILL")
    security.masked_paths.append("/proc/kcore")
    security.seccomp.profile_type = pb.SecurityProfile.RuntimeDefault
    return pb.CreateContainerRequest(pod_sandbox_id=base.pod, config=config)


def _limits(memory: int = 0) -> pb.LinuxContainerResources:
    return pb.LinuxContainerResources(memory_limit_in_bytes=memory, cpu_shares=100, cpuset_cpus="0")


SEEDS: dict[str, Any] = {
    "RunPodSandbox": _run_pod,
    "StopPodSandbox": lambda s, b: pb.StopPodSandboxRequest(pod_sandbox_id=b.pod),
    "RemovePodSandbox": lambda s, b: pb.RemovePodSandboxRequest(pod_sandbox_id=b.pod),
    "PodSandboxStatus": lambda s, b: pb.PodSandboxStatusRequest(pod_sandbox_id=b.pod, verbose=True),
    "PodSandboxStats": lambda s, b: pb.PodSandboxStatsRequest(pod_sandbox_id=b.pod),
    "UpdatePodSandboxResources": lambda s, b: pb.UpdatePodSandboxResourcesRequest(
        pod_sandbox_id=b.pod, resources=_limits(1 << 20), overhead=_limits()
    ),
    "CreateContainer": _create,
    "StartContainer": lambda s, b: pb.StartContainerRequest(container_id=b.created),
    "StopContainer": lambda s, b: pb.StopContainerRequest(container_id=b.running, timeout=1),
    "RemoveContainer": lambda s, b: pb.RemoveContainerRequest(container_id=b.running),
    "ContainerStatus": lambda s, b: pb.ContainerStatusRequest(container_id=b.running, verbose=True),
    "ContainerStats": lambda s, b: pb.ContainerStatsRequest(container_id=b.running),
    "UpdateContainerResources": lambda s, b: pb.UpdateContainerResourcesRequest(
        container_id=b.running, linux=_limits(1 << 20)
    ),
    "ReopenContainerLog": lambda s, b: pb.ReopenContainerLogRequest(container_id=b.running),
    "ExecSync": lambda s, b: pb.ExecSyncRequest(container_id=b.running, cmd=["true"], timeout=5),
    "Exec": lambda s, b: pb.ExecRequest(container_id=b.running, cmd=["true"], stdout=True),
    "Attach": lambda s, b: pb.AttachRequest(container_id=b.running, stdout=True),
    "PortForward": lambda s, b: pb.PortForwardRequest(pod_sandbox_id=b.pod, port=[80]),
    "Status": lambda s, b: pb.StatusRequest(verbose=True),
    "UpdateRuntimeConfig": lambda s, b: pb.UpdateRuntimeConfigRequest(
        runtime_config=pb.RuntimeConfig(network_config=pb.NetworkConfig(pod_cidr="10.0.0.0/16"))
    ),
    "ListContainers": lambda s, b: pb.ListContainersRequest(
        filter=pb.ContainerFilter(id=b.running, state=pb.ContainerStateValue(state=pb.CONTAINER_RUNNING))
    ),
    "ImageStatus": lambda s, b: pb.ImageStatusRequest(image=pb.ImageSpec(image=IMAGE), verbose=True),
    "PullImage": lambda s, b: pb.PullImageRequest(
        image=pb.ImageSpec(image=IMAGE), auth=pb.AuthConfig(username=AUTH.username, password=AUTH.password)
    ),
    "RemoveImage": lambda s, b: pb.RemoveImageRequest(image=pb.ImageSpec(image=IMAGE)),
    "Pull": lambda s, b: husk.PullRequest(image=IMAGE, username=AUTH.username, password=AUTH.password),
    "Import": lambda s, b: husk.ImportRequest(path=str(s.volume)),
}
