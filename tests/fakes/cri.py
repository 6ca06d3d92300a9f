"""Fakes of what the CRI's services call: pods and containers that are records and nothing else."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from cri.ports import Condition, Features
from image.auth import Auth
from image.blobs import Progress
from image.errors import ImageNotFound
from image.index import Image
from image.manifest import RunDefaults
from image.running import Transfer
from network.attach import Attachment, NetworkStatus
from sandbox.errors import FellBehind, NotFound, Reserved, WrongState
from sandbox.events import Event
from sandbox.host.cgroup import Driver
from sandbox.records import ContainerRecord, ContainerState, PodRecord, PodState
from sandbox.spec import ContainerId, ContainerSpec, ImageDefaults, PodId, PodSpec, Resources
from sandbox.stats.kernel_files import InterfaceUsage
from sandbox.stats.parse import CgroupStats, ContainerStats, CpuStats, LayerStats, MemoryStats, PodStats
from tests.fakes.streaming import FakeConnection, FakeSession

T = TypeVar("T")

replace = msgspec.structs.replace

IMAGE_ID = "sha256:" + "1" * 64
LAYER = "sha256:" + "2" * 64
BORN_NS = 1_700_000_000_000_000_000


@dataclass(frozen=True)
class ExecResult:
    """See `cri.ports.ExecResult`."""

    exit_code: int
    stdout: bytes
    stderr: bytes


@dataclass
class FakePods:
    """Pods that are ready at once, unless `gate` delays or `failure` fails `run`."""

    records: dict[str, PodRecord] = field(default_factory=dict)
    containers: FakeContainers | None = None
    gate: asyncio.Event | None = None  # `run` waits for it
    runs: int = 0
    failure: Exception | None = None
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def run(self, spec: PodSpec) -> PodId:
        self.runs += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        for record in self.records.values():
            if (record.spec.name, record.spec.attempt) == (spec.name, spec.attempt):
                raise Reserved(spec.name, record.id)
        id = PodId(f"{next(self.numbers):064x}"[::-1])
        network = Attachment(netns="/run/netns/x", ips=("10.9.0.2", "fd00::2"))
        self.records[id] = PodRecord(
            id=id, spec=spec, created_at_ns=BORN_NS, state=PodState.READY, network=network
        )
        return id

    async def stop(self, id: str) -> None:
        if id in self.records:
            self.records[id] = replace(self.records[id], state=PodState.NOT_READY)

    async def remove(self, id: str) -> None:
        self.records.pop(id, None)

    def find(self, id: str) -> PodRecord:
        return _find("sandbox", id, self.records)

    def list(self) -> Sequence[PodRecord]:
        return list(self.records.values())

    def containers_of(self, pod_id: PodId) -> Sequence[ContainerRecord]:
        if self.containers is None:
            return []
        return [record for record in self.containers.records.values() if record.pod_id == pod_id]

    async def describe(self, record: PodRecord) -> Mapping[str, object]:
        return {"accelerator": "tcg", "pid": 4711}

    async def update(self, id: str, resources: Resources, overhead: Resources) -> None:
        self.records[id] = replace(self.find(id), resources=resources, overhead=overhead)

    async def dial(self, id: str, port: int) -> FakeConnection:
        self.find(id)
        return FakeConnection()


@dataclass
class FakeContainers:
    """Containers that change state when they are called; stops, execs and reopened logs are recorded."""

    pods: FakePods
    records: dict[str, ContainerRecord] = field(default_factory=dict)
    stops: list[tuple[str, float]] = field(default_factory=list)
    execs: list[tuple[Sequence[str], float | None]] = field(default_factory=list)
    reopened: list[str] = field(default_factory=list)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(10))

    async def create(self, pod_id: str, spec: ContainerSpec) -> ContainerId:
        pod = self.pods.find(pod_id)
        id = ContainerId(f"{next(self.numbers):064x}"[::-1])
        self.records[id] = ContainerRecord(
            id=id,
            pod_id=pod.id,
            spec=spec,
            created_at_ns=BORN_NS,
            image_id=IMAGE_ID,
            image_ref=IMAGE_ID,
            defaults=ImageDefaults(),
            resources=spec.resources,
            stop_signal=spec.stop_signal or "SIGTERM",
            state=ContainerState.CREATED,
        )
        return id

    async def start(self, id: str) -> None:
        record = self.find(id)
        if record.state is not ContainerState.CREATED:
            raise WrongState("container", id, record.state, "created")
        self.records[id] = replace(record, state=ContainerState.RUNNING, started_at_ns=BORN_NS + 1)

    async def stop(self, id: str, timeout_s: float) -> None:
        self.stops.append((id, timeout_s))
        if id in self.records:
            ended = {"exit_code": 137, "reason": "Error", "finished_at_ns": BORN_NS + 2}
            self.records[id] = replace(self.records[id], state=ContainerState.EXITED, **ended)

    async def remove(self, id: str) -> None:
        self.records.pop(id, None)

    def find(self, id: str) -> ContainerRecord:
        return _find("container", id, self.records)

    def list(self) -> Sequence[ContainerRecord]:
        return list(self.records.values())

    async def exec_sync(self, id: str, cmd: Sequence[str], timeout_s: float | None) -> ExecResult:
        if self.find(id).state is not ContainerState.RUNNING:
            raise WrongState("container", id, self.find(id).state, "running")
        self.execs.append((cmd, timeout_s))
        return ExecResult(3, b"out\n", b"err\n")

    async def exec(
        self, id: str, cmd: Sequence[str], *, tty: bool, stdin: bool, stdout: bool, stderr: bool
    ) -> FakeSession:
        self.find(id)
        return FakeSession.made(stdin=stdin, stdout=stdout, stderr=stderr, tty=tty, cmd=cmd)

    async def attach(self, id: str, *, stdin: bool, stdout: bool, stderr: bool) -> FakeSession:
        self.find(id)
        return FakeSession.made(stdin=stdin, stdout=stdout, stderr=stderr)

    async def reopen_log(self, id: str) -> None:
        self.reopened.append(id)

    async def update(self, id: str, resources: Resources) -> None:
        self.records[id] = replace(self.find(id), resources=resources)

    def open_files_limit(self, id: ContainerId) -> int:
        return 1024 if self.find(id) else 0

    async def describe(self, record: ContainerRecord) -> Mapping[str, object]:
        return {"rootfs": "/somewhere"}


@dataclass
class FakeStats:
    """Every pod has the same usage; those in `silent` do not answer."""

    pods: FakePods
    silent: set[str] = field(default_factory=set)
    files_requested: bool = False
    ticks: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def read(self, pod_ids: Iterable[PodId], *, files: bool = False) -> AsyncIterator[PodStats]:
        self.files_requested = files
        for id in pod_ids:
            if id in self.silent or not self.pods.records[id].ready:
                continue
            tick = next(self.ticks)
            usage = CgroupStats(
                cpu=CpuStats(usage_ns=42_000_000 * tick, nano_cores=500),
                memory=MemoryStats(usage=8 << 20, working_set=7 << 20, available=57 << 20),
                threads=3,
            )
            at_ns = BORN_NS + 10**9 * tick
            containers = tuple(
                ContainerStats(
                    container_id=record.id,
                    at_ns=at_ns,
                    usage=usage,
                    processes=2,
                    files=7 if files else 0,
                    layer=LayerStats(at_ns=at_ns - 5, bytes=4096, inodes=3),
                )
                for record in self.pods.containers_of(id)
                if record.state is ContainerState.RUNNING
            )
            nics = (InterfaceUsage(name="eth0", rx_bytes=1000), InterfaceUsage(name="eth1", tx_bytes=2000))
            yield PodStats(pod_id=id, at_ns=at_ns, usage=usage, interfaces=nics, containers=containers)


@dataclass
class FakeEvents:
    """Streams what is put into `events`, until None."""

    events: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)
    behind: bool = False
    subscribers: int = 0

    @contextmanager
    def subscribe(self) -> Iterator[AsyncIterator[Event]]:
        self.subscribers += 1
        try:
            yield self._stream()
        finally:
            self.subscribers -= 1

    async def _stream(self) -> AsyncIterator[Event]:
        while (event := await self.events.get()) is not None:
            yield event
        if self.behind:
            raise FellBehind(1000)


@dataclass
class FakeNetworks:
    """A network in any state, and the pod CIDR that it was given."""

    state: NetworkStatus = field(default_factory=lambda: NetworkStatus(ready=True))
    cidr: str = ""

    def status(self) -> NetworkStatus:
        return self.state

    def update_pod_cidr(self, cidr: str) -> None:
        self.cidr = cidr


@dataclass
class FakeNode:
    """A node with two handlers."""

    features: Features = field(default_factory=Features)
    cgroup_driver: Driver = Driver.CGROUPFS
    names: Sequence[str] = ("", "small")
    state: Condition = field(default_factory=lambda: Condition(ready=True))

    def handlers(self) -> Sequence[str]:
        return self.names

    def condition(self) -> Condition:
        return self.state

    async def describe(self) -> Mapping[str, object]:
        return {"accelerator": {"name": "tcg", "reason": "no /dev/kvm"}, "config": {"root": "/var/lib/husk"}}


def _find(kind: str, id: str, records: Mapping[str, T]) -> T:
    for known, record in records.items():
        if id and known.startswith(id):
            return record
    raise NotFound(kind, id)


@dataclass(frozen=True)
class FsUsage:
    """See `cri.ports.FsUsage`."""

    mountpoint: str = "/var/lib/husk/images"
    used_bytes: int = 4096
    inodes_used: int = 7


@dataclass
class FakeImages:
    """`pull` makes an image of any name; `gate` holds it up, `failure` fails it."""

    images: dict[str, Image] = field(default_factory=dict)
    gate: asyncio.Event | None = None
    failure: Exception | None = None
    pulls: list[tuple[str, Auth | None]] = field(default_factory=list)
    cancelled: int = 0
    running: tuple[Transfer, ...] = ()

    def transfers(self) -> Sequence[Transfer]:
        return self.running

    async def pull(
        self, ref: str, auth: Auth | None = None, *, on_progress: Callable[[Progress], None] | None = None
    ) -> Image:
        self.pulls.append((ref, auth))
        report = on_progress or (lambda progress: None)
        report(Progress(item=LAYER, step="download", current=600, total=1000))
        try:
            if self.gate is not None:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failure is not None:
            raise self.failure
        report(Progress(item=LAYER, step="download", current=1000, total=1000))
        return self._add(ref if ":" in ref else f"example.test/{ref}:latest")

    async def import_archive(
        self, path: Path, *, name: str = "", on_progress: Callable[[Progress], None] | None = None
    ) -> tuple[Image, ...]:
        if on_progress is not None:
            on_progress(Progress(item=LAYER, step="unpack", current=1, total=1))
        return (self._add(name or f"example.test/{path.stem}:latest"),)

    def _add(self, ref: str) -> Image:
        image = Image(
            id=IMAGE_ID, repo_tags=(ref,), size=1000, config=RunDefaults(user="1003:1003"), created="then"
        )
        self.images[ref] = image
        return image

    def find(self, ref: str) -> Image:
        for name, image in self.images.items():
            if ref in (name, image.id) or name == f"example.test/{ref}:latest":
                return image
        raise ImageNotFound(ref)

    def list(self) -> tuple[Image, ...]:
        return tuple(self.images.values())

    async def remove(self, ref: str) -> Image | None:
        try:
            image = self.find(ref)
        except ImageNotFound:
            return None
        return self.images.pop(image.repo_tags[0])

    def fs_usage(self) -> FsUsage:
        return FsUsage()
