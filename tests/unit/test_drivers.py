"""Finding hypervisor drivers, and handing each VM to the driver that its spec names."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from sandbox import vmm
from sandbox.errors import InvalidSpec, VmmError
from sandbox.host.process import ProcessIdentity
from sandbox.vmm import Feature, Machine, VmHandle, VmSpec
from sandbox.vmm.drivers import GROUP, Hypervisors, find_host, find_hypervisor, find_hypervisors
from tests.fakes.vmm import StillMachine

PACKAGE = '''"""A driver that is installed beside Husk."""

def make():
    return "the driver"

def make_host(fs):
    return f"its host at {fs}"
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution whose package offers itself under two names, one of which is that of a folder here."""
    (tmp_path / "other_driver.py").write_text(PACKAGE)
    metadata = tmp_path / "other_driver-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-driver\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\nother = other_driver\nqemu = other_driver\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("other_driver", None)


def test_installed_driver_is_found_by_its_entry_point(installed: Path) -> None:
    assert "other" in find_hypervisors()
    assert str(find_hypervisor("other")) == "the driver"
    assert str(find_host("other", Path("/fs"))) == "its host at /fs"


def test_folder_takes_precedence_over_an_entry_point(installed: Path) -> None:
    assert find_hypervisors().count("qemu") == 1
    assert type(find_hypervisor("qemu")).__module__ == "sandbox.vmm.qemu.driver"


def test_unknown_driver_is_rejected_with_those_that_are_known(installed: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"hypervisor: 'bhyve' is unknown; accepted: qemu.*other"):
        find_host("bhyve")


def test_installed_driver_that_cannot_be_imported_is_named_and_left_out(
    installed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (installed / "other_driver.py").write_text("raise ImportError('no such library')\n")
    with pytest.raises(InvalidSpec, match=r"'other' \(other_driver\) cannot be loaded: no such library"):
        find_host("other")
    with pytest.raises(InvalidSpec, match="other"):
        Hypervisors(["other"])
    Hypervisors()
    assert [record.levelname for record in caplog.records if "cannot be loaded" in record.message] == [
        "ERROR"
    ]


def test_protocols_of_the_seam_have_at_most_five_methods() -> None:
    for name, protocol in inspect.getmembers(vmm, inspect.isclass):
        if getattr(protocol, "_is_protocol", False) and protocol.__module__ == vmm.__name__:
            own = [each for each, value in vars(protocol).items() if inspect.isfunction(value)]
            methods = [each for each in own if not each.startswith("_")]
            assert len(methods) <= 5, f"{name}: {methods}"


# ------------------------------------------------------------------------------------- several drivers


class Recorder:
    """A driver that records its calls."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[str] = []
        self.broken = False

    def features(self, spec: VmSpec) -> Collection[Feature]:
        return {Feature.SAVE} if self.name == "one" else set()

    async def fingerprint(self, spec: VmSpec) -> str:
        return f"of {self.name}"

    async def start(self, spec: VmSpec, taps: tuple[int, ...]) -> Machine:
        self.calls.append(f"start {spec.pod_id}")
        return StillMachine()

    async def attach(self, handle: VmHandle) -> Machine:
        self.calls.append(f"attach {handle.spec.pod_id}")
        return StillMachine()

    async def destroy(self, pod_id: str, run_dir: Path) -> None:
        self.calls.append(f"destroy {pod_id}")
        if self.broken:
            raise VmmError(f"{self.name} is broken")


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> tuple[Recorder, Recorder]:
    made = Recorder("one"), Recorder("two")
    monkeypatch.setattr("sandbox.vmm.drivers.find_hypervisor", lambda name: made[("one", "two").index(name)])
    return made


def spec(name: str) -> VmSpec:
    return VmSpec(
        hypervisor=name,
        pod_id="p",
        run_dir="/r",
        kernel="/k",
        initramfs="/i",
        accelerator="x",
        memory_mib=64,
        vcpus=1,
    )


async def test_each_vm_goes_to_the_driver_of_its_spec(drivers: tuple[Recorder, Recorder]) -> None:
    one, two = drivers
    hypervisors = Hypervisors(["one", "two"])
    await hypervisors.start(spec("two"), ())
    vmm_process = ProcessIdentity(pid=1, start_time=1, boot_id="")
    handle = VmHandle(hypervisor="one", spec=spec(""), vmm=vmm_process, helpers={}, channel="")
    await hypervisors.attach(handle)
    assert (one.calls, two.calls) == (["attach p"], ["start p"])
    assert await hypervisors.fingerprint(spec("one")) == "of one"
    assert (set(hypervisors.features(spec("one"))), set(hypervisors.features(spec("two")))) == (
        {Feature.SAVE},
        set(),
    )


async def test_vm_of_an_unknown_driver_is_rejected(drivers: tuple[Recorder, Recorder]) -> None:
    for name in ("three", ""):
        with pytest.raises(InvalidSpec, match="accepted: one, two"):
            await Hypervisors(["one", "two"]).start(spec(name), ())


async def test_destroy_asks_every_driver_also_after_one_failed(drivers: tuple[Recorder, Recorder]) -> None:
    one, two = drivers
    one.broken = True
    with pytest.raises(VmmError, match="one is broken"):
        await Hypervisors(["one", "two"]).destroy("p", Path("/r"))
    assert (one.calls, two.calls) == (["destroy p"], ["destroy p"])
