"""A pod's life over each hypervisor driver whose pods need no guest image: the daemon's real objects, the
driver and the agent, over fakes of the network and of the image store.

The root filesystem is a directory with Debian's static busybox, bound where a store would mount it.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from cri.config import Config, HandlerTable, Metrics
from cri.daemon import Daemon, Overrides, build
from image.idmap import IdMap
from image.index import Image
from image.manifest import RunDefaults
from image.rootfs import Rootfs
from network.attach import Attachment, Interface, NetworkRequest, Networks
from sandbox.errors import InvalidSpec, VmmError
from sandbox.host import cgroup, mounts, process
from sandbox.plan import process as plan
from sandbox.records import ContainerState, PodState
from sandbox.spec import ContainerSpec, MountSpec, PodSpec, Resources
from sandbox.vmm.drivers import find_hypervisors
from tests.drivers import find_kit
from tests.fakes.daemon import LedgerCgroups, kill
from tests.fakes.host import FakeNetworks, FakeRootfs, Ledger
from tests.kit.agent import make_rootfs
from tests.kit.eventually import eventually
from tests.kit.scratch import scratch_dir

TIMEOUT_S = 20
LOOP = "while :; do sleep 0.05; done"
FOREVER = ("sh", "-c", f"trap 'exit 3' TERM; {LOOP}")
IMAGE = Image(
    id="sha256:" + "1" * 64,
    repo_tags=("example/busybox:1",),
    repo_digests=(),
    size=1,
    chain_ids=("sha256:" + "2" * 64,),
    config=RunDefaults(cmd=FOREVER),
)


class OneNamespace(FakeNetworks):
    """Pods that share this test's network namespace on the host's side; in the guest they have addresses."""

    def netns_of(self, pod_id: str) -> Path:
        return Path("/proc/self/ns/net")

    async def up(self, request: NetworkRequest) -> Attachment:
        self.ledger.take("network.up", f"network {request.pod_id}")
        nic = Interface(
            name="eth0", tap="tap0", mac="02:00:00:00:00:09", mtu=1400, addresses=("10.1.0.2/24",)
        )
        return Attachment(netns=str(self.netns_of(request.pod_id)), interfaces=(nic,), ips=("10.1.0.2",))


@dataclass
class BusyboxRootfs(FakeRootfs):
    """A copy of the same root for every container."""

    homes: Path = field(kw_only=True)

    async def up(
        self,
        key: str,
        chain_ids: Sequence[str],
        target: Path,
        ids: IdMap | None = None,
        plain: Sequence[str] = (),
    ) -> Rootfs:
        rootfs = await super().up(key, chain_ids, target, ids, plain)
        target.mkdir(parents=True, exist_ok=True)
        mounts.bind(make_rootfs(self.homes / key), target, recursive=False)
        return rootfs

    async def down(self, key: str, target: Path) -> None:
        mounts.unmount_tree(target)
        shutil.rmtree(self.homes / key, ignore_errors=True)
        await super().down(key, target)


@dataclass
class Node:
    """What outlives a daemon: directories, processes and the fakes."""

    root: Path
    handler: HandlerTable
    ledger: Ledger = field(default_factory=Ledger)
    daemon: Daemon = field(init=False)

    def __post_init__(self) -> None:
        self.networks = OneNamespace(self.ledger)
        self.rootfs = BusyboxRootfs(self.ledger, homes=self.root / "roots")

    async def start(self) -> None:
        """Build a daemon, which recovers the pods of the one before."""
        layout = cgroup.Layout(mode=cgroup.Mode.V2, hierarchies=(), unified="")
        self.daemon = build(
            Config(
                root=str(self.root),
                run=str(self.root / "run"),
                socket=str(self.root / "husk.sock"),
                default_handler="test",
                metrics=Metrics(port=0),
                handlers={"test": self.handler},
            ),
            Overrides(
                networks=cast(Networks, self.networks),
                find_image=lambda name: IMAGE,
                rootfs=self.rootfs,
                vm_cgroups=LedgerCgroups(layout=layout, root="/husk-test", ledger=self.ledger),
            ),
        )
        self.daemon.load()
        await self.daemon.recover()

    async def restart(self) -> None:
        """End the daemon as SIGKILL would, and start the next one."""
        await kill(self.daemon)
        await self.start()

    def processes(self) -> list[process.ProcessIdentity]:
        return process.find_by_argument(f"{self.root}/run/")

    async def pod(self, name: str = "web") -> str:
        spec = PodSpec(
            name=name,
            namespace="default",
            uid=f"uid-{name}",
            log_directory=str(self.root / "logs"),
            hostname="web",
        )
        return await self.daemon.pods.run(spec)

    async def container(self, pod: str, *command: str, **fields: object) -> str:
        spec = ContainerSpec(
            name="main",
            image="example/busybox:1",
            command=command,
            log_path="main.log",
            **fields,  # type: ignore[arg-type]
        )
        id = await self.daemon.containers.create(pod, spec)
        await self.daemon.containers.start(id)
        return id

    async def exec(self, id: str, script: str) -> tuple[int, str]:
        result = await self.daemon.containers.exec_sync(id, ["sh", "-c", script], TIMEOUT_S)
        return result.exit_code, (result.stdout + result.stderr).decode()

    def log(self) -> list[str]:
        lines = (self.root / "logs/main.log").read_text().splitlines()
        return [line.split(" ", 3)[3] for line in lines]

    async def until_logged(self, count: int) -> None:
        await eventually(lambda: len(self.log()), until=lambda found: found >= count, timeout_s=TIMEOUT_S)

    async def until_exited(self, id: str) -> int:
        record = await eventually(
            lambda: self.daemon.containers.find(id),
            until=lambda record: record.state is ContainerState.EXITED,
            timeout_s=TIMEOUT_S,
        )
        return record.exit_code


@pytest.fixture(params=[name for name in find_hypervisors() if not find_kit(name).PODS_BOOT_IMAGE])
async def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    handler = find_kit(request.param).pod_handler()
    # in a VM the agent may raise the limit; as a process it may lack CAP_SYS_RESOURCE
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(plan, "_NOFILE", (1024, min(most, 524288)))
    node = Node(scratch_dir("life"), handler)
    (node.root / "logs").mkdir()
    await node.start()
    yield node
    for record in list(node.daemon.pods.list()):
        await node.daemon.pods.remove(record.id)
    await kill(node.daemon)
    assert node.processes() == []
    assert node.ledger.held == set()
    assert mounts.mounts_below(node.root) == []
    shutil.rmtree(node.root)


async def test_container_runs_in_its_root_with_the_pods_names_and_address(node: Node) -> None:
    pod = await node.pod()
    assert node.daemon.pods.find(pod).state is PodState.READY
    container = await node.container(pod)
    assert await node.exec(container, "cat /etc/secret; cat /proc/sys/kernel/hostname") == (
        0,
        "of the imageweb\n",
    )
    assert "10.1.0.2" in (await node.exec(container, "cat /proc/net/fib_trie"))[1]
    assert (await node.exec(container, "cat /sys/class/net/eth0/address"))[1].strip() in (
        "",
        "02:00:00:00:00:09",
    )
    facts = await node.daemon.pods.describe(node.daemon.pods.find(pod))
    assert facts["accelerator"] == "none"


async def test_exec_returns_output_and_exit_code(node: Node) -> None:
    container = await node.container(await node.pod())
    assert await node.exec(container, "echo out; echo err >&2; exit 7") == (7, "out\nerr\n")


async def test_log_and_exit_code_of_a_container_that_ends(node: Node) -> None:
    container = await node.container(await node.pod(), "sh", "-c", "echo first; echo second >&2; exit 5")
    assert await node.until_exited(container) == 5
    assert sorted(node.log()) == ["first", "second"]


async def test_stop_sends_the_stop_signal_and_remove_forgets(node: Node) -> None:
    pod = await node.pod()
    # until the trap is set, a first process ignores SIGTERM
    container = await node.container(pod, "sh", "-c", f"trap 'exit 3' TERM; echo ready; {LOOP}")
    await node.until_logged(1)
    await node.daemon.containers.stop(container, TIMEOUT_S)
    assert node.daemon.containers.find(container).exit_code == 3
    await node.daemon.containers.remove(container)
    await node.daemon.pods.stop(pod)
    assert node.daemon.pods.find(pod).state is PodState.NOT_READY
    assert node.processes() == []


async def test_volume_is_shared_with_the_host_both_ways(node: Node) -> None:
    volume = node.root / "volume"
    volume.mkdir()
    (volume / "in").write_text("from the host")
    mount = MountSpec(container_path="/data", host_path=str(volume))
    container = await node.container(await node.pod(), mounts=(mount,))
    assert await node.exec(container, "cat /data/in; echo back > /data/out") == (0, "from the host")
    assert (volume / "out").read_text() == "back\n"


async def test_pod_and_container_are_recovered_after_a_restart(node: Node) -> None:
    pod = await node.pod()
    ticking = ("sh", "-c", "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done")
    container = await node.container(pod, *ticking)
    before = node.daemon.containers.find(container)
    await node.until_logged(4)
    for _ in range(2):
        lines = len(node.log())
        await node.restart()
        assert node.daemon.pods.find(pod).state is PodState.READY
        assert node.daemon.containers.find(container).started_at_ns == before.started_at_ns
        assert await node.exec(container, "echo again") == (0, "again\n")
        await node.until_logged(lines + 4)
    numbers = [int(line) for line in node.log()]
    assert numbers == list(range(1, len(numbers) + 1)), "no line is lost or doubled"


async def test_exit_while_no_daemon_runs_is_reported_after_the_restart(node: Node) -> None:
    container = await node.container(await node.pod(), "sh", "-c", "sleep 0.3; echo late; exit 4")
    await kill(node.daemon)
    await eventually(_sleepers, until=lambda found: not found, timeout_s=TIMEOUT_S)
    await node.start()
    assert await node.until_exited(container) == 4
    assert node.log() == ["late"]


def _sleepers() -> list[int]:
    return [
        int(each.parent.name)
        for each in Path("/proc").glob("[0-9]*/cmdline")
        if b"sleep 0.3; echo late" in _read(each)
    ]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


async def test_vm_that_dies_makes_its_pod_not_ready(node: Node) -> None:
    pod = await node.pod()
    container = await node.container(pod)
    vm = node.daemon.pods.find(pod).vm_handle
    assert vm is not None
    await process.kill(vm.vmm)
    await eventually(
        lambda: node.daemon.pods.find(pod),
        until=lambda record: record.state is PodState.NOT_READY,
        timeout_s=TIMEOUT_S,
    )
    assert await node.until_exited(container) == 137


async def test_growth_that_the_driver_lacks_fails_the_update_alone(node: Node) -> None:
    container = await node.container(await node.pod())
    with pytest.raises(VmmError, match="does not support 'grow'"):
        await node.daemon.containers.update(container, Resources(memory_limit=8 << 30))
    assert await node.exec(container, "echo still") == (0, "still\n")


async def test_pod_of_an_accelerator_that_the_driver_lacks_is_rejected(node: Node) -> None:
    node.handler = HandlerTable(
        hypervisor=node.handler.hypervisor,
        kernel=node.handler.kernel,
        initramfs=node.handler.initramfs,
        accelerator="kvm",
    )
    await node.restart()
    with pytest.raises(InvalidSpec, match="accelerator"):
        await node.pod()
    assert node.processes() == []
