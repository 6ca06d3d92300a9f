"""Live files over a real agent: a daemon killed between, lost connections, older agents, no watches left."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sandbox.container import Container
from sandbox.errors import GuestError
from sandbox.guest import guest_pb2 as pb
from sandbox.host import inotify, syscalls
from sandbox.host.tasks import Tasks
from sandbox.inventory import Inventory
from sandbox.plan import MountSource
from sandbox.plan.values import ContainerPlan, MountPlan, ProcessPlan
from sandbox.pod import Pod
from sandbox.records import ContainerRecord, PodRecord, PodState, VmRuntime
from sandbox.spec import ContainerId, ContainerSpec, ImageDefaults, MountSpec, PodId, PodSpec, Propagation
from sandbox.vm_pods import live_files
from sandbox.vm_pods.guest_mounts import GuestMounts
from sandbox.vm_pods.link import link_of
from sandbox.vm_pods.live_files import LiveFiles
from tests.fakes.inventory import make_inventory
from tests.kit.agent import Agent, Guest
from tests.kit.atomic_writer import write_volume
from tests.kit.eventually import eventually


@dataclass
class Site:
    root: Path
    agent: Agent
    guest: Guest
    inventory: Inventory
    pod: Pod
    tasks: Tasks = field(default_factory=Tasks)
    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.live = LiveFiles(self.tasks, self.inventory, self.patterns)

    @property
    def volume(self) -> Path:
        return self.root / "pods/uid/volumes/kubernetes.io~configmap/conf"

    @property
    def trees(self) -> list[Path]:
        """Copies as the guest has them."""
        place = Path(f"/proc/{self.agent.pid}/root/run/husk/live")
        return sorted(place.iterdir()) if place.exists() else []

    def read(self, name: str) -> str:
        """Content of a file in the only copy; "" is a single file."""
        (tree,) = self.trees
        path = tree / "root" / name if name else tree / "root"
        return path.read_text() if path.exists() else ""

    def mount(self, path: Path | None = None, *, readonly: bool = True, private: bool = True) -> MountSpec:
        propagation = Propagation.PRIVATE if private else Propagation.HOST_TO_CONTAINER
        return MountSpec(
            container_path="/x",
            host_path=str(path or self.volume),
            readonly=readonly,
            propagation=propagation,
        )

    def container(self, name: str, *mounts: MountSpec) -> Container:
        record = ContainerRecord(
            id=ContainerId(name),
            pod_id=self.pod.id,
            spec=ContainerSpec(name=name, image="i", mounts=mounts or (self.mount(),)),
            created_at_ns=1,
            image_id="i",
            image_ref="i",
            defaults=ImageDefaults(),
        )
        container = self.inventory.make_container(record, self.pod)
        self.inventory.add_container(container)
        return container

    async def create(self, name: str, *mounts: MountSpec) -> Container:
        """Run the step, and save a plan that has its result."""
        container = self.container(name, *mounts)
        await GuestMounts((self.live,)).up(container)
        plans = tuple(MountPlan(source=each.path, target="/x") for each in container.live.values())
        container.save_plan(ContainerPlan(id=name, rootfs="/", process=ProcessPlan(), mounts=plans))
        return container

    async def restart(self) -> None:
        """Replace the daemon's part: its tasks end, nothing else."""
        await self.tasks.close()
        await self.guest.client.close()
        self.tasks = Tasks()
        self.live = LiveFiles(self.tasks, self.inventory, self.patterns)
        await self.reconnect()

    async def reconnect(self) -> None:
        await self.guest.connect()
        link_of(self.pod).client = self.guest.client
        link_of(self.pod).connected.set()
        await self.live.recover(self.pod)

    async def reads(self, name: str, text: str) -> None:
        await eventually(lambda: self.read(name), until=lambda found: found == text, timeout_s=10)


@pytest.fixture
async def site(agent: Agent, tmp_path: Path) -> AsyncIterator[Site]:
    guest = Guest(agent)
    await guest.connect()
    await guest.call(keep_trees=pb.KeepTrees())
    inventory = make_inventory(tmp_path / "state")
    record = PodRecord(
        id=PodId("p"),
        spec=PodSpec(name="p", namespace="n", uid="u"),
        created_at_ns=1,
        state=PodState.READY,
        runtime=VmRuntime(),
    )
    pod = inventory.make_pod(record)
    link_of(pod).client = guest.client
    link_of(pod).connected.set()
    site = Site(tmp_path, agent, guest, inventory, pod)
    write_volume(site.volume, {"key": "old", "gone": "x"})
    yield site
    await site.tasks.close()
    await guest.close()


async def test_copy_follows_its_source_and_ends_with_its_last_container(site: Site) -> None:
    first, second = await site.create("a"), await site.create("b")
    assert first.live == second.live
    assert isinstance(first.live[0], MountSource)
    write_volume(site.volume, {"key": "new"})
    await site.reads("key", "new")
    await eventually(lambda: site.read("gone"), until=lambda text: text == "", timeout_s=5)
    for _ in range(2):
        await GuestMounts((site.live,)).down(first)
    write_volume(site.volume, {"key": "newer"})
    await site.reads("key", "newer")
    await GuestMounts((site.live,)).down(second)
    assert site.trees == []


async def test_down_without_up_is_harmless(site: Site) -> None:
    await GuestMounts((site.live,)).down(site.container("a"))


async def test_quiet_source_has_no_task(site: Site) -> None:
    await site.create("a")
    assert not [task for task in site.tasks._tasks if "of pod" in task.get_name()]


@pytest.mark.parametrize("kind", ["writable", "slave", "other path", "sub-path"])
async def test_mount_that_does_not_qualify_is_not_copied(site: Site, kind: str) -> None:
    other = site.root / "pods/uid/volumes/kubernetes.io~empty-dir/conf"
    part = site.root / "pods/uid/volume-subpaths/conf/c/0"
    for each in (other, part):
        each.mkdir(parents=True)
    mounts = {
        "writable": site.mount(readonly=False),
        "slave": site.mount(private=False),
        "other path": site.mount(other),
        "sub-path": site.mount(part),
    }
    container = await site.create("a", mounts[kind])
    assert container.live == {}


async def test_configured_pattern_fits_whole_paths(site: Site) -> None:
    site.live = LiveFiles(site.tasks, site.inventory, (f"{site.root}/certs/*",))
    for name in ("certs/a", "certs/a/b", "more/certs/a"):
        (site.root / name).mkdir(parents=True, exist_ok=True)
    mounts = [site.mount(site.root / name) for name in ("certs/a", "certs/a/b", "more/certs/a")]
    assert list((await site.create("a", *mounts)).live) == [0]


async def test_changes_while_the_daemon_was_down_are_made_up_for(site: Site) -> None:
    await site.create("a")
    await site.tasks.close()
    write_volume(site.volume, {"key": "meanwhile"})
    await site.restart()
    await site.reads("key", "meanwhile")
    await eventually(lambda: site.read("gone"), until=lambda text: text == "", timeout_s=5)
    write_volume(site.volume, {"key": "after"})
    await site.reads("key", "after")


async def test_copy_of_a_creation_that_the_daemons_end_cut_short_is_removed(site: Site) -> None:
    await site.create("a")
    other = site.volume.with_name("other")
    write_volume(other, {"k": "v"})
    cut = site.container("b", site.mount(other))
    await GuestMounts((site.live,)).up(cut)  # no plan was saved
    assert len(site.trees) == 2
    await site.restart()
    assert len(site.trees) == 1


async def test_only_copy_of_a_creation_that_was_cut_short_is_removed_with_it(site: Site) -> None:
    """The next daemon undoes the creation before it is connected to the agent."""
    cut = site.container("b")
    await GuestMounts((site.live,)).up(cut)
    assert len(site.trees) == 1
    await site.tasks.close()
    site.live = LiveFiles(site.tasks, site.inventory)
    link_of(site.pod).lose_client()
    await GuestMounts((site.live,)).down(cut)
    site.inventory.forget_container(cut)
    await site.reconnect()
    assert site.trees == []


async def test_removal_that_was_cut_short_is_repeated_by_the_next_daemon(site: Site) -> None:
    container = await site.create("a")
    container.drop_plan()
    await site.restart()
    await GuestMounts((site.live,)).down(container)
    assert site.trees == []


async def test_lost_connection_in_the_middle_of_an_update_is_made_up_for(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.create("a")
    client = site.guest.client
    call = client.call

    async def lose(request: pb.Request, timeout_s: float) -> pb.Reply:
        await call(request, timeout_s)
        await client.close()
        return await call(request, timeout_s)

    monkeypatch.setattr(client, "call", lose)
    write_volume(site.volume, {"key": "new"})
    await client.wait_closed()
    link_of(site.pod).lose_client()
    await site.reconnect()
    await site.reads("key", "new")


async def test_source_that_was_replaced_while_the_daemon_was_down_keeps_its_copy(site: Site) -> None:
    """As a bind mount shows the directory that was there."""
    await site.create("a")
    await site.tasks.close()
    site.volume.rename(site.volume.with_name("moved"))
    write_volume(site.volume, {"key": "another"})
    await site.restart()
    fresh = await site.create("b")
    assert len(site.trees) == 2
    contents = sorted((tree / "root/key").read_text() for tree in site.trees)
    assert contents == ["another", "old"]
    await GuestMounts((site.live,)).down(fresh)
    assert site.read("key") == "old"


async def test_single_file_that_was_replaced_keeps_its_copy(site: Site) -> None:
    hosts = site.root / "pods/uid/etc-hosts"
    hosts.write_text("old")
    await site.create("a", site.mount(hosts))
    hosts.write_text("rewritten")
    await site.reads("", "rewritten")
    other = hosts.with_name("other")
    other.write_text("another inode")
    other.rename(hosts)
    await site.create("b", site.mount(hosts))
    assert sorted((tree / "root").read_text() for tree in site.trees) == ["another inode", "rewritten"]


async def test_secret_on_a_tmpfs_can_be_unmounted_while_it_is_copied(site: Site) -> None:
    """The kubelet mounts a tmpfs for each Secret; neither watch nor copy keeps it busy."""
    volume = site.root / "pods/uid/volumes/kubernetes.io~secret/s"
    volume.mkdir(parents=True)
    syscalls.mount("tmpfs", volume, "tmpfs")
    write_volume(volume, {"key": "old"})
    await site.create("a", site.mount(volume))
    write_volume(volume, {"key": "new"})
    await site.reads("key", "new")
    await eventually(
        lambda: [task for task in site.tasks._tasks if "of pod" in task.get_name()],
        until=lambda tasks: tasks == [],
        timeout_s=10,
    )
    syscalls.umount2(volume, syscalls.UMOUNT_NOFOLLOW)
    write_volume(volume, {"key": "of what lies beneath"})
    await site.restart()
    assert site.read("key") == "new"


async def test_older_agent_gets_the_export(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(request: pb.Request, timeout_s: float) -> pb.Reply:
        raise GuestError("request", errno.EOPNOTSUPP, "body 20 is unknown to this agent")

    monkeypatch.setattr(site.guest.client, "call", refuse)
    container = await site.create("a")
    assert container.live == {}
    await GuestMounts((site.live,)).down(container)


async def test_tree_beyond_the_limit_gets_the_export_and_says_so(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    write_volume(site.volume, {"key": "x" * (live_files.FILE_BYTES + 1)})
    assert (await site.create("a")).live == {}
    assert "is exported: " in caplog.text
    assert f"larger than {live_files.FILE_BYTES} bytes" in caplog.text


async def test_copies_of_a_pod_are_bounded_together(site: Site) -> None:
    volumes = [site.volume.with_name(str(number)) for number in range(5)]
    for volume in volumes:
        write_volume(volume, {str(number): "x" * (1 << 20) for number in range(4)})
    container = await site.create("a", *(site.mount(volume) for volume in volumes))
    assert list(container.live) == [0, 1, 2, 3]


async def test_update_beyond_the_limit_leaves_the_copy_and_the_next_one_is_made(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    await site.create("a")
    write_volume(site.volume, {"key": "x" * (live_files.FILE_BYTES + 1)})
    await eventually(lambda: caplog.text, until=lambda text: "is stale: " in text, timeout_s=10)
    assert site.read("key") == "old"
    write_volume(site.volume, {"key": "small again"})
    await site.reads("key", "small again")


# ---------------------------------------------------------------------------------- no watches


def refuse_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, path: str, mask: int, *, what: str = "") -> int:
        raise OSError(errno.ENOSPC, "inotify_add_watch: No space left on device", what)

    monkeypatch.setattr(syscalls, "inotify_add_watch", refuse)


async def test_new_mount_without_watches_left_gets_the_export(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_watches(monkeypatch)
    assert (await site.create("a")).live == {}
    assert "No space left" in caplog.text


async def test_new_mount_without_instances_left_gets_the_export(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise OSError(errno.EMFILE, "inotify_init1: Too many open files")

    monkeypatch.setattr(syscalls, "inotify_init1", refuse)
    assert (await site.create("a")).live == {}


async def test_copy_without_watches_left_is_compared_on_a_timer(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live_files, "POLL_S", 0.05)
    await site.create("a")
    await site.tasks.close()
    with monkeypatch.context() as none_left:
        refuse_watches(none_left)
        await site.restart()
        await eventually(lambda: caplog.text, until=lambda text: "is compared every" in text, timeout_s=10)
        write_volume(site.volume, {"key": "polled"})
        await site.reads("key", "polled")
    write_volume(site.volume, {"key": "watched again"})
    await site.reads("key", "watched again")
    await eventually(
        lambda: [task for task in site.tasks._tasks if "of pod" in task.get_name()],
        until=lambda tasks: tasks == [],
        timeout_s=10,
    )


async def test_lost_events_lead_to_the_same_final_state(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue overflows before it is read."""
    await site.create("a")
    overflow = iter([inotify.Event(-1, inotify.IN_Q_OVERFLOW, 0, b"")])
    with monkeypatch.context() as deaf:
        deaf.setattr(inotify, "parse", lambda data: overflow)
        write_volume(site.volume, {"key": "lost"})
        await site.reads("key", "lost")


async def test_writer_without_a_pause_is_followed_and_its_last_state_arrives(site: Site) -> None:
    await site.create("a")
    for number in range(200):
        write_volume(site.volume, {"key": str(number)})
    await site.reads("key", "199")
