"""KVM is used when a guest really answered under it, and the answer is asked for once."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sandbox.errors import VmmError
from sandbox.host import unix_sockets
from sandbox.host.process import ProcessIdentity
from sandbox.vm_pods import accelerator
from sandbox.vm_pods.accelerator import AcceleratorChoice
from sandbox.vm_pods.boot_image import GuestImage
from sandbox.vmm import Machine, VmHandle, VmSpec
from tests.fakes.vmm import StillMachine

IMAGE = GuestImage(kernel=Path("/k"), initramfs=Path("/i"), hash="h1", kernel_version="6.1")
NOBODY = ProcessIdentity(pid=1, start_time=0, boot_id="")


class FakeMachine(StillMachine):
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
    """Its VMs echo what the guest channel says when `works`, for the CPU models named."""

    works: tuple[str, ...] = ()
    console: str = ""
    ends: str = ""
    refuses: bool = False
    name: str = "fake"
    started: list[VmSpec] = field(default_factory=list)
    destroyed: int = 0
    held: list[socket.socket] = field(default_factory=list)

    async def start(self, spec: VmSpec, taps: tuple[int, ...]) -> Machine:
        self.started.append(spec)
        if self.refuses:
            raise VmmError("no such\n  luck")
        listener = unix_sockets.listen(Path(spec.run_dir) / "agent.sock")
        self.held.append(listener)
        if spec.cpu in self.works:
            threading.Thread(target=self._echo, args=(listener,), daemon=True).start()
        handle = VmHandle(hypervisor="fake", spec=spec, vmm=NOBODY, helpers={}, channel="")
        return FakeMachine(handle, self.console, self.ends)

    def _echo(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        self.held.append(connection)
        connection.sendall(b"noise" + connection.recv(32)[16:])

    async def fingerprint(self, spec: VmSpec) -> str:
        raise NotImplementedError

    async def attach(self, handle: VmHandle) -> Machine:
        raise NotImplementedError

    async def destroy(self, spec_pod_id: str, run_dir: Path) -> None:
        self.destroyed += 1
        for each in self.held:
            each.close()
        self.held.clear()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accelerator, "SILENCE_S", 0.1)
    monkeypatch.setattr(accelerator, "BOOT_S", 0.2)
    monkeypatch.setattr(accelerator, "find_obstacle", lambda: None)


async def choose(hypervisor: FakeHypervisor, cache: Path, wanted: str = "auto") -> AcceleratorChoice:
    return await accelerator.choose(wanted, IMAGE, hypervisor, cache)


async def test_a_guest_that_answers_means_kvm(tmp_path: Path) -> None:
    hypervisor = FakeHypervisor(works=("",))
    verdict = await choose(hypervisor, tmp_path)
    assert (verdict.accelerator, verdict.cpu) == ("kvm", "")
    assert hypervisor.started[0].accelerator == "kvm"
    assert hypervisor.destroyed == 2, "before, for what a crash left, and after"
    assert not (tmp_path / "probe").exists()


async def test_the_second_cpu_model_may_do(tmp_path: Path) -> None:
    verdict = await choose(FakeHypervisor(works=("host,-arch-capabilities",)), tmp_path)
    assert (verdict.accelerator, verdict.cpu) == ("kvm", "host,-arch-capabilities")


@pytest.mark.parametrize(
    ("hypervisor", "reason"),
    [
        (FakeHypervisor(), "ran no guest code within 0.1 s"),
        (FakeHypervisor(console="Linux"), "did not answer within"),
        (FakeHypervisor(ends="QEMU ended: failed to set MSR"), "failed to set MSR"),
        (FakeHypervisor(refuses=True), "no such luck"),
    ],
)
async def test_all_else_means_emulation_with_the_reason(
    hypervisor: FakeHypervisor, reason: str, tmp_path: Path
) -> None:
    verdict = await choose(hypervisor, tmp_path)
    assert verdict.accelerator == "tcg"
    assert reason in verdict.reason
    assert len(hypervisor.started) == 2 and not (tmp_path / "probe").exists()


async def test_the_answer_is_kept_until_something_changes(tmp_path: Path) -> None:
    hypervisor = FakeHypervisor(works=("",))
    first = await choose(hypervisor, tmp_path)
    assert await choose(hypervisor, tmp_path) == first
    assert len(hypervisor.started) == 1
    other = GuestImage(kernel=IMAGE.kernel, initramfs=IMAGE.initramfs, hash="h2", kernel_version="6.1")
    await accelerator.choose("auto", other, hypervisor, tmp_path)
    assert len(hypervisor.started) == 2
    (tmp_path / "accelerator.json").write_text("{half")
    assert (await choose(hypervisor, tmp_path)).accelerator == "kvm"
    assert len(hypervisor.started) == 3


@pytest.mark.parametrize("wanted", ["kvm", "tcg"])
async def test_what_is_configured_is_not_doubted(wanted: str, tmp_path: Path) -> None:
    hypervisor = FakeHypervisor()
    assert await choose(hypervisor, tmp_path, wanted) == AcceleratorChoice(
        accelerator=wanted, reason="configured"
    )
    assert hypervisor.started == []


def test_obstacles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert "there is no" in (accelerator.find_obstacle(str(tmp_path / "kvm")) or "")
    assert "cannot be opened" in (accelerator.find_obstacle(str(tmp_path)) or "")
    assert accelerator.find_obstacle(os.devnull) is None
