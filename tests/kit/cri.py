"""A CRI client for tests and the benchmark: runtime.v1 over a unix socket, synchronous.

`call` reaches every unary rpc by its name; the methods above it are the flows that tests repeat. Errors
are grpc.RpcError, as gRPC raises them.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class LogLine:
    time: str
    stream: str
    tag: str
    text: str


def parse_log(path: Path) -> list[LogLine]:
    """The lines of a CRI log file; raises ValueError at the first that is none."""
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
    """A sandbox with the configuration that CreateContainer must repeat."""

    id: str
    config: Any
    log_directory: Path


@dataclass
class Cri:
    socket: Path
    logs: Path  # pods log beneath it
    timeout_s: float = 120
    cgroup_parent: str = ""
    _numbers: Iterator[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self._channel = grpc.insecure_channel(f"unix://{self.socket}", options=OPTIONS)
        self._rpcs = dict(_rpcs(self._channel, streaming=False))
        self._streams = dict(_rpcs(self._channel, streaming=True))

    def close(self) -> None:
        self._channel.close()

    def call(self, name: str, *, timeout_s: float | None = None, **request: Any) -> Any:
        """The answer of rpc `name` to a request with these fields."""
        rpc, request_type = self._rpcs[name]
        return rpc(request_type(**request), timeout=timeout_s or self.timeout_s)

    def stream(self, name: str, *, timeout_s: float | None = None, **request: Any) -> Any:
        """Iterate over the messages of a streaming rpc; `cancel` ends it."""
        rpc, request_type = self._streams[name]
        return rpc(request_type(**request), timeout=timeout_s or self.timeout_s)

    def begin(self, name: str, **request: Any) -> Any:
        """The call's future; not waited for."""
        rpc, request_type = self._rpcs[name]
        return rpc.future(request_type(**request), timeout=self.timeout_s)

    # ------------------------------------------------------------------------------ images

    def pull(self, image: str, **fields: Any) -> str:
        return str(self.call("PullImage", image=api.ImageSpec(image=image), **fields).image_ref)

    # -------------------------------------------------------------------------------- pods

    def pod_config(self, name: str, **fields: Any) -> Any:
        metadata = api.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="default")
        defaults: dict[str, Any] = {
            "metadata": metadata,
            "hostname": name,
            "log_directory": str(self.logs / name),
            "linux": api.LinuxPodSandboxConfig(cgroup_parent=self.cgroup_parent),
        }
        return api.PodSandboxConfig(**(defaults | fields))

    def run_pod(self, name: str, *, handler: str = "", **fields: Any) -> Pod:
        config = self.pod_config(name, **fields)
        Path(config.log_directory).mkdir(parents=True, exist_ok=True)
        answer = self.call("RunPodSandbox", config=config, runtime_handler=handler)
        return Pod(str(answer.pod_sandbox_id), config, Path(config.log_directory))

    def pod_status(self, pod: Pod | str, verbose: bool = False) -> Any:
        return self.call("PodSandboxStatus", pod_sandbox_id=_id(pod), verbose=verbose)

    def pod_ip(self, pod: Pod | str) -> str:
        return str(self.pod_status(pod).status.network.ip)

    def stop_pod(self, pod: Pod | str) -> None:
        self.call("StopPodSandbox", pod_sandbox_id=_id(pod))

    def remove_pod(self, pod: Pod | str) -> None:
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
        self.call("StartContainer", container_id=container)

    def run(self, pod: Pod, image: str, command: Sequence[str] = (), **fields: Any) -> str:
        """Create and start."""
        container = self.create(pod, image, command, **fields)
        self.start(container)
        return container

    def run_to_end(self, pod: Pod, image: str, command: Sequence[str], **fields: Any) -> tuple[int, str]:
        """Exit code and log text of a container that ends by itself; it is removed."""
        container = self.run(pod, image, command, **fields)
        status = self.wait_exited(container)
        text = "".join(line.text + "\n" for line in parse_log(Path(status.log_path)))
        self.remove(container)
        return int(status.exit_code), text

    def stop(self, container: str, timeout: int = 10) -> None:
        self.call("StopContainer", container_id=container, timeout=timeout)

    def remove(self, container: str) -> None:
        self.call("RemoveContainer", container_id=container)

    def status(self, container: str) -> Any:
        return self.call("ContainerStatus", container_id=container).status

    def wait_exited(self, container: str, timeout_s: float = 60) -> Any:
        """Return a container's status once it has exited; raises AssertionError with the last status."""
        return self.wait_for(
            lambda: self.status(container),
            lambda status: status.state == api.CONTAINER_EXITED,
            timeout_s,
        )

    def exec(self, container: str, *command: str, timeout: int = 0) -> ExecResult:
        answer = self.call("ExecSync", container_id=container, cmd=command, timeout=timeout)
        return ExecResult(
            answer.exit_code, answer.stdout.decode(errors="replace"), answer.stderr.decode(errors="replace")
        )

    def log(self, container: str) -> list[LogLine]:
        return parse_log(Path(self.status(container).log_path))

    # ------------------------------------------------------------------------------ waiting

    @staticmethod
    def wait_for(probe: Callable[[], T], until: Callable[[T], object], timeout_s: float = 30) -> T:
        """Poll as `eventually_sync` does, with its positional arguments first and 30 s by default."""
        return eventually_sync(probe, until=until, timeout_s=timeout_s)


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
