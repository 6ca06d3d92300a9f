"""Every step of RunPodSandbox and CreateContainer fails, or the daemon is killed in it: everything is undone,
at once or by the next daemon, and the name is free again."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.errors import failure_of
from sandbox.engine import Engine
from sandbox.errors import GuestError, InvalidSpec, PhaseFailed, Reserved, SandboxError, WrongState
from sandbox.guest import guest_pb2 as pb
from sandbox.host.mounts import mounts_below
from sandbox.lifecycle import Joined, UndoFailed, step_names
from sandbox.records import ContainerRecord, ContainerState, PodRecord, PodState
from sandbox.spec import ContainerSpec, Handler, Isolation, MountSpec, PodSpec, SecuritySpec
from sandbox.steps.container import CompiledPlan
from sandbox.steps.pod import Netns, Network, RunDir, Shares
from sandbox.steps.rootfs import ContainerRootfs
from sandbox.vm_pods.disks import Disks
from sandbox.vm_pods.guest_mounts import GuestMounts
from sandbox.vm_pods.shared_files import HostChanges
from sandbox.vm_pods.steps import Guest, Identity, Size, Vm
from sandbox.vm_pods.volumes import Volumes
from tests.fakes.daemon import HANDLER, FakeHost, RestartableDaemon
from tests.fakes.disk import small_disk
from tests.fakes.guest import FakeAgent
from tests.kit.eventually import eventually

POD_STEPS: list[type[Any]] = [RunDir, Netns, Network, Shares, Vm, Size, Identity, Guest]
CONTAINER_STEPS: list[type[Any]] = [
    ContainerRootfs,
    GuestMounts,
    *(Disks, Volumes, HostChanges),  # joined
    CompiledPlan,
]
POD_FAULTS = ["cgroup.create", "network.prepare", "network.up", "vm.start"]


class Daemon(RestartableDaemon):
    """One daemon after the other over a host of fakes."""

    def __init__(self, root: Path, handler: Handler = HANDLER) -> None:
        self.fakes = FakeHost(root, {"": handler})
        self.ledger, self.hypervisor, self.grown = self.fakes.ledger, self.fakes.hypervisor, self.fakes.grown
        super().__init__(self.fakes)

    @property
    def engine(self) -> Engine:
        """The engine of pods in VMs."""
        return self.engines.for_isolation(Isolation.VM)

    def assert_empty(self) -> None:
        """Assert that nothing of a pod is left, on the host or in the records."""
        assert self.ledger.held == set()
        self.assert_no_files()


@pytest.fixture
def root() -> Iterator[Path]:
    # short, for the sockets in it
    path = Path(tempfile.mkdtemp(prefix="husk-faults-"))
    yield path
    assert mounts_below(path) == []
    shutil.rmtree(path)


@pytest.fixture
async def daemon(root: Path) -> AsyncIterator[Daemon]:
    daemon = Daemon(root)
    yield daemon
    daemon.ledger.faults.clear()
    for pod in list(daemon.inventory.pods.values()):
        await daemon.pods.remove(pod.id)
    await daemon.kill()


def pod_spec(name: str = "web", **fields: Any) -> PodSpec:
    return PodSpec(name=name, namespace="default", uid="u", **fields)


def container_spec(**fields: Any) -> ContainerSpec:
    return ContainerSpec(name="main", image="example/web:1", **fields)


# ------------------------------------------------------------------------------------- pods


async def test_pod_that_is_started_stopped_and_removed_leaves_nothing(daemon: Daemon) -> None:
    id = await daemon.pods.run(pod_spec())
    assert daemon.pods.find(id).state is PodState.READY
    assert len(daemon.ledger.held) == 4
    await daemon.pods.stop(id)
    await daemon.pods.stop(id)
    record = daemon.pods.find(id)
    assert record.state is PodState.NOT_READY
    assert record.network is not None and record.network.ips == ("10.1.0.2",), "the address stays known"
    assert daemon.ledger.held == set()
    await daemon.pods.remove(id)
    await daemon.pods.remove(id)
    daemon.assert_empty()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("operation", POD_FAULTS)
async def test_run_with_failing_operation_leaves_nothing_and_frees_the_name(
    daemon: Daemon, operation: str, moment: str
) -> None:
    daemon.ledger.faults[operation] = moment
    with pytest.raises(PhaseFailed) as caught:
        await daemon.pods.run(pod_spec())
    assert operation in str(caught.value)
    daemon.assert_empty()
    daemon.ledger.faults.clear()
    assert await daemon.pods.run(pod_spec()), "the name is free again"


def _struck(step: type[Any], moment: str) -> Callable[[Any, Any], Awaitable[None]]:
    """The step's `up`, with a fault before or after all of its effect."""
    up = step.up

    async def fail(self: Any, subject: Any) -> None:
        if moment == "after":
            await up(self, subject)
        raise OSError(errno.EIO, "the fault of the test")

    return fail


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", POD_STEPS, ids=lambda step: step.name)
async def test_run_with_failing_step_undoes_all_steps(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, step: type[Any], moment: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(step, "up", _struck(step, moment))
        with pytest.raises(PhaseFailed, match=f"{step.name} failed.*the fault of the test"):
            await daemon.pods.run(pod_spec())
    daemon.assert_empty()
    assert await daemon.pods.run(pod_spec()), "the name is free again"


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", CONTAINER_STEPS, ids=lambda step: step.name)
async def test_create_with_failing_step_undoes_all_steps(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: type[Any], moment: str
) -> None:
    spec = container_spec(mounts=(MountSpec(container_path="/x", host_path=str(tmp_path)),))
    id = await daemon.pods.run(pod_spec())
    held, mounted = set(daemon.ledger.held), mounts_below(daemon.root)
    with monkeypatch.context() as patch:
        patch.setattr(step, "up", _struck(step, moment))
        name = "volumes" if step in (Disks, HostChanges) else step.name
        with pytest.raises(PhaseFailed, match=f"{name} failed.*the fault of the test"):
            await daemon.containers.create(id, spec)
    assert (daemon.ledger.held, mounts_below(daemon.root)) == (held, mounted)
    assert list((daemon.root / "containers").iterdir()) == []
    assert await daemon.containers.create(id, spec), "the name is free again"


async def test_every_step_is_in_the_lists_of_this_file(daemon: Daemon) -> None:
    steps = daemon.engine.containers.container_steps
    parts = [part for step in steps for part in (step.parts if isinstance(step, Joined) else (step,))]
    assert [type(part) for part in parts] == CONTAINER_STEPS
    names = set(step_names(daemon.engine.pods.pod_steps))
    assert names == {"cgroup", *(step.name for step in POD_STEPS)}  # cgroup is in POD_FAULTS


async def test_run_with_guest_refusing_its_configuration_fails(daemon: Daemon) -> None:
    daemon.hypervisor.make_agent = _refusing("configure", "sysctl kernel.nonsense")
    with pytest.raises(PhaseFailed, match=r"identity failed.*sysctl kernel.nonsense") as caught:
        await daemon.pods.run(pod_spec())
    assert "last words" in caught.value.console
    daemon.assert_empty()


async def test_run_with_vm_ending_while_it_boots_fails(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = daemon.hypervisor.make_agent()
    agent.silent = True
    daemon.hypervisor.make_agent = lambda: agent
    run = asyncio.create_task(daemon.pods.run(pod_spec()))
    await eventually(lambda: daemon.hypervisor.vms)
    [vm] = daemon.hypervisor.vms.values()
    vm.ended.set()
    with pytest.raises(PhaseFailed, match="the VM ended"):
        await run
    daemon.assert_empty()


async def test_run_with_connection_ending_before_its_vm_names_the_vm(daemon: Daemon) -> None:
    agent = daemon.hypervisor.make_agent()
    agent.silent = True
    daemon.hypervisor.make_agent = lambda: agent
    run = asyncio.create_task(daemon.pods.run(pod_spec()))
    await eventually(lambda: agent.linked)
    [vm] = daemon.hypervisor.vms.values()
    agent.drop()
    await asyncio.sleep(0.05)
    vm.ended.set()
    with pytest.raises(PhaseFailed, match="the VM ended"):
        await run
    daemon.assert_empty()


@pytest.mark.parametrize("wrong", [1, 2])
async def test_run_with_wrong_guest_clock_boots_once_more(daemon: Daemon, wrong: int) -> None:
    agents: list[FakeAgent] = []

    def make_agent() -> FakeAgent:
        agent = FakeAgent()
        agent.now_ns = 10**18 if len(agents) < wrong else 0
        agents.append(agent)
        return agent

    daemon.hypervisor.make_agent = make_agent
    if wrong == 1:
        assert daemon.pods.find(await daemon.pods.run(pod_spec())).ready
        assert len(daemon.hypervisor.vms) == 1
    else:
        with pytest.raises(PhaseFailed, match="clock is wrong"):
            await daemon.pods.run(pod_spec())
        daemon.assert_empty()
    assert len(agents) == 2


@pytest.mark.parametrize("operation", ["cgroup.remove", "network.down", "vm.destroy"])
async def test_stop_with_failing_release_keeps_it_for_a_retry(daemon: Daemon, operation: str) -> None:
    id = await daemon.pods.run(pod_spec())
    daemon.ledger.faults[operation] = "before"
    with pytest.raises(UndoFailed, match=operation):
        await daemon.pods.stop(id)
    kept = 2 if operation == "network.down" else 1  # the plug-ins' next DEL needs the namespace
    assert len(daemon.ledger.held) == kept, "all the rest is released"
    daemon.ledger.faults.clear()
    await daemon.pods.remove(id)
    daemon.assert_empty()


async def test_run_with_name_in_use_is_refused(daemon: Daemon) -> None:
    await daemon.pods.run(pod_spec())
    with pytest.raises(Reserved, match="web_default_u_0"):
        await daemon.pods.run(pod_spec())
    assert await daemon.pods.run(pod_spec(attempt=1))


async def test_run_with_unknown_handler_is_refused_by_name(daemon: Daemon) -> None:
    with pytest.raises(InvalidSpec, match="'gpu' is not configured"):
        await daemon.pods.run(pod_spec(handler="gpu"))
    daemon.assert_empty()


async def test_vm_that_ends_makes_the_pod_not_ready(daemon: Daemon) -> None:
    id = await daemon.pods.run(pod_spec())
    container = await daemon.containers.create(id, container_spec())
    await daemon.containers.start(container)
    await daemon.hypervisor.vms[id].die()
    await eventually(lambda: daemon.pods.find(id).state is PodState.NOT_READY)
    record = daemon.containers.find(container)
    assert (record.state, record.exit_code, record.reason) == (ContainerState.EXITED, 137, "Error")


# --------------------------------------------------------------------------- kill and recover


@pytest.mark.parametrize("operation", [*POD_FAULTS, "guest"])
async def test_daemon_killed_during_run_undoes_the_pod_at_its_next_start(
    daemon: Daemon, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = asyncio.Event()

    async def hang(self: Any, pod: Any) -> None:
        stuck.set()
        await asyncio.Event().wait()

    step: type[Any] = {
        "cgroup.create": Network,  # the cgroup is made, the network is about to be
        "network.up": Shares,
        "network.prepare": Netns,
        "vm.start": Guest,
        "guest": Guest,
    }[operation]
    with monkeypatch.context() as patch:
        patch.setattr(step, "up", hang)
        run = asyncio.create_task(daemon.pods.run(pod_spec()))
        await stuck.wait()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
    assert list((daemon.root / "pods").iterdir()), "the record is there, so the next start can know"
    await daemon.restart()
    daemon.assert_empty()
    assert await daemon.pods.run(pod_spec())


async def test_restart_recovers_running_pods(daemon: Daemon) -> None:
    id = await daemon.pods.run(pod_spec())
    container = await daemon.containers.create(id, container_spec())
    await daemon.containers.start(container)
    created = await daemon.containers.create(id, ContainerSpec(name="second", image="example/web:1"))
    await daemon.restart()
    assert daemon.pods.find(id).state is PodState.READY
    assert daemon.containers.find(container).state is ContainerState.RUNNING
    agent = daemon.hypervisor.vms[id].agent
    assert [hello.epoch for hello in agent.hellos] == [1, 2]
    await daemon.containers.start(created)
    assert daemon.containers.find(created).state is ContainerState.RUNNING


async def test_exit_while_daemon_is_down_is_reported_after_restart(daemon: Daemon) -> None:
    id = await daemon.pods.run(pod_spec())
    container = await daemon.containers.create(id, container_spec())
    await daemon.containers.start(container)
    await daemon.kill()
    daemon.hypervisor.vms[id].agent.drop()
    daemon.hypervisor.vms[id].agent._greeted = False
    daemon.hypervisor.vms[id].agent.exit(container, 3)
    await daemon.restart()
    await eventually(lambda: daemon.containers.find(container).state is ContainerState.EXITED)
    assert daemon.containers.find(container).exit_code == 3


@pytest.mark.parametrize("at_ns", [-1, 0, 1, (1 << 63) - 1])
async def test_exit_time_lies_between_start_and_now_whatever_the_guest_says(
    daemon: Daemon, at_ns: int
) -> None:
    id = await daemon.pods.run(pod_spec())
    container = await daemon.containers.create(id, container_spec())
    await daemon.containers.start(container)
    daemon.hypervisor.vms[id].agent.exit(container, at_ns=at_ns)
    await eventually(lambda: daemon.containers.find(container).state is ContainerState.EXITED)
    record = daemon.containers.find(container)
    assert record.started_at_ns <= record.finished_at_ns <= time.time_ns()


async def test_vm_that_ends_while_daemon_is_down_makes_the_pod_not_ready(daemon: Daemon) -> None:
    id = await daemon.pods.run(pod_spec())
    container = await daemon.containers.create(id, container_spec())
    await daemon.containers.start(container)
    await daemon.kill()
    await daemon.hypervisor.vms[id].die()
    await daemon.restart()
    assert daemon.pods.find(id).state is PodState.NOT_READY
    assert daemon.containers.find(container).exit_code == 137
    await daemon.pods.remove(id)
    daemon.assert_empty()


async def test_lost_connection_to_the_agent_is_made_again(daemon: Daemon) -> None:
    id = await daemon.pods.run(pod_spec())
    agent = daemon.hypervisor.vms[id].agent
    agent.drop()
    await eventually(lambda: len(agent.hellos) == 2)
    container = await daemon.containers.create(id, container_spec())
    await daemon.containers.start(container)
    assert daemon.containers.find(container).state is ContainerState.RUNNING


# ------------------------------------------------------------------------------- containers


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"mounts": (MountSpec(container_path="/x", host_path="/absent/at/all"),)}, "does not exist"),
        ({"security": SecuritySpec(run_as_username="absent-user")}, "no user 'absent-user'"),
        ({"security": SecuritySpec(add_capabilities=("CAP_FLY",))}, "CAP_FLY"),
        ({"log_path": "../../etc/passwd"}, "log_path"),
        ({"stop_signal": "SIGNONSENSE"}, "SIGNONSENSE"),
    ],
)
async def test_create_with_invalid_spec_is_refused_and_leaves_nothing(
    daemon: Daemon, fields: dict[str, Any], problem: str
) -> None:
    id = await daemon.pods.run(pod_spec(log_directory="/tmp"))
    held = set(daemon.ledger.held)
    with pytest.raises(InvalidSpec, match=problem):
        await daemon.containers.create(id, container_spec(**fields))
    assert daemon.ledger.held == held
    assert list((daemon.root / "containers").iterdir()) == []
    assert await daemon.containers.create(id, container_spec()), "the name is free again"


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_create_with_failing_root_filesystem_leaves_nothing(daemon: Daemon, moment: str) -> None:
    id = await daemon.pods.run(pod_spec())
    held = set(daemon.ledger.held)
    daemon.ledger.faults["rootfs.up"] = moment
    with pytest.raises(PhaseFailed, match="rootfs failed"):
        await daemon.containers.create(id, container_spec())
    assert daemon.ledger.held == held
    assert list((daemon.root / "containers").iterdir()) == []


async def test_daemon_killed_during_create_undoes_the_container_at_its_next_start(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = await daemon.pods.run(pod_spec())
    held = set(daemon.ledger.held)
    stuck = asyncio.Event()

    async def hang(self: Any, container: Any) -> None:
        stuck.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr("sandbox.steps.container.CompiledPlan.up", hang)
        create = asyncio.create_task(daemon.containers.create(id, container_spec()))
        await stuck.wait()
        create.cancel()
        with pytest.raises(asyncio.CancelledError):
            await create
    await daemon.restart()
    assert daemon.containers.list() == []
    assert daemon.ledger.held == held


async def test_start_of_program_that_cannot_be_run_exits_with_start_error(daemon: Daemon) -> None:
    daemon.hypervisor.make_agent = _refusing("start", "exec")
    id = await daemon.pods.run(pod_spec())
    container = await daemon.containers.create(id, container_spec())
    with pytest.raises(GuestError, match="exec"):
        await daemon.containers.start(container)
    record = daemon.containers.find(container)
    assert (record.state, record.exit_code, record.reason) == (ContainerState.EXITED, 128, "StartError")
    assert "exec" in record.message
    with pytest.raises(WrongState):
        await daemon.containers.start(container)


async def test_stop_and_remove_of_unknown_ids_succeed(daemon: Daemon) -> None:
    await daemon.pods.stop("nope")
    await daemon.pods.remove("nope")
    await daemon.containers.stop("nope", 1)
    await daemon.containers.remove("nope")
    assert daemon.pods.list() == []


async def test_create_in_stopped_pod_is_refused(daemon: Daemon) -> None:
    id = await daemon.pods.run(pod_spec())
    await daemon.pods.stop(id)
    with pytest.raises(WrongState, match="not-ready"):
        await daemon.containers.create(id, container_spec())


async def test_removal_of_pod_removes_its_containers(daemon: Daemon) -> None:
    id = await daemon.pods.run(pod_spec())
    container = await daemon.containers.create(id, container_spec())
    await daemon.containers.start(container)
    await daemon.pods.remove(id)
    with pytest.raises(SandboxError):
        daemon.containers.find(container)
    daemon.assert_empty()


def _refusing(body: str, step: str) -> Callable[[], FakeAgent]:
    """Return a maker of agents that refuse every request of this kind, naming the step."""

    def make() -> FakeAgent:
        agent = FakeAgent()
        failure = pb.Reply(failure=pb.Failure(step=step, errno=2, message="No such file or directory"))
        agent.answer = lambda request: failure if request.WhichOneof("body") == body else True
        return agent

    return make


async def test_start_with_log_path_too_long_is_refused(daemon: Daemon, root: Path) -> None:
    pod = await daemon.pods.run(pod_spec(log_directory=str(root)))
    with pytest.raises(InvalidSpec, match="log_path"):
        await daemon.containers.create(pod, container_spec(log_path="a\0b"))
    container = await daemon.containers.create(pod, container_spec(log_path="x" * 300))
    with pytest.raises(InvalidSpec, match=r"log_path.*too long") as caught:
        await daemon.containers.start(container)
    assert len(str(caught.value)) < 400
    assert daemon.containers.find(container).state is ContainerState.CREATED


# ----------------------------------------------------------------------------------- a full disk


@pytest.fixture
def full_disk(root: Path) -> Iterator[Callable[[bool], None]]:
    """The pods' records lie on a separate disk; full_disk(True) fills it."""
    with small_disk(root / "pods", 64 << 10) as disk:
        filling = disk / "filling"

        def fill(full: bool) -> None:
            if not full:
                filling.unlink()
                return
            with filling.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))

        yield fill


async def test_run_on_full_disk_fails_and_frees_the_name(
    full_disk: Callable[[bool], None], daemon: Daemon
) -> None:
    full_disk(True)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as caught:
            await daemon.pods.run(pod_spec())
        failure = failure_of(caught.value)
        assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(daemon.root / "pods") in failure.message, "the message names the full filesystem"
    assert daemon.inventory.pods == {} and daemon.inventory.starting == set()
    assert daemon.ledger.held == set()
    full_disk(False)
    id = await daemon.pods.run(pod_spec())
    assert daemon.pods.find(id).ready


@pytest.mark.parametrize("writes", range(1, 6))
async def test_run_with_disk_filling_up_meanwhile_leaves_nothing(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """At any of the records that a start writes; no real disk could be filled between two of them."""
    put, left = daemon.pod_store.put, writes

    def put_a_few(record: PodRecord) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(record)

    with monkeypatch.context() as patch:
        patch.setattr(daemon.pod_store, "put", put_a_few)
        try:
            await daemon.pods.run(pod_spec())
        except (OSError, PhaseFailed):
            daemon.assert_empty()
            assert daemon.inventory.pods == {}
        else:
            assert left >= 0, "all were written"
            await daemon.pods.remove(daemon.pods.list()[0].id)
    id = await daemon.pods.run(pod_spec())
    assert daemon.pods.find(id).ready


@pytest.mark.parametrize("writes", range(5))
async def test_create_with_disk_filling_up_meanwhile_leaves_nothing(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    pod = await daemon.pods.run(pod_spec())
    put, left = daemon.container_store.put, writes

    def put_a_few(record: ContainerRecord) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(record)

    held = set(daemon.ledger.held)
    with monkeypatch.context() as patch:
        patch.setattr(daemon.container_store, "put", put_a_few)
        try:
            await daemon.containers.create(pod, container_spec())
        except (OSError, PhaseFailed):
            assert daemon.inventory.containers == {}
            assert daemon.ledger.held == held
            assert list((daemon.root / "containers").iterdir()) == []
        else:
            assert left >= 0, "all were written"
            await daemon.containers.remove(daemon.containers.list()[0].id)
    await daemon.containers.create(pod, container_spec())
