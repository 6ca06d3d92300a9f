"""The rpcs of the RuntimeService that return the URL of a streaming session."""

from __future__ import annotations

from collections.abc import Sequence

from cri.log_format import set_pod_context
from cri.ports import Containers, Pods, Streaming
from cri.proto import runtime_v1_pb2 as pb
from cri.streaming.session import AttachOptions, ExecOptions, PortForwardOptions
from sandbox.errors import InvalidSpec, WrongState
from sandbox.records import ContainerRecord, ContainerState
from sandbox.session import PortConnection, Session

PORT_MAX = 65535


class StreamCalls:
    """Exec, Attach and PortForward. Each checks the request and issues a URL; `cri.streaming` serves it."""

    def __init__(self, pods: Pods, containers: Containers, streaming: Streaming) -> None:
        self._pods = pods
        self._containers = containers
        self._streaming = streaming

    async def Exec(self, request: pb.ExecRequest) -> pb.ExecResponse:
        """Return the URL at which a command runs in a container. Raises NotFound, WrongState, InvalidSpec."""
        _check_streams(request)
        if not request.cmd:
            raise InvalidSpec("cmd", "is empty", "a program and its arguments")
        options = ExecOptions(
            container_id=self._running(request.container_id).id,
            cmd=tuple(request.cmd),
            tty=request.tty,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
        )
        return pb.ExecResponse(url=self._streaming.url(options))

    async def Attach(self, request: pb.AttachRequest) -> pb.AttachResponse:
        """Return the URL of a container's own streams. Raises NotFound, WrongState, InvalidSpec."""
        _check_streams(request)
        options = AttachOptions(
            container_id=self._running(request.container_id).id,
            tty=request.tty,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
        )
        return pb.AttachResponse(url=self._streaming.url(options))

    async def PortForward(self, request: pb.PortForwardRequest) -> pb.PortForwardResponse:
        """Return the URL at which ports of a pod are forwarded. Raises NotFound, WrongState, InvalidSpec."""
        _check_ports(request.port)
        record = self._pods.find(request.pod_sandbox_id)
        set_pod_context(record.id[:13])
        if not record.ready:
            raise WrongState("sandbox", record.id, record.state, "ready")
        options = PortForwardOptions(pod_id=record.id, ports=tuple(request.port))
        return pb.PortForwardResponse(url=self._streaming.url(options))

    def _running(self, id: str) -> ContainerRecord:
        """Raises NotFound, WrongState."""
        record = self._containers.find(id)
        set_pod_context(record.pod_id[:13])
        if record.state is not ContainerState.RUNNING:
            raise WrongState("container", record.id, record.state, ContainerState.RUNNING)
        return record


def _check_streams(request: pb.ExecRequest | pb.AttachRequest) -> None:
    if not (request.stdin or request.stdout or request.stderr):
        raise InvalidSpec("stdin, stdout, stderr", "none is set", "at least one")
    if request.tty and request.stderr:
        raise InvalidSpec("stderr", "is set together with tty", "a terminal has one output: stdout")


def _check_ports(ports: Sequence[int]) -> None:
    for port in ports:
        if not 0 < port <= PORT_MAX:
            raise InvalidSpec("port", f"{port} is not a TCP port", f"1 to {PORT_MAX}")


class SandboxBackend:
    """Pods and containers as the backend of the streaming server."""

    def __init__(self, pods: Pods, containers: Containers) -> None:
        self._pods = pods
        self._containers = containers

    async def exec(self, options: ExecOptions) -> Session:
        """See `Backend.exec`."""
        return await self._containers.exec(
            options.container_id,
            options.cmd,
            tty=options.tty,
            stdin=options.stdin,
            stdout=options.stdout,
            stderr=options.stderr,
        )

    async def attach(self, options: AttachOptions) -> Session:
        """See `Backend.attach`."""
        return await self._containers.attach(
            options.container_id, stdin=options.stdin, stdout=options.stdout, stderr=options.stderr
        )

    async def dial(self, pod_id: str, port: int) -> PortConnection:
        """See `Backend.dial`."""
        return await self._pods.dial(pod_id, port)
