"""The daemon as `cri.daemon.build` makes it, over a host of fakes that outlives it.

Real are its records, pods, containers, volumes, events, statistics and services; fakes are the hypervisor
with its guests, networks, cgroups and root filesystems, all of which count what they gave out in one
`Ledger`. Building again on the same `FakeHost` is a restart of the daemon after SIGKILL.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import msgspec

from cri.config import Config, Images, Metrics
from cri.daemon import Daemon, Overrides, build
from image.image_store import ImageStore
from image.index import Image
from image.manifest import RunDefaults
from network.attach import Networks
from sandbox.errors import InvalidSpec
from sandbox.host import cgroup
from sandbox.host.mounts import mounts_below
from sandbox.plan.vm import HostSize
from sandbox.pod import Pod
from sandbox.spec import Handler, VmSize
from sandbox.stats.host_usage import HostUsage, ProcessUsage
from sandbox.vm_pods.accelerator import AcceleratorChoice
from sandbox.vm_pods.link import VmLink
from tests.fakes.host import FakeHypervisor, FakeNetworks, FakeRootfs, Ledger

IMAGE = Image(
    id="sha256:" + "1" * 64,
    repo_tags=("example/web:1",),
    repo_digests=(),
    size=1,
    chain_ids=("sha256:" + "2" * 64,),
    config=RunDefaults(cmd=("/bin/true",)),
)
HANDLER = Handler(
    name="",
    kernel="/k",
    initramfs="/i",
    memory_mib=256,
    vcpus=1,
    accelerator="tcg",
    source="boot",
    host_pods="refuse",
)
HOST_SIZE = HostSize(memory_mib=4096, cpus=4)


class LedgerCgroups(cgroup.Cgroups, frozen=True, kw_only=True):
    """Counts cgroups of pods and makes none; tests/unit/test_cgroup.py has the real ones."""

    ledger: Ledger
    # of each pod; the host has CPUs 0 to 3
    cpus: dict[str, tuple[int, ...]] = msgspec.field(default_factory=dict)
    scores: dict[str, int] = msgspec.field(default_factory=dict)  # oom_score_adj
    weights: dict[str, tuple[int, int]] = msgspec.field(default_factory=dict)  # shares and quota

    def create_pooled(self, pod_id: str) -> None:
        self.ledger.take("cgroup.create", f"cgroup {pod_id}")

    def claim(self, pod_id: str, parent: str) -> None:
        self.ledger.take("cgroup.create", f"cgroup {pod_id}")

    def remove(self, pod_id: str, parent: str) -> None:
        self.ledger.give("cgroup.remove", f"cgroup {pod_id}")

    def confine(self, pod_id: str, parent: str, cpus: Collection[int], mems: Collection[int]) -> None:
        if max(cpus, default=0) > 3:
            raise InvalidSpec("config.linux.resources.cpuset_cpus", "there is no such CPU", "some of 0-3")
        self.cpus[pod_id] = tuple(sorted(cpus))

    def set_oom_score(self, pod_id: str, parent: str, score: int) -> bool:
        self.scores[pod_id] = score
        return True

    def weigh(self, pod_id: str, *, shares: int, quota_us: int, period_us: int) -> None:
        self.weights[pod_id] = shares, quota_us


@dataclass
class FakeHost:
    """What a daemon finds on its host: `root` for its files, and the fakes."""

    root: Path
    handlers: dict[str, Handler] = field(default_factory=lambda: {"": HANDLER})  # read by daemons, also later
    ledger: Ledger = field(default_factory=Ledger)
    hypervisor: FakeHypervisor = field(init=False)
    cgroups: LedgerCgroups = field(init=False)
    grown: list[VmSize] = field(default_factory=list)  # sizes that pods were resized to

    def __post_init__(self) -> None:
        self.hypervisor = FakeHypervisor(self.ledger)
        layout = cgroup.Layout(mode=cgroup.Mode.V2, hierarchies=(), unified="")
        self.cgroups = LedgerCgroups(layout=layout, root="/husk-test", ledger=self.ledger)

    def build(self, images: ImageStore | None = None) -> Daemon:
        """Build a daemon, and start nothing.

        Containers find their image in `images`, or IMAGE by any name.
        """
        return build(
            self.config(),
            Overrides(
                hypervisor=self.hypervisor,
                handlers=self.handlers,
                choose_accelerator=_tcg,
                networks=cast(Networks, FakeNetworks(self.ledger)),
                images=images,
                find_image=None if images else find_image,
                rootfs=FakeRootfs(self.ledger),
                vm_cgroups=self.cgroups,
                host_size=HOST_SIZE,
                grow_vm=lambda pod, size: self.grow(pod, size),  # a test may replace it
                vm_usage=_no_usage,
            ),
        )

    def config(self) -> Config:
        """Return the configuration of the next daemon: no metrics, streaming on any free port."""
        return Config(
            root=str(self.root),
            run=str(self.root / "run"),
            socket=str(self.root / "husk.sock"),
            metrics=Metrics(port=0),
            images=Images(preload_dir=str(self.root / "preload")),
        )

    async def grow(self, pod: Pod, size: VmSize) -> None:
        """Record the size in place of hot-plugging memory and CPUs."""
        self.grown.append(size)


class Host(Protocol):
    """A host on which daemons can be built one after the other."""

    root: Path

    def build(self) -> Daemon:
        """Build a daemon, and start nothing."""


class RestartableDaemon:
    """A daemon that can be killed and built again on the same host.

    The objects of the current daemon are attributes. It recovers pods, and serves nothing.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.root = host.root
        self.start()

    def start(self) -> None:
        """Build a daemon and load its records, without recovering them."""
        self.built = self.host.build()
        self.built.load()
        self.tasks = self.built.tasks
        self.inventory = self.built.inventory
        self.events = self.built.events
        self.engines = self.built.engines
        self.pool = self.built.pool
        self.pods = self.built.pods
        self.containers = self.built.containers
        self.pod_store = self.built.pod_store
        self.container_store = self.built.container_store

    async def kill(self) -> None:
        """See `kill`."""
        await kill(self.built)

    async def restart(self) -> None:
        """Kill the daemon, build the next one, and let it recover what it finds."""
        await self.kill()
        self.start()
        await self.built.recover()

    def assert_no_files(self) -> None:
        """Assert that no pod and no container left a file, and nothing is mounted below the root."""
        assert [path for path in (self.root / "run").rglob("*") if path.name != "pods"] == []
        assert list((self.root / "pods").iterdir()) == []
        assert list((self.root / "containers").iterdir()) == []
        assert mounts_below(self.root) == []


async def kill(daemon: Daemon) -> None:
    """End a built daemon as SIGKILL would: tasks and connections end, the host stays as it is."""
    await daemon.tasks.close()
    for pod in daemon.inventory.pods.values():
        if isinstance(pod.link, VmLink) and pod.link.client is not None:
            await pod.link.client.close()


def find_image(name: str) -> Image:
    """Return IMAGE, whatever the name."""
    return IMAGE


async def _tcg(handler: Handler) -> AcceleratorChoice:
    return AcceleratorChoice(accelerator="tcg", reason="fixed by the test")


def _no_usage(pod: Pod) -> HostUsage:
    return HostUsage(guest_memory_bytes=0, vmm=ProcessUsage(), helpers=ProcessUsage())
