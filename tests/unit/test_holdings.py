"""What is held on a host: found by places and names, with its owner; drawn as a table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from cri.cli import ps
from network import holdings as network
from sandbox.holdings import Holding, Places, State, find_holdings
from sandbox.host import files
from sandbox.records import ContainerRecord, PodRecord, PodState
from sandbox.spec import ContainerId, ContainerSpec, ImageDefaults, PodId, PodSpec

POD, CONTAINER, OTHER = "a" * 64, "b" * 64, "c" * 64
RECORD = PodRecord(
    id=PodId(POD), spec=PodSpec(name="web", namespace="shop", uid="u"), created_at_ns=1, state=PodState.READY
)
CONTAINER_RECORD = ContainerRecord(
    id=ContainerId(CONTAINER),
    pod_id=PodId(POD),
    spec=ContainerSpec(name="main", image="i"),
    created_at_ns=1,
    image_id="",
    image_ref="",
    defaults=ImageDefaults(),
)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    root, run = tmp_path / "root", tmp_path / "run"
    for directory in (root / "pods", root / "containers", run / "pods"):
        directory.mkdir(parents=True)
    return Places(root=root, run=run, cgroup_root=f"/{tmp_path.name}", cni_conf=tmp_path / "cni")


def write(places: Places, record: PodRecord | ContainerRecord) -> Path:
    directory = "pods" if isinstance(record, PodRecord) else "containers"
    path = places.root / directory / f"{record.id}.json"
    files.write_json(path, record, checksum=True)
    return path


def states(places: Places) -> dict[tuple[str, str], State]:
    """Of the holdings in the test's own places: other daemons of this machine may have theirs."""
    own = [
        each for each in find_holdings(places) if each.kind != "cgroup" and each.state is not State.UNKNOWN
    ]
    return {(each.kind, each.container or each.pod): each.state for each in own}


def test_holdings_of_a_pod_have_its_state_and_name(places: Places) -> None:
    write(places, RECORD)
    write(places, CONTAINER_RECORD)
    (places.run / "pods" / POD).mkdir()
    (places.root / "rootfs" / f"{CONTAINER}.1").mkdir(parents=True)
    (places.root / "containers" / f"{CONTAINER}.plan").touch()
    assert states(places) == {
        ("record", POD): State.READY,
        ("record", CONTAINER): State.READY,
        ("directory", POD): State.READY,
        ("rootfs", CONTAINER): State.READY,
        ("plan", CONTAINER): State.READY,
    }
    [record] = [
        each for each in find_holdings(places) if each.container == CONTAINER and each.kind == "record"
    ]
    assert (record.owner, record.pod) == ("shop/web", POD) and record.age_s is not None


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        (PodState.WAITING, State.POOLED),
        (PodState.STARTING, State.STARTING),
        (PodState.NOT_READY, State.NOT_READY),
    ],
)
def test_state_is_that_of_the_record(places: Places, state: PodState, shown: State) -> None:
    write(places, replace(RECORD, state=state))
    assert states(places) == {("record", POD): shown}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "version", "lost", "pod lost"])
def test_pod_whose_record_cannot_be_used_is_quarantined(places: Places, damage: str) -> None:
    path = write(places, RECORD)
    write(places, CONTAINER_RECORD)
    (places.run / "pods" / POD).mkdir()
    match damage:
        case "truncated":
            path.write_bytes(path.read_bytes()[:9])
        case "flipped":
            path.write_bytes(path.read_bytes().replace(b"shop", b"shoq"))
        case "version":
            path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
        case "lost":
            path.unlink()
        case _:
            path.unlink()
            (places.run / "pods" / POD).rmdir()
    assert set(states(places).values()) == {State.QUARANTINED}
    text = "\n".join(ps.as_text(find_holdings(places)))
    assert f"crictl stopp {POD}" in text


def test_damaged_record_of_a_container_marks_the_container_alone(places: Places) -> None:
    write(places, RECORD)
    write(places, CONTAINER_RECORD).write_bytes(b"{")
    (places.run / "pods" / POD / "back" / "rootfs" / CONTAINER).mkdir(parents=True)
    assert states(places) == {
        ("record", POD): State.READY,
        ("directory", POD): State.READY,
        ("record", CONTAINER): State.QUARANTINED,
    }


def test_what_belongs_to_no_record_is_an_orphan(places: Places) -> None:
    (places.root / "rootfs" / OTHER).mkdir(parents=True)
    (places.run / "netns").mkdir()
    (places.run / "netns" / OTHER).touch()
    (places.run / "templates" / "key").mkdir(parents=True)
    assert states(places) == {
        ("rootfs", OTHER): State.ORPHAN,
        ("namespace", OTHER): State.ORPHAN,
        ("template", ""): State.SHARED,
    }


def test_process_that_husk_started_with_a_directory_of_no_pod_is_an_orphan(places: Places) -> None:
    argument = f"{places.run}/pods/{OTHER}/x"
    child = subprocess.Popen(
        [sys.executable, "-c", "input()", argument], stdin=subprocess.PIPE, env={"HUSK_PROCESS": "1"}
    )
    editor = subprocess.Popen([sys.executable, "-c", "input()", argument], stdin=subprocess.PIPE)
    try:
        found = [each for each in find_holdings(places) if each.kind == "process" and each.pod == OTHER]
        assert [(each.name, each.state) for each in found] == [(str(child.pid), State.ORPHAN)]
        assert found[0].memory_bytes and found[0].cpu_s is not None and found[0].age_s is not None
    finally:
        for process in (child, editor):
            process.communicate(b"\n")


def test_holdings_of_a_daemon_that_never_ran_are_none(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    places = Places(root=nowhere, run=nowhere, cgroup_root="/none", cni_conf=nowhere)
    assert [each for each in find_holdings(places) if each.state is not State.UNKNOWN] == []


def test_leases_are_those_of_configured_networks(tmp_path: Path) -> None:
    data = tmp_path / "leases"
    conf = {
        "cniVersion": "1.0.0",
        "name": "net",
        "plugins": [{"type": "bridge", "ipam": {"type": "host-local", "dataDir": str(data)}}],
    }
    (tmp_path / "10.conflist").write_text(json.dumps(conf))
    (data / "net").mkdir(parents=True)
    (data / "net" / "10.1.0.2").write_text(f"{POD}\neth0")
    (data / "net" / "fd00::2").write_text(f"{POD}\r\neth0")
    (data / "net" / "last_reserved_ip.0").write_text("10.1.0.2")
    (data / "net" / "lock").touch()
    found = list(network.leases(tmp_path, tmp_path / "cache"))
    assert [(Path(each.path).name, each.pod_id) for each in found] == [("10.1.0.2", POD), ("fd00::2", POD)]


HOLDING = Holding(kind="vm", name="17", pod=POD, owner="shop/web", state=State.READY)


def test_table_shows_owner_age_and_cost() -> None:
    row = replace(HOLDING, detail="qemu", age_s=7300.0, memory_bytes=3 << 20, cpu_s=1.25)
    title, line = ps.as_text([row])
    assert title.split() == list(ps.COLUMNS)
    assert line.split() == ["shop/web", "ready", "vm", "17", "2h", "3.0", "MiB", "1.2", "s", "qemu"]


def test_json_has_every_field() -> None:
    [row] = json.loads(ps.as_json([HOLDING]))
    assert row == {
        "kind": "vm",
        "name": "17",
        "pod": POD,
        "container": "",
        "owner": "shop/web",
        "state": "ready",
        "detail": "",
        "ageSeconds": None,
        "memoryBytes": None,
        "cpuSeconds": None,
    }


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (-3, "0s"), (59.9, "59s"), (60, "1m"), (7200, "2h"), (90000, "1d")]
)
def test_age_has_its_largest_unit(seconds: float, text: str) -> None:
    assert ps.age(seconds) == text
