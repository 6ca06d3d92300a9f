"""An accelerator is chosen when a guest answered under it, and the trial is made once."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sandbox.errors import InvalidSpec, VmmError
from sandbox.host import unix_sockets
from sandbox.host.findings import HostCheck
from sandbox.host.process import ProcessIdentity
from sandbox.vm_pods import accelerator
from sandbox.vm_pods.accelerator import AcceleratorChoice, Prober
from sandbox.vm_pods.boot_image import GuestImage
from sandbox.vmm import Candidate, Feature, Machine, VmHandle, VmSpec
from sandbox.vmm.qemu.host import QemuHost, find_obstacle
from tests.fakes.vmm import StillMachine

IMAGE = GuestImage(kernel=Path("/k"), initramfs=Path("/i"), hash="h1", kernel_version="6.1")
NOBODY = ProcessIdentity(pid=1, start_time=0, boot_id="")


class FakeMachine(StillMachine):
    """Prints `console`, and exits with the reason `ends`, unless that is empty."""

    def __init__(self, handle: VmHandle, console: str, ends: str) -> None:
        self.handle = handle
        self._console = console
        self._ends = ends

    async def wait(self) -> str:
        if not self._ends:
            await asyncio.Event().wait()
        return self._ends

    def console_tail(self) -> str:
        return self._console


@dataclass
class FakeHypervisor:
    """Its VMs echo the preamble of the guest channel for the CPU models in `works`."""

    works: tuple[str, ...] = ()
    console: str = ""
    ends: str = ""
    refuses: bool = False
    started: list[VmSpec] = field(default_factory=list)
    destroyed: int = 0
    held: list[socket.socket] = field(default_factory=list)

    def features(self, spec: VmSpec) -> Collection[Feature]:
        raise NotImplementedError

    async def start(self, spec: VmSpec, taps: tuple[int, ...]) -> Machine:
        self.started.append(spec)
        if self.refuses:
            raise VmmError("no such\n  luck")
        path = Path(spec.run_dir) / "agent.sock"
        listener = unix_sockets.listen(path)
        self.held.append(listener)
        if spec.options.get("cpu", "") in self.works:
            threading.Thread(target=self._echo, args=(listener,), daemon=True).start()
        handle = VmHandle(hypervisor="fake", spec=spec, vmm=NOBODY, helpers={}, channel=f"serial:{path}")
        return FakeMachine(handle, self.console, self.ends)

    def _echo(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        self.held.append(connection)
        connection.sendall(b"noise" + connection.recv(32)[16:])

    async def fingerprint(self, spec: VmSpec) -> str:
        raise NotImplementedError

    async def attach(self, handle: VmHandle) -> Machine:
        raise NotImplementedError

    async def destroy(self, pod_id: str, run_dir: Path) -> None:
        self.destroyed += 1
        for each in self.held:
            each.close()
        self.held.clear()


@dataclass
class FakeHost:
    """A host with QEMU's candidates, whatever this machine has."""

    program: str = "1.0"
    obstacle: str = ""

    def check(self, accelerator: str, options: Mapping[str, str]) -> None:
        raise NotImplementedError

    async def version(self) -> str:
        return self.program

    def candidates(self) -> Sequence[Candidate]:
        if self.obstacle:
            return (Candidate(accelerator="tcg", reason=self.obstacle, trial=False),)
        return (
            Candidate(accelerator="kvm"),
            Candidate(accelerator="kvm", options={"cpu": "host,-arch-capabilities"}),
            Candidate(accelerator="tcg", reason="no guest runs under KVM", trial=False),
        )

    def checks(self) -> Sequence[HostCheck]:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "SILENCE_S", 0.1)
    monkeypatch.setattr(accelerator, "BOOT_S", 0.2)


async def choose(
    hypervisor: FakeHypervisor,
    cache: Path,
    wanted: str = "auto",
    image: GuestImage = IMAGE,
    host: FakeHost | None = None,
) -> AcceleratorChoice:
    return await Prober("fake", host or FakeHost(), hypervisor, cache).choose(wanted, image)


async def test_auto_with_guest_that_answers_chooses_kvm(tmp_path: Path) -> None:
    hypervisor = FakeHypervisor(works=("",))
    choice = await choose(hypervisor, tmp_path)
    assert (choice.accelerator, choice.options) == ("kvm", {})
    assert hypervisor.started[0].accelerator == "kvm" and hypervisor.started[0].hypervisor == "fake"
    assert hypervisor.destroyed == 2, "before, for what a crash left, and after"
    assert not (tmp_path / "probe-fake").exists()


async def test_auto_with_second_cpu_model_that_works_chooses_kvm_with_it(tmp_path: Path) -> None:
    choice = await choose(FakeHypervisor(works=("host,-arch-capabilities",)), tmp_path)
    assert (choice.accelerator, choice.options) == ("kvm", {"cpu": "host,-arch-capabilities"})
    assert "KVM with cpu host,-arch-capabilities" in choice.reason


@pytest.mark.parametrize(
    ("hypervisor", "reason"),
    [
        (FakeHypervisor(), "ran no guest code within 0.1 s"),
        (FakeHypervisor(console="Linux"), "did not answer within"),
        (FakeHypervisor(ends="QEMU exited: failed to set MSR"), "failed to set MSR"),
        (FakeHypervisor(refuses=True), "no such luck"),
    ],
)
async def test_auto_with_failed_trials_chooses_emulation_with_the_reason(
    hypervisor: FakeHypervisor, reason: str, tmp_path: Path
) -> None:
    choice = await choose(hypervisor, tmp_path)
    assert choice.accelerator == "tcg"
    assert reason in choice.reason and "no guest runs under KVM" in choice.reason
    assert len(hypervisor.started) == 2 and not (tmp_path / "probe-fake").exists()


async def test_auto_with_an_obstacle_boots_nothing(tmp_path: Path) -> None:
    hypervisor = FakeHypervisor(works=("",))
    choice = await choose(hypervisor, tmp_path, host=FakeHost(obstacle="there is no /dev/kvm"))
    assert (choice.accelerator, choice.reason) == ("tcg", "there is no /dev/kvm")
    assert hypervisor.started == [] and list(tmp_path.iterdir()) == []


async def test_choice_is_cached_until_image_version_or_file_changes(tmp_path: Path) -> None:
    hypervisor = FakeHypervisor(works=("",))
    first = await choose(hypervisor, tmp_path)
    assert await choose(hypervisor, tmp_path) == first
    assert len(hypervisor.started) == 1
    other = GuestImage(kernel=IMAGE.kernel, initramfs=IMAGE.initramfs, hash="h2", kernel_version="6.1")
    await choose(hypervisor, tmp_path, image=other)
    assert len(hypervisor.started) == 2
    (tmp_path / "accelerator-fake.json").write_text("{half")
    assert (await choose(hypervisor, tmp_path)).accelerator == "kvm"
    assert len(hypervisor.started) == 3
    await choose(hypervisor, tmp_path, host=FakeHost(program="1.1"))
    assert len(hypervisor.started) == 4


async def test_trial_that_a_crash_interrupted_is_taken_down_first(tmp_path: Path) -> None:
    left = tmp_path / "probe-fake"
    left.mkdir()
    (left / "agent.sock").write_text("of the trial before")
    assert (await choose(FakeHypervisor(works=("",)), tmp_path)).accelerator == "kvm"
    assert not left.exists()


async def test_cancelled_trial_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "SILENCE_S", 60.0)
    hypervisor = FakeHypervisor()
    choosing = asyncio.create_task(choose(hypervisor, tmp_path))
    while not hypervisor.started:
        await asyncio.sleep(0.002)
    choosing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await choosing
    assert hypervisor.destroyed == 2 and not (tmp_path / "probe-fake").exists()


@pytest.mark.parametrize("wanted", ["kvm", "tcg"])
async def test_configured_accelerator_is_chosen_without_a_trial(wanted: str, tmp_path: Path) -> None:
    hypervisor = FakeHypervisor()
    assert await choose(hypervisor, tmp_path, wanted) == AcceleratorChoice(
        accelerator=wanted, reason="configured"
    )
    assert hypervisor.started == []


# ------------------------------------------------------------------------------- QEMU's candidates


def test_obstacle_is_a_device_that_is_missing_or_cannot_be_opened(tmp_path: Path) -> None:
    assert "there is no" in (find_obstacle(str(tmp_path / "kvm")) or "")
    assert "cannot be opened" in (find_obstacle(str(tmp_path)) or "")
    assert find_obstacle(os.devnull) is None


def test_qemu_without_kvm_has_emulation_as_its_only_candidate(tmp_path: Path) -> None:
    (only,) = QemuHost(tmp_path).candidates()
    assert (only.accelerator, only.trial) == ("tcg", False)
    assert "there is no" in only.reason


def test_qemu_with_kvm_tries_two_cpu_models_before_emulation(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kvm").symlink_to(os.devnull)
    *trials, last = QemuHost(tmp_path).candidates()
    assert [(each.accelerator, dict(each.options)) for each in trials] == [
        ("kvm", {}),
        ("kvm", {"cpu": "host,-arch-capabilities"}),
    ]
    assert all(each.trial for each in trials) and (last.accelerator, last.trial) == ("tcg", False)


@pytest.mark.parametrize(
    ("accelerator", "options", "field"),
    [
        ("xen", {}, "accelerator"),
        ("auto", {"bios": "x"}, "options.bios"),
        ("kvm", {"machine": "q35,accel=kvm"}, "options.machine"),
    ],
)
def test_settings_that_qemu_does_not_know_are_rejected(
    accelerator: str, options: dict[str, str], field: str
) -> None:
    with pytest.raises(InvalidSpec) as refused:
        QemuHost().check(accelerator, options)
    assert refused.value.field == field


def test_settings_that_qemu_knows_are_accepted() -> None:
    for name in ("auto", "kvm", "tcg"):
        QemuHost().check(name, {"machine": "pc", "cpu": "host,-arch-capabilities"})
