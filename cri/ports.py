"""What the services need of the rest, as they see it. `cri/daemon.py` plugs the real objects in."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from cri.streaming.session import SessionOptions
from image.auth import Auth
from image.blobs import Progress
from image.index import Image
from network.attach import NetworkStatus
from sandbox.events import Event
from sandbox.host.cgroup import Driver
from sandbox.records import ContainerRecord, PodRecord
from sandbox.session import PortConnection, Session
from sandbox.spec import ContainerId, ContainerSpec, PodId, PodSpec, Resources, Value
from sandbox.stats.parse import PodStats


class ExecResult(Protocol):
    @property
    def exit_code(self) -> int: ...
    @property
    def stdout(self) -> bytes: ...
    @property
    def stderr(self) -> bytes: ...


class Pods(Protocol):
    """`find` raises NotFound; `stop` and `remove` do not mind an unknown id."""

    async def run(self, spec: PodSpec) -> PodId: ...
    async def stop(self, id: str) -> None: ...
    async def remove(self, id: str) -> None: ...
    def find(self, id: str) -> PodRecord: ...
    def list(self) -> Sequence[PodRecord]: ...
    def containers_of(self, pod_id: PodId) -> Sequence[ContainerRecord]: ...
    async def describe(self, record: PodRecord) -> Mapping[str, object]: ...
    async def update(self, id: str, resources: Resources, overhead: Resources) -> None: ...
    async def dial(self, id: str, port: int) -> PortConnection: ...


class Containers(Protocol):
    """`find` raises NotFound; `stop` and `remove` do not mind an unknown id."""

    async def create(self, pod_id: str, spec: ContainerSpec) -> ContainerId: ...
    async def start(self, id: str) -> None: ...
    async def stop(self, id: str, timeout_s: float) -> None: ...
    async def remove(self, id: str) -> None: ...
    def find(self, id: str) -> ContainerRecord: ...
    def list(self) -> Sequence[ContainerRecord]: ...
    async def exec_sync(self, id: str, cmd: Sequence[str], timeout_s: float | None) -> ExecResult: ...
    async def exec(
        self, id: str, cmd: Sequence[str], *, tty: bool, stdin: bool, stdout: bool, stderr: bool
    ) -> Session: ...
    async def attach(self, id: str, *, stdin: bool, stdout: bool, stderr: bool) -> Session: ...
    async def reopen_log(self, id: str) -> None: ...
    async def update(self, id: str, resources: Resources) -> None: ...
    def open_files_limit(self, id: ContainerId) -> int: ...
    async def describe(self, record: ContainerRecord) -> Mapping[str, object]: ...


class StatsCollector(Protocol):
    def read(self, pod_ids: Iterable[PodId], *, files: bool = False) -> AsyncIterator[PodStats]:
        """Usage of each pod as it comes; those that do not tell soon are left out."""


class Events(Protocol):
    def subscribe(self) -> AbstractContextManager[AsyncIterable[Event]]:
        """Iterating raises FellBehind when it is too slow."""


class Streaming(Protocol):
    def url(self, options: SessionOptions) -> str:
        """Where a client finds its session, once and soon. Raises TooManyTokens."""


class Networks(Protocol):
    def status(self) -> NetworkStatus: ...
    def update_pod_cidr(self, cidr: str) -> None: ...


class FsUsage(Protocol):
    @property
    def mountpoint(self) -> str: ...
    @property
    def used_bytes(self) -> int: ...
    @property
    def inodes_used(self) -> int: ...


class Images(Protocol):
    """`find` raises ImageNotFound; `remove` does not mind an unknown name."""

    async def pull(
        self, ref: str, auth: Auth | None = None, *, on_progress: Callable[[Progress], None] | None = None
    ) -> Image: ...
    async def import_archive(
        self, path: Path, *, name: str = "", on_progress: Callable[[Progress], None] | None = None
    ) -> tuple[Image, ...]: ...
    def find(self, ref: str) -> Image: ...
    def list(self) -> tuple[Image, ...]: ...
    async def remove(self, ref: str) -> Image | None: ...
    def fs_usage(self) -> FsUsage: ...


class Condition(Value, frozen=True, kw_only=True):
    """A condition as Kubernetes has it; `reason` is one CamelCase word."""

    ready: bool
    reason: str = ""
    message: str = ""


class Features(Value, frozen=True, kw_only=True):
    """What every handler can do; a kubelet asks for no more than is announced here."""

    recursive_read_only_mounts: bool = True
    user_namespaces: bool = False
    user_namespace_obstacle: str = ""  # why not
    supplemental_groups_policy: bool = True
    mount_options: bool = True


class Node(Protocol):
    """The runtime as a whole."""

    features: Features
    cgroup_driver: Driver

    def handlers(self) -> Sequence[str]:
        """Names of the runtime handlers, the default "" among them."""

    def condition(self) -> Condition:
        """Whether VMs can be started at all."""

    async def describe(self) -> Mapping[str, object]:
        """Accelerator and why, versions, configuration in force."""
