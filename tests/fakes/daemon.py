"""The daemon as `cri.daemon.build` makes it, over a host of fakes that outlives it.

Real are its records, pods, containers, volumes, events, statistics and services; fakes are the hypervisor
with its guests, networks, cgroups and root filesystems, all of which count what they gave out in one
`Ledger`. Building again on the same `FakeHost` is a restart of the daemon after SIGKILL.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from cri.config import Config, HandlerTable, Metrics
from cri.daemon import Daemon, Overrides, build
from image.errors import ImageNotFound
from image.image_store import ImageStore
from image.index import Image, ImageSettings
from network.attach import Networks
from sandbox.host import cgroup
from sandbox.plan.vm import HostSize
from sandbox.pod import Pod
from sandbox.spec import Handler, VmSize
from sandbox.stats.host_usage import HostUsage, ProcessUsage
from sandbox.vm_pods.accelerator import AcceleratorChoice
from tests.fakes.host import FakeHypervisor, FakeNetworks, FakeRootfs, Ledger

IMAGE = Image(
    id="sha256:" + "1" * 64,
    repo_tags=("example/web:1",),
    repo_digests=(),
    size=1,
    chain_ids=("sha256:" + "2" * 64,),
    config=ImageSettings(cmd=("/bin/true",)),
)
HANDLER = HandlerTable(
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

    def create_waiting(self, pod_id: str) -> None:
        self.ledger.take("cgroup.create", f"cgroup {pod_id}")

    def claim(self, pod_id: str, parent: str) -> None:
        self.ledger.take("cgroup.create", f"cgroup {pod_id}")

    def remove(self, pod_id: str, parent: str) -> None:
        self.ledger.give("cgroup.remove", f"cgroup {pod_id}")


@dataclass
class FakeHost:
    """What a daemon finds on its host: `root` for its files, and the fakes."""

    root: Path
    handler: HandlerTable = HANDLER
    ledger: Ledger = field(default_factory=Ledger)
    hypervisor: FakeHypervisor = field(init=False)
    grown: list[VmSize] = field(default_factory=list)  # sizes that pods were resized to

    def __post_init__(self) -> None:
        self.hypervisor = FakeHypervisor(self.ledger)

    def build(self, images: ImageStore | None = None) -> Daemon:
        """Build a daemon with the current `handler`, and start nothing.

        Containers find the image of each name in `images`, or IMAGE by the name example/web:1.
        """
        layout = cgroup.Layout(mode=cgroup.Mode.V2, hierarchies=(), unified="")
        return build(
            self.config(),
            Overrides(
                hypervisor=self.hypervisor,
                choose_accelerator=_tcg,
                networks=cast(Networks, FakeNetworks(self.ledger)),
                images=images,
                find_image=None if images else _find_image,
                rootfs=FakeRootfs(self.ledger),
                vm_cgroups=LedgerCgroups(layout=layout, root="/husk-test", ledger=self.ledger),
                host_size=HOST_SIZE,
                grow_vm=self._grow,
                vm_usage=_no_usage,
            ),
        )

    def config(self) -> Config:
        """Return the configuration of the next daemon: no metrics, streaming on any free port."""
        return Config(
            root=str(self.root),
            run=str(self.root / "run"),
            socket=str(self.root / "husk.sock"),
            default_handler="test",
            metrics=Metrics(port=0),
            handlers={"test": self.handler},
        )

    async def _grow(self, pod: Pod, size: VmSize) -> None:
        self.grown.append(size)


async def kill(daemon: Daemon) -> None:
    """End a built daemon as SIGKILL would: tasks and connections end, the host stays as it is."""
    await daemon.tasks.close()
    for pod in daemon.inventory.pods.values():
        if pod.client is not None:
            await pod.client.close()


def _find_image(name: str) -> Image:
    if name not in IMAGE.repo_tags:
        raise ImageNotFound(name)
    return IMAGE


async def _tcg(handler: Handler) -> AcceleratorChoice:
    return AcceleratorChoice(accelerator="tcg", reason="fixed by the test")


def _no_usage(pod: Pod) -> HostUsage:
    return HostUsage(guest_memory_bytes=0, vmm=ProcessUsage(), helpers=ProcessUsage())
