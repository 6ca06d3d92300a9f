"""The interfaces through which the services use the rest of Husk. `cri/daemon.py` passes the objects in."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from cri.streaming.session import SessionOptions
from image.auth import Auth
from image.blobs import Progress
from image.index import Image
from image.running import Transfer
from network.attach import NetworkStatus
from sandbox.events import Event
from sandbox.host.cgroup import Driver
from sandbox.records import ContainerRecord, PodRecord
from sandbox.session import PortConnection, Session
from sandbox.spec import ContainerId, ContainerSpec, PodId, PodSpec, Resources, Value
from sandbox.stats.parse import PodStats


class ExecResult(Protocol):
    """The end of a command."""

    @property
    def exit_code(self) -> int: ...
    @property
    def stdout(self) -> bytes: ...
    @property
    def stderr(self) -> bytes: ...


class Pods(Protocol):
    """Pod sandboxes. Any id may be a unique prefix. See `sandbox.pods.Pods`."""

    async def run(self, spec: PodSpec) -> PodId:
        """Start a pod. On failure nothing of it is left. Raises Reserved, InvalidSpec, PhaseFailed ..."""

    async def stop(self, id: str) -> None:
        """Stop a pod and its containers. Idempotent; an unknown id is ignored."""

    async def remove(self, id: str) -> None:
        """Stop and remove a pod and its containers. Idempotent; an unknown id is ignored."""

    def find(self, id: str) -> PodRecord:
        """Raises NotFound."""

    def list(self) -> Sequence[PodRecord]:
        """Return every pod but those that are being started."""

    def containers_of(self, pod_id: PodId) -> Sequence[ContainerRecord]:
        """Return the containers of a pod, those that are being created included. Raises NotFound."""

    async def describe(self, record: PodRecord) -> Mapping[str, object]:
        """Return facts for `crictl inspectp`."""

    async def update(self, id: str, resources: Resources, overhead: Resources) -> None:
        """Apply new limits to a pod as a whole. On failure the previous ones stay in force."""

    async def dial(self, id: str, port: int) -> PortConnection:
        """Connect to a TCP port in a pod. The caller closes the connection. Raises SandboxError."""


class Containers(Protocol):
    """Containers. Any id may be a unique prefix. See `sandbox.containers.Containers`."""

    async def create(self, pod_id: str, spec: ContainerSpec) -> ContainerId:
        """Create a container in a ready pod. On failure nothing of it is left."""

    async def start(self, id: str) -> None:
        """Start a created container. Raises NotFound, WrongState, GuestError ..."""

    async def stop(self, id: str, timeout_s: float) -> None:
        """Stop with the stop signal, then SIGKILL after `timeout_s`. Idempotent; unknown ids are ignored."""

    async def remove(self, id: str) -> None:
        """Kill and remove a container. Idempotent; an unknown id is ignored."""

    def find(self, id: str) -> ContainerRecord:
        """Raises NotFound."""

    def list(self) -> Sequence[ContainerRecord]:
        """Return every container but those that are being created."""

    async def exec_sync(self, id: str, cmd: Sequence[str], timeout_s: float | None) -> ExecResult:
        """Run a command to its end, or for `timeout_s` seconds (then DeadlineExceeded)."""

    async def exec(
        self, id: str, cmd: Sequence[str], *, tty: bool, stdin: bool, stdout: bool, stderr: bool
    ) -> Session:
        """Start a command with these streams. The caller closes the session."""

    async def attach(self, id: str, *, stdin: bool, stdout: bool, stderr: bool) -> Session:
        """Attach to the streams of the first process. The caller closes the session."""

    async def reopen_log(self, id: str) -> None:
        """Open the log file again after a rotation."""

    async def update(self, id: str, resources: Resources) -> None:
        """Apply new limits. On failure the previous ones stay in force."""

    def open_files_limit(self, id: ContainerId) -> int:
        """Return the soft RLIMIT_NOFILE of the first process."""

    async def describe(self, record: ContainerRecord) -> Mapping[str, object]:
        """Return facts for `crictl inspect`."""


class StatsCollector(Protocol):
    """Samples usage of pods. See `sandbox.stats.collector`."""

    def read(self, pod_ids: Iterable[PodId], *, files: bool = False) -> AsyncIterator[PodStats]:
        """Yield usage of each pod as its sample arrives; pods that do not answer in time are omitted.

        `files`: count open descriptors too, which takes the guest longer.
        """


class Events(Protocol):
    """Events of containers. See `sandbox.events`."""

    def subscribe(self) -> AbstractContextManager[AsyncIterable[Event]]:
        """Subscribe while the context is entered. Iterating raises FellBehind when it is too slow."""


class Streaming(Protocol):
    """The streaming server. See `cri.streaming.server`."""

    def url(self, options: SessionOptions) -> str:
        """Return the URL of a session, valid once and for a minute. Raises TooManyTokens."""


class Networks(Protocol):
    """The pods' network. See `network.attach.Networks`."""

    def status(self) -> NetworkStatus:
        """Return whether a usable CNI configuration exists, and what is wrong otherwise."""

    def update_pod_cidr(self, cidr: str) -> None:
        """Use this range of addresses for pods."""


class FsUsage(Protocol):
    """What images use of their filesystem."""

    @property
    def mountpoint(self) -> str: ...
    @property
    def used_bytes(self) -> int: ...
    @property
    def inodes_used(self) -> int: ...


class Images(Protocol):
    """Images. A reference is a name, a digest or an id. See `image.image_store.ImageStore`."""

    async def pull(
        self, ref: str, auth: Auth | None = None, *, on_progress: Callable[[Progress], None] | None = None
    ) -> Image:
        """Pull an image from its registry. Raises any ImageError."""

    async def import_archive(
        self, path: Path, *, name: str = "", on_progress: Callable[[Progress], None] | None = None
    ) -> tuple[Image, ...]:
        """Import the images of an archive; `name` replaces the name of its only one. Raises ImageError."""

    def transfers(self) -> Sequence[Transfer]:
        """Return the pulls and imports that are under way, the oldest first."""

    def find(self, ref: str) -> Image:
        """Raises ImageNotFound."""

    def list(self) -> tuple[Image, ...]:
        """Return every image."""

    async def remove(self, ref: str) -> Image | None:
        """Remove an image with all its names; None for an unknown one. Idempotent."""

    def fs_usage(self) -> FsUsage:
        """Return what images use, from sums that are kept in memory."""


class Condition(Value, frozen=True, kw_only=True):
    """A condition of `Status`; `reason` is a CamelCase word, as in Kubernetes."""

    ready: bool
    reason: str = ""
    message: str = ""


class Features(Value, frozen=True, kw_only=True):
    """Features of every handler; a kubelet requests only what is announced here."""

    recursive_read_only_mounts: bool = True
    user_namespaces: bool = False
    user_namespace_obstacle: str = ""  # why not, if user_namespaces is false
    supplemental_groups_policy: bool = True
    mount_options: bool = True


class Node(Protocol):
    """The runtime as a whole."""

    features: Features
    cgroup_driver: Driver

    def handlers(self) -> Sequence[str]:
        """Return the names of the runtime handlers, "" (the default) among them."""

    def condition(self) -> Condition:
        """Return whether VMs can be started."""

    async def describe(self) -> Mapping[str, object]:
        """Return facts for `crictl info`: accelerator and why, versions, configuration in force."""
