"""Pods without a VM: each step and each moment of a start fails in turn, or the daemon is killed in it.

conmon, crun, cgroups and mounts are real; only images and networks are fakes.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from cri.config import Config, Metrics
from cri.daemon import Daemon as BuiltDaemon
from cri.daemon import Overrides, build
from image.idmap import IdMap
from image.rootfs import HostTree, Rootfs
from image.stores import Usage
from network.attach import Networks
from sandbox.engine import Engine
from sandbox.errors import GuestError, InvalidSpec, PhaseFailed, SandboxError
from sandbox.host import mounts
from sandbox.host.openat import read_beneath
from sandbox.host.process import alive
from sandbox.host_pods import conmon
from sandbox.host_pods.conmon import Bundle, ConmonOptions, Starting
from sandbox.host_pods.containers import ProcessContainers
from sandbox.host_pods.oci import NodeLimits
from sandbox.records import ContainerState, PodState, ProcessRuntime
from sandbox.spec import ContainerSpec, Isolation, PidMode, PodSpec, SecuritySpec
from tests.fakes.daemon import HANDLER, RestartableDaemon, find_image
from tests.fakes.host import FakeNetworks, Ledger
from tests.kit.eventually import eventually
from tests.kit.leaks import cgroups_naming, mounts_naming, processes_naming

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("conmon", "crun", "busybox"))),
    reason="needs root, conmon, crun and busybox",
)

FOREVER = ("/bin/sh", "-c", "echo begun; exec sleep 4242")


@dataclass
class HostRootfs:
    """The same few programs for each container."""

    root: Path

    def __post_init__(self) -> None:
        binaries = self.root / "bin"
        if not binaries.exists():
            binaries.mkdir(parents=True)
            shutil.copy(cast(str, shutil.which("busybox")), binaries / "busybox")
            for name in ("sh", "sleep", "cat", "echo", "true"):
                (binaries / name).symlink_to("busybox")

    async def up(
        self,
        key: str,
        chain_ids: Sequence[str],
        target: Path,
        ids: IdMap | None = None,
        plain: Sequence[str] = (),
    ) -> Rootfs:
        mounts.bind(self.root, target)
        return HostTree(path=str(target))

    def read(self, rootfs: Rootfs, name: str, limit: int) -> bytes:
        return read_beneath(Path(rootfs.path), name, limit)

    async def down(self, key: str, target: Path) -> None:
        mounts.unmount_tree(target)

    def usage(self, key: str) -> Usage:
        return Usage(bytes=0, inodes=0)

    def keys(self) -> Collection[str]:
        return ()


@dataclass
class ProcessHost:
    """A host with real cgroups, conmon and crun. Networks are fakes; every image has the same root."""

    root: Path

    def build(self) -> BuiltDaemon:
        """Build a daemon that runs pods without a VM, and start nothing."""
        config = Config(
            root=str(self.root),
            run=str(self.root / "run"),
            socket=str(self.root / "husk.sock"),
            cgroup_root=f"/{self.root.name}",
            metrics=Metrics(port=0),
        )
        return build(
            config,
            Overrides(
                handlers={"": msgspec.structs.replace(HANDLER, host_pods="process")},
                networks=cast(Networks, FakeNetworks(Ledger())),
                find_image=find_image,
                rootfs=HostRootfs(self.root / "image"),
            ),
        )


class Daemon(RestartableDaemon):
    """One daemon after the other on this machine."""

    def __init__(self, root: Path) -> None:
        super().__init__(ProcessHost(root))

    @property
    def engine(self) -> Engine:
        """The engine of pods without a VM."""
        return self.engines.for_isolation(Isolation.PROCESS)

    def assert_empty(self) -> None:
        """Assert that nothing of a pod is left on this machine."""
        assert cgroups_naming(self.root.name) == frozenset()
        assert processes_naming(str(self.root)) == frozenset()
        assert mounts_naming(str(self.root)) == frozenset()
        self.assert_no_files()


@pytest.fixture
def root() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="husk-host-pods-"))
    yield path
    assert mounts_naming(str(path)) == frozenset()
    shutil.rmtree(path)


@pytest.fixture
async def daemon(root: Path) -> AsyncIterator[Daemon]:
    daemon = Daemon(root)
    yield daemon
    for pod in list(daemon.inventory.pods.values()):
        await daemon.pods.remove(pod.id)
    await daemon.tasks.close()
    daemon.assert_empty()


def pod_spec(**fields: Any) -> PodSpec:
    return PodSpec(name="web", namespace="default", uid="u", **({"host_network": True} | fields))


def container_spec(*command: str) -> ContainerSpec:
    return ContainerSpec(name="main", image="example/web:1", command=command or FOREVER)


def _struck(original: Callable[..., Any], moment: str) -> Callable[..., Awaitable[Any]]:
    """Wrap a function so that it fails before or after its effect."""

    async def fail(*arguments: Any) -> Any:
        if moment == "after":
            made = await original(*arguments)
            if isinstance(made, Starting):
                os.close(made._report)
        raise OSError(errno.EIO, "the fault of the test")

    return fail


# --------------------------------------------------------------------------------------------- pods


@pytest.mark.parametrize(
    "fields", [{}, {"pid_mode": PidMode.NODE}, {"host_ipc": True}], ids=["network", "pid too", "ipc too"]
)
async def test_pod_started_and_removed_leaves_nothing(daemon: Daemon, fields: dict[str, Any]) -> None:
    pod = await daemon.pods.run(pod_spec(**fields))
    container = await daemon.containers.create(pod, container_spec())
    await daemon.containers.start(container)
    assert daemon.containers.find(container).state is ContainerState.RUNNING
    await daemon.pods.stop(pod)
    assert daemon.containers.find(container).exit_code == 137
    await daemon.pods.stop(pod)
    assert cgroups_naming(daemon.root.name) == frozenset()
    await daemon.pods.remove(pod)
    daemon.assert_empty()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", range(5))
async def test_failure_in_any_step_of_a_pod_undoes_all(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, number: int, moment: str
) -> None:
    step: Any = daemon.engine.pods.pod_steps[number]
    with monkeypatch.context() as patch:
        patch.setattr(type(step), "up", _struck(type(step).up, moment))
        with pytest.raises(PhaseFailed, match=f"{step.name} failed.*the fault of the test"):
            await daemon.pods.run(pod_spec())
    daemon.assert_empty()
    assert await daemon.pods.run(pod_spec()), "the name is free again"


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", range(5))
async def test_daemon_killed_in_any_step_of_a_pod_is_undone_by_the_next(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, number: int, moment: str
) -> None:
    step: Any = daemon.engine.pods.pod_steps[number]
    reached = asyncio.Event()
    up = type(step).up

    async def hang(self: Any, pod: Any) -> None:
        if moment == "after":
            await up(self, pod)
        reached.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(type(step), "up", hang)
        run = asyncio.create_task(daemon.pods.run(pod_spec()))
        await reached.wait()
        run.cancel()
        await asyncio.wait({run})
    await daemon.restart()
    daemon.assert_empty()


# --------------------------------------------------------------------------------------- containers


MOMENTS: list[tuple[Any, str, str]] = [
    (ProcessContainers, "_start", "before"),
    (conmon, "start", "after"),
    (Starting, "created", "after"),
    (conmon, "run_crun", "before"),
]
# a conmon of which the daemon has no identity is found only by the next start
FAILURES = [(owner, name, "before" if name == "start" else moment) for owner, name, moment in MOMENTS]


@pytest.mark.parametrize(
    ("owner", "name", "moment"), FAILURES, ids=lambda each: getattr(each, "__name__", each)
)
async def test_failed_container_start_leaves_nothing(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, moment: str
) -> None:
    pod = await daemon.pods.run(pod_spec())
    before = cgroups_naming(daemon.root.name)
    container = await daemon.containers.create(pod, container_spec())
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _struck(getattr(owner, name), moment))
        with pytest.raises(GuestError, match="the fault of the test"):
            await daemon.containers.start(container)
    record = daemon.containers.find(container)
    assert (record.state, record.exit_code, record.reason) == (ContainerState.EXITED, 128, "StartError")
    assert cgroups_naming(daemon.root.name) == before
    await eventually(lambda: not processes_naming(container))  # orphans are reaped a little later
    await daemon.containers.remove(container)


@pytest.mark.parametrize(
    ("owner", "name", "moment"), MOMENTS, ids=lambda each: getattr(each, "__name__", each)
)
async def test_daemon_killed_before_the_program_runs_leaves_a_startable_container(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, moment: str
) -> None:
    pod = await daemon.pods.run(pod_spec())
    container = await daemon.containers.create(pod, container_spec("/bin/sh", "-c", "echo ran; exit 5"))
    await _kill_in_start(daemon, monkeypatch, container, owner, name, moment)
    assert daemon.containers.find(container).state is ContainerState.CREATED
    await daemon.containers.start(container)
    await eventually(lambda: daemon.containers.find(container).state is ContainerState.EXITED)
    assert daemon.containers.find(container).exit_code == 5


@pytest.mark.parametrize("ends", [False, True])
async def test_daemon_killed_after_the_start_recovers_the_container(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    pod = await daemon.pods.run(pod_spec())
    command = ("/bin/sh", "-c", "exit 6") if ends else FOREVER
    container = await daemon.containers.create(pod, container_spec(*command))
    await _kill_in_start(daemon, monkeypatch, container, conmon, "run_crun", "after")
    if ends:
        await eventually(lambda: daemon.containers.find(container).state is ContainerState.EXITED)
        assert daemon.containers.find(container).exit_code == 6
    else:
        assert daemon.containers.find(container).state is ContainerState.RUNNING
        assert (await daemon.containers.exec_sync(container, ["echo", "here"], 10)).stdout == b"here\n"


async def _kill_in_start(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, container: str, owner: Any, name: str, moment: str
) -> None:
    reached = asyncio.Event()
    original = getattr(owner, name)

    async def hang(*arguments: Any) -> Any:
        if moment == "after":
            made = await original(*arguments)
            if isinstance(made, Starting):
                os.close(made._report)
        reached.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, hang)
        start = asyncio.create_task(daemon.containers.start(container))
        await asyncio.wait(
            {start, asyncio.ensure_future(reached.wait())}, return_when=asyncio.FIRST_COMPLETED
        )
        assert reached.is_set(), start
        start.cancel()
        await asyncio.wait({start})
    await daemon.restart()


@pytest.mark.parametrize("content", [b"\x0a\x02c1 of another release", b"", None])
async def test_unreadable_plan_of_a_running_container_is_compiled_again(
    daemon: Daemon, content: bytes | None
) -> None:
    pod = await daemon.pods.run(pod_spec())
    container = await daemon.containers.create(pod, container_spec())
    await daemon.containers.start(container)
    path = daemon.inventory.container(container).plan_path
    before = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    await daemon.restart()
    assert (await daemon.containers.exec_sync(container, ["echo", "here"], 10)).stdout == b"here\n"
    assert path.read_bytes() == before


async def test_exec_of_a_killed_daemon_is_ended_by_the_next(daemon: Daemon) -> None:
    pod = await daemon.pods.run(pod_spec())
    container = await daemon.containers.create(pod, container_spec())
    await daemon.containers.start(container)
    session = await daemon.containers.exec(
        container, ["sh", "-c", "echo up; sleep 4343"], tty=False, stdin=False, stdout=True, stderr=False
    )
    assert session.stdout is not None and await session.stdout.read() == b"up\n"
    await daemon.restart()
    assert processes_naming("sleep 4343") == frozenset()
    assert daemon.containers.find(container).state is ContainerState.RUNNING
    session.close()


async def test_reboot_invalidates_recorded_processes(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    pod = await daemon.pods.run(pod_spec())
    container = await daemon.containers.create(pod, container_spec())
    await daemon.containers.start(container)
    record = daemon.containers.find(container)
    assert record.process is not None and alive(record.process.supervisor)
    with monkeypatch.context() as patch:
        patch.setattr("sandbox.host.process.boot_id", lambda: "another")
        await daemon.restart()
        assert daemon.pods.find(pod).state is PodState.NOT_READY
        ended = daemon.containers.find(container)
        assert (ended.state, ended.exit_code) == (ContainerState.EXITED, 137)


async def test_processes_without_record_run_on_until_their_pod_is_removed(daemon: Daemon) -> None:
    pod = await daemon.pods.run(pod_spec())
    container = await daemon.containers.create(pod, container_spec())
    await daemon.containers.start(container)
    await daemon.tasks.close()
    for store in (daemon.root / "pods", daemon.root / "containers"):
        for file in store.iterdir():
            file.unlink()
    daemon.start()
    running = processes_naming(str(daemon.root))
    await daemon.pods.recover()
    assert processes_naming(str(daemon.root)) == running != frozenset()
    assert daemon.pods.find(pod).state is PodState.NOT_READY
    assert daemon.containers.find(container).state is ContainerState.UNKNOWN
    await daemon.pods.stop(pod)
    await eventually(lambda: not processes_naming(str(daemon.root)))
    await daemon.pods.remove(pod)
    daemon.assert_empty()


async def test_pod_whose_first_process_ended_without_a_daemon_is_not_ready(daemon: Daemon) -> None:
    pod = await daemon.pods.run(pod_spec())
    container = await daemon.containers.create(pod, container_spec())
    await daemon.containers.start(container)
    await daemon.tasks.close()
    runtime = daemon.pods.find(pod).runtime
    assert isinstance(runtime, ProcessRuntime) and runtime.init is not None
    os.kill(runtime.init.pid, signal.SIGKILL)
    await daemon.restart()
    await eventually(lambda: daemon.containers.find(container).state is ContainerState.EXITED)
    assert daemon.pods.find(pod).state is PodState.NOT_READY
    assert daemon.containers.find(container).exit_code == 137


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"envs": (("RAW", b"\xff"),)}, "RAW: the value is not UTF-8"),
        ({"security": SecuritySpec(add_capabilities=("SYS_BOOT",))}, "add_capabilities: SYS_BOOT"),
    ],
)
async def test_unavailable_request_fails_container_creation(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], problem: str
) -> None:
    few = NodeLimits(open_files=1024, capabilities=1)
    monkeypatch.setattr("sandbox.host_pods.steps.node_limits", lambda: few)
    pod = await daemon.pods.run(pod_spec())
    with pytest.raises(InvalidSpec, match=problem):
        await daemon.containers.create(pod, msgspec.structs.replace(container_spec(), **fields))
    assert list(daemon.container_store) == []


async def test_conmon_that_cannot_run_fails_the_start(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = await daemon.pods.run(pod_spec())
    container = await daemon.containers.create(pod, container_spec())

    def broken(bundle: Bundle, options: ConmonOptions) -> list[str]:
        return ["/bin/sh", "-c", "echo no such luck >&2; exit 1"]

    with monkeypatch.context() as patch:
        patch.setattr(conmon, "command", broken)
        with pytest.raises(GuestError, match="no such luck"):
            await daemon.containers.start(container)


async def test_missing_programs_are_named_before_anything_is_made(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conmon, "CRUN", "no-such-crun")
    with pytest.raises(SandboxError, match="no-such-crun was not found"):
        await daemon.pods.run(pod_spec())
    assert list(daemon.pod_store) == []


async def test_execs_cancelled_at_any_moment_of_their_start_leave_no_process(daemon: Daemon) -> None:
    pod = await daemon.pods.run(pod_spec())
    container = await daemon.containers.create(pod, container_spec())
    await daemon.containers.start(container)
    before = len(cgroup_pids(daemon))
    moments = random.Random(1)

    async def cancelled() -> None:
        running = asyncio.create_task(daemon.containers.exec_sync(container, ["sleep", "4243"], 60))
        await asyncio.sleep(moments.uniform(0, 0.3))  # the moment is under test
        running.cancel()
        await asyncio.wait({running})

    for _ in range(10):
        await asyncio.gather(*(cancelled() for _ in range(8)))
    await eventually(lambda: len(cgroup_pids(daemon)) == before)
    assert list(daemon.root.rglob("execs/*")) == []


def cgroup_pids(daemon: Daemon) -> list[int]:
    """List the processes in all cgroups of this test, each once."""
    return sorted(
        {
            int(pid)
            for directory in cgroups_naming(daemon.root.name)
            for pid in (Path(directory) / "cgroup.procs").read_text().split()
        }
    )
