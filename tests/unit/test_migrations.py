"""Records that earlier versions wrote: tests/golden/records has one of each, written by their daemons."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from sandbox.host.process import ProcessIdentity
from sandbox.migrations import TooNew, migrate
from sandbox.records import (
    VERSION,
    ContainerRecord,
    ContainerState,
    HostProcess,
    PodRecord,
    PodState,
    ProcessRuntime,
    Source,
    VmRuntime,
)
from sandbox.spec import Isolation, PidMode, VmSize
from sandbox.store import Store

GOLDEN = Path(__file__).parents[1] / "golden" / "records"
BOOT = "196999e7-a468-4e08-80ad-8539b8b2fa64"


def golden(name: str) -> dict[str, object]:
    found = json.loads((GOLDEN / name).read_text())
    assert isinstance(found, dict)
    return found


def load_pod(directory: Path, name: str) -> PodRecord:
    """Load a golden file as the daemon does, by its id."""
    record = golden(name)
    (directory / f"{record['id']}.json").write_text((GOLDEN / name).read_text())
    store = Store(directory, PodRecord)
    store.load()
    assert store.quarantined == {}
    return next(iter(store))


def load_container(directory: Path, name: str) -> ContainerRecord:
    record = golden(name)
    (directory / f"{record['id']}.json").write_text((GOLDEN / name).read_text())
    store = Store(directory, ContainerRecord)
    store.load()
    assert store.quarantined == {}
    return next(iter(store))


def test_every_version_has_golden_files() -> None:
    versions = {int(path.name.removeprefix("v").partition("-")[0]) for path in GOLDEN.glob("v*.json")}
    assert versions == set(range(1, VERSION + 1))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("v*.json")), ids=lambda path: path.stem)
def test_migrate_of_a_golden_file_gives_this_version_and_changes_no_argument(path: Path) -> None:
    before = json.loads(path.read_text())
    kind = "pod" if "-pod-" in path.name else "container"
    argument = copy.deepcopy(before)
    assert migrate(kind, argument)["version"] == VERSION
    assert argument == before


def test_pod_in_vm_of_version_1(tmp_path: Path) -> None:
    record = load_pod(tmp_path, "v1-pod-vm.json")
    assert (record.version, record.state, record.isolation) == (VERSION, PodState.READY, Isolation.VM)
    assert record.spec.labels == {"app": "web"} and record.spec.annotations == {"note": "é"}
    assert record.steps[0] == "run-dir" and record.steps[-1] == "guest"
    assert record.network is not None and record.network.ips == ("10.1.0.2",)
    assert len(record.phases) == 15 and record.resources.memory_limit == 300 << 20
    runtime = record.runtime
    assert isinstance(runtime, VmRuntime)
    assert runtime.size == VmSize(memory_mib=428, vcpus=2)
    assert (runtime.source, runtime.accelerator, runtime.options) == (Source.BOOT, "tcg", {})
    assert (len(runtime.token), runtime.epoch, runtime.guest_kernel) == (16, 1, "0.0-fake")
    handle = runtime.handle
    assert handle is not None and handle == record.vm_handle
    assert handle.vmm == ProcessIdentity(pid=4, start_time=1, boot_id="boot")
    spec = handle.spec
    assert (spec.hypervisor, spec.options, spec.max_nics) == ("fake", {"machine": "q35"}, 5)
    assert (spec.memory_mib, spec.max_memory_mib, spec.vcpus, spec.max_vcpus) == (428, 4012, 2, 4)
    assert [share.tag for share in spec.shares] == ["rootfs", "volumes"]


def test_cpu_model_of_version_1_becomes_an_option() -> None:
    record = golden("v1-pod-vm.json")
    record["cpu"] = "host,-arch-capabilities"
    handle = record["vm"]
    assert isinstance(handle, dict)
    handle["spec"] = {**handle["spec"], "cpu": "host,-arch-capabilities", "ports": 2}
    runtime = migrate("pod", record)["runtime"]
    assert isinstance(runtime, Mapping)
    assert runtime["options"] == {"cpu": "host,-arch-capabilities"}
    spec = runtime["handle"]["spec"]
    assert spec["options"] == {"machine": "q35", "cpu": "host,-arch-capabilities"}
    assert "max_nics" not in spec, "both ports were for shares"


def test_pod_without_vm_of_version_1(tmp_path: Path) -> None:
    record = load_pod(tmp_path, "v1-pod-process.json")
    assert (record.version, record.isolation) == (VERSION, Isolation.PROCESS)
    assert record.spec.pid_mode is PidMode.POD and record.spec.host_network
    assert record.runtime == ProcessRuntime(
        init=ProcessIdentity(pid=943, start_time=266856, boot_id=BOOT),
        holder=ProcessIdentity(pid=942, start_time=266854, boot_id=BOOT),
    )
    assert record.vm_handle is None


def test_container_of_version_1(tmp_path: Path) -> None:
    record = load_container(tmp_path, "v1-container.json")
    assert (record.version, record.state, record.rootfs) == (VERSION, ContainerState.RUNNING, None)
    assert record.spec.envs == (("A", b"\xff"),)
    assert record.log_path.endswith("/main/0.log") and record.log.inode == 10014125
    assert (record.user.uid, record.user.groups, record.steps) == (1000, (0,), ("rootfs", "volumes", "plan"))


def test_container_without_vm_of_version_1(tmp_path: Path) -> None:
    record = load_container(tmp_path, "v1-container-process.json")
    assert record.process == HostProcess(
        supervisor=ProcessIdentity(pid=947, start_time=266861, boot_id=BOOT),
        init=ProcessIdentity(pid=951, start_time=266867, boot_id=BOOT),
    )


@pytest.mark.parametrize("record", [[], None, "x", 1, {"version": 0}, {"version": None}, {"vm": 7}])
def test_migrate_of_no_record_raises_value_error(record: object) -> None:
    with pytest.raises(ValueError, match=r"expected|version"):
        migrate("pod", record)


def test_migrate_of_a_newer_version_raises_too_new() -> None:
    with pytest.raises(TooNew, match=f"version {VERSION + 1}; this Husk reads versions 1 to {VERSION}"):
        migrate("container", {"version": VERSION + 1})
