"""A synchronous CRI client for tests and the bench: runtime.v1 over a unix socket.

`call` makes any unary rpc by its name; the other methods are flows that tests repeat. Errors are
grpc.RpcError.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf import message_factory
from google.protobuf.message import Message

from cri.proto import runtime_v1_pb2 as api
from tests.kit.eventually import eventually_sync

T = TypeVar("T")

MESSAGE_LIMIT = 16 << 20
OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_LIMIT),
    ("grpc.max_send_message_length", MESSAGE_LIMIT),
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True)
class ExecResult:
    """Result of ExecSync, its output as text."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class LogLine:
    """One line of a CRI log file: time, stdout or stderr, F (full) or P (partial), text."""

    time: str
    stream: str
    tag: str
    text: str


def parse_log(path: Path) -> list[LogLine]:
    """Parse a CRI log file. Raises ValueError naming the first line that is not a CRI log line."""
    lines = []
    for number, line in enumerate(path.read_text(errors="surrogateescape").split("\n")[:-1], 1):
        try:
            when, stream, tag, text = line.split(" ", 3)
        except ValueError:
            raise ValueError(f"{path}:{number}: not a CRI log line: {line!r}") from None
        if stream not in ("stdout", "stderr") or tag not in ("F", "P"):
            raise ValueError(f"{path}:{number}: not a CRI log line: {line!r}")
        lines.append(LogLine(when, stream, tag, text))
    return lines


@dataclass
class Pod:
    """A sandbox, with the configuration that CreateContainer must repeat."""

    id: str
    config: api.PodSandboxConfig
    log_directory: Path


@dataclass
class Cri:
    """A connection to one runtime."""

    socket: Path
    logs: Path  # the pods' log directories are in it
    timeout_s: float = 120
    cgroup_parent: str = ""
    _numbers: Iterator[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self._channel = grpc.insecure_channel(f"unix://{self.socket}", options=OPTIONS)
        self._rpcs = dict(_rpcs(self._channel, streaming=False))
        self._streams = dict(_rpcs(self._channel, streaming=True))

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._channel.close()

    def call(self, name: str, *, timeout_s: float | None = None, **request: Any) -> Any:
        """Make the unary rpc `name` with these request fields, and return its response."""
        rpc, request_type = self._rpcs[name]
        return rpc(request_type(**request), timeout=timeout_s or self.timeout_s)

    def stream(self, name: str, *, timeout_s: float | None = None, **request: Any) -> Any:
        """Start a streaming rpc; iterate over its messages, `cancel` ends it."""
        rpc, request_type = self._streams[name]
        return rpc(request_type(**request), timeout=timeout_s or self.timeout_s)

    def begin(self, name: str, **request: Any) -> Any:
        """Start the unary rpc `name` and return its future."""
        rpc, request_type = self._rpcs[name]
        return rpc.future(request_type(**request), timeout=self.timeout_s)

    # ------------------------------------------------------------------------------ images

    def pull(self, image: str, **fields: Any) -> str:
        """Pull an image and return its reference."""
        return str(self.call("PullImage", image=api.ImageSpec(image=image), **fields).image_ref)

    # -------------------------------------------------------------------------------- pods

    def pod_config(self, name: str, **fields: Any) -> api.PodSandboxConfig:
        """Return the configuration of a pod with this name; `fields` replace the defaults."""
        metadata = api.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="default")
        defaults: dict[str, Any] = {
            "metadata": metadata,
            "hostname": name,
            "log_directory": str(self.logs / name),
            "linux": api.LinuxPodSandboxConfig(cgroup_parent=self.cgroup_parent),
        }
        return api.PodSandboxConfig(**(defaults | fields))

    def run_pod(self, name: str, *, handler: str = "", **fields: Any) -> Pod:
        """Run a sandbox; `fields` are those of its configuration."""
        config = self.pod_config(name, **fields)
        Path(config.log_directory).mkdir(parents=True, exist_ok=True)
        answer = self.call("RunPodSandbox", config=config, runtime_handler=handler)
        return Pod(str(answer.pod_sandbox_id), config, Path(config.log_directory))

    def pod_status(self, pod: Pod | str, verbose: bool = False) -> api.PodSandboxStatusResponse:
        """Return the response of PodSandboxStatus."""
        response = self.call("PodSandboxStatus", pod_sandbox_id=_id(pod), verbose=verbose)
        assert isinstance(response, api.PodSandboxStatusResponse)
        return response

    def pod_ip(self, pod: Pod | str) -> str:
        """Return the pod's primary address."""
        return str(self.pod_status(pod).status.network.ip)

    def stop_pod(self, pod: Pod | str) -> None:
        """Stop a sandbox."""
        self.call("StopPodSandbox", pod_sandbox_id=_id(pod))

    def remove_pod(self, pod: Pod | str) -> None:
        """Remove a sandbox."""
        self.call("RemovePodSandbox", pod_sandbox_id=_id(pod))

    # -------------------------------------------------------------------------- containers

    def create(
        self,
        pod: Pod,
        image: str,
        command: Sequence[str] = (),
        *,
        name: str = "",
        env: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> str:
        """Create a container and return its id; `fields` are those of its configuration."""
        name = name or f"c{next(self._numbers)}"
        config = api.ContainerConfig(
            metadata=api.ContainerMetadata(name=name),
            image=api.ImageSpec(image=image),
            command=command,
            envs=[api.KeyValue(key=key, value=value.encode()) for key, value in (env or {}).items()],
            log_path=f"{name}.log",
        )
        config.MergeFrom(api.ContainerConfig(**fields))
        answer = self.call("CreateContainer", pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config)
        return str(answer.container_id)

    def start(self, container: str) -> None:
        """Start a created container."""
        self.call("StartContainer", container_id=container)

    def run(self, pod: Pod, image: str, command: Sequence[str] = (), **fields: Any) -> str:
        """Create and start a container, and return its id."""
        container = self.create(pod, image, command, **fields)
        self.start(container)
        return container

    def run_to_end(self, pod: Pod, image: str, command: Sequence[str], **fields: Any) -> tuple[int, str]:
        """Run a container that exits by itself, remove it, and return its exit code and log text."""
        container = self.run(pod, image, command, **fields)
        status = self.wait_exited(container)
        text = "".join(line.text + "\n" for line in parse_log(Path(status.log_path)))
        self.remove(container)
        return int(status.exit_code), text

    def stop(self, container: str, timeout: int = 10) -> None:
        """Stop a container, by SIGKILL after `timeout` seconds."""
        self.call("StopContainer", container_id=container, timeout=timeout)

    def remove(self, container: str) -> None:
        """Remove a container."""
        self.call("RemoveContainer", container_id=container)

    def status(self, container: str) -> api.ContainerStatus:
        """Return a container's status."""
        status = self.call("ContainerStatus", container_id=container).status
        assert isinstance(status, api.ContainerStatus)
        return status

    def wait_exited(self, container: str, timeout_s: float = 60) -> api.ContainerStatus:
        """Return a container's status once it has exited; raises AssertionError with the last status."""
        return eventually_sync(
            lambda: self.status(container),
            until=lambda status: status.state == api.CONTAINER_EXITED,
            timeout_s=timeout_s,
        )

    def exec(self, container: str, *command: str, timeout: int = 0) -> ExecResult:
        """Run ExecSync; `timeout` in seconds, 0 for none."""
        answer = self.call("ExecSync", container_id=container, cmd=command, timeout=timeout)
        return ExecResult(
            answer.exit_code, answer.stdout.decode(errors="replace"), answer.stderr.decode(errors="replace")
        )

    def log(self, container: str) -> list[LogLine]:
        """Return the lines of a container's log file."""
        return parse_log(Path(self.status(container).log_path))


def _id(pod: Pod | str) -> str:
    return pod.id if isinstance(pod, Pod) else pod


def _rpcs(channel: grpc.Channel, *, streaming: bool) -> Iterator[tuple[str, tuple[Any, type[Message]]]]:
    connect: Any = channel.unary_stream if streaming else channel.unary_unary
    for service in api.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            if method.server_streaming is not streaming:
                continue
            request = message_factory.GetMessageClass(method.input_type)
            answer = message_factory.GetMessageClass(method.output_type)
            rpc = connect(
                f"/{service.full_name}/{method.name}",
                request_serializer=request.SerializeToString,
                response_deserializer=answer.FromString,
            )
            yield method.name, (rpc, request)
