"""Plans as OCI configurations, pinned: tests/golden/oci/NAME.json is what crun is given for the plan NAME.

HUSK_UPDATE_GOLDEN=1 rewrites the files.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from sandbox.capabilities import ALL
from sandbox.errors import InvalidSpec
from sandbox.host_pods.oci import NodeLimits, RuntimeEnv, compile_config, compile_process
from sandbox.plan.values import ContainerPlan, DevicePlan, ProcessPlan
from sandbox.spec import ContainerSpec, MountSpec, Propagation
from tests.unit import test_plan_golden as plans

GOLDEN = Path(__file__).parent.parent / "golden" / "oci"
LIMITS = NodeLimits(open_files=1 << 20, capabilities=ALL)
HOST_NETWORK = {"mount": "", "cgroup": "", "uts": "/proc/7/ns/uts", "ipc": "/proc/7/ns/ipc", "pid": ""}
HOST_PID = {"mount": "", "cgroup": "", "uts": "/proc/7/ns/uts", "network": "/netns/p"}
DISK = DevicePlan("/dev/vda", 254, 0, mode=0o660, type=stat.S_IFBLK)


def config(plan: ContainerPlan, namespaces: dict[str, str] | None = None, *devices: DevicePlan) -> Any:
    around = RuntimeEnv(
        shm="/run/shm",
        namespaces=namespaces or HOST_NETWORK,
        files=[f"/run/files/{number}" for number in range(len(plan.files))],
        limits=LIMITS,
        places={mount.target: f"/run/rootfs/c1{mount.target}" for mount in plan.mounts},
        devices=devices,
    )
    return compile_config(replace(plan, rootfs="/run/rootfs/c1"), around)


def on_host_pid() -> Any:
    return config(plans.confined(), HOST_PID)


def of_privileged() -> Any:
    return config(plans.privileged(), HOST_NETWORK, DISK)


MADE: dict[str, Callable[[], Any]] = {
    "usual": lambda: config(plans.usual()),
    "confined": on_host_pid,
    "privileged": of_privileged,
    "mounts": lambda: config(plans.mounts()),
}


@pytest.mark.parametrize("name", MADE)
def test_configuration_equals_its_golden_file(name: str) -> None:
    text = json.dumps(MADE[name](), indent=1, ensure_ascii=False) + "\n"
    file = GOLDEN / f"{name}.json"
    if os.environ.get("HUSK_UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


def test_every_golden_configuration_has_a_plan() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(MADE)


def test_process_with_terminal_has_console_size() -> None:
    process = ProcessPlan(argv=("sh",), tty=True, rows=50)
    assert compile_process(process, LIMITS)["consoleSize"] == {"height": 50, "width": 80}


def test_variable_that_is_not_utf8_is_rejected_by_name() -> None:
    with pytest.raises(InvalidSpec, match="RAW: the value is not UTF-8"):
        compile_process(ProcessPlan(env=(b"RAW=\xff",)), LIMITS)


def test_process_gets_no_more_than_the_daemon_has() -> None:
    limits = NodeLimits(open_files=1024, capabilities=0b11)
    process = plans.privileged().process
    found: Any = compile_process(process, limits)
    assert found["capabilities"]["effective"] == ["CAP_CHOWN", "CAP_DAC_OVERRIDE"]
    assert found["rlimits"] == [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 1024}]


@pytest.mark.parametrize(
    ("propagation", "root"),
    [
        (Propagation.PRIVATE, "rprivate"),
        (Propagation.HOST_TO_CONTAINER, "rslave"),
        (Propagation.BIDIRECTIONAL, "rshared"),
    ],
)
def test_root_propagates_what_a_mount_shares(propagation: Propagation, root: str) -> None:
    mount = MountSpec(container_path="/m", host_path="/h", propagation=propagation)
    plan = plans.start(ContainerSpec(name="c", image="i", mounts=(mount,)))
    made = config(plan)
    assert made["linux"]["rootfsPropagation"] == root
    assert next(each for each in made["mounts"] if each["destination"] == "/m")["options"][-1] == root
