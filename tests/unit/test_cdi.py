"""CDI: files, names, which specification counts, and which edits a VM supports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sandbox.errors import InvalidSpec
from sandbox.plan.cdi import SpecBroken, apply, gather, parse
from sandbox.spec import CdiRequest, ContainerSpec, DeviceSpec, MountSpec, Propagation, SecuritySpec
from sandbox.steps.cdi_files import with_devices

FIELD = "config.CDI_devices[0].name"


def described(edits: dict[str, Any], common: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "cdiVersion": "0.7.0",
        "kind": "vendor.test/gpu",
        "devices": [{"name": "0", "containerEdits": edits}],
        "containerEdits": common or {},
    } | fields


def container(*names: str, **fields: Any) -> ContainerSpec:
    requests = tuple(
        CdiRequest(name=name, field=f"config.CDI_devices[{number}].name") for number, name in enumerate(names)
    )
    return ContainerSpec(name="c", image="i", cdi_devices=requests, **fields)


def applied(tree: dict[str, Any], spec: ContainerSpec | None = None) -> ContainerSpec:
    found = gather([[("/etc/cdi/a.json", parse(json.dumps(tree).encode(), "a.json"))]])
    return apply(spec or container("vendor.test/gpu=0"), found)


# ------------------------------------------------------------------------------------- the file

YAML = b"""
cdiVersion: "0.6.0"
kind: vendor.test/gpu
annotations: {a: b}
devices:
- name: "0"
  annotations: {c: d}
  containerEdits:
    deviceNodes:
    - {path: /dev/gpu0, hostPath: /dev/null, type: c, major: 1, minor: 3, fileMode: 0660, permissions: rw}
"""


def test_yaml_specification_is_parsed_like_json() -> None:
    spec = parse(YAML, "a.yaml")
    assert (spec.kind, spec.devices[0].name, spec.annotations) == ("vendor.test/gpu", "0", {"a": "b"})
    (node,) = spec.devices[0].container_edits.device_nodes
    assert (node.path, node.host_path, node.permissions) == ("/dev/gpu0", "/dev/null", "rw")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "object"),
        (described({}, cdiVersion="9.0.0"), "cdiVersion '9.0.0' is not known"),
        (described({}, kind="vendor"), "kind 'vendor' is not VENDOR/CLASS"),
        (described({}, kind="1vendor/class"), "not VENDOR/CLASS"),
        (described({}, devices=[{"name": "a/b", "containerEdits": {}}]), "'a/b' is not a device's name"),
        (described({}, devices=[{"name": "a", "containerEdits": {}}] * 2), "described twice"),
        (described({}, devices=[{"name": "a"}]), "containerEdits"),
        (described({"surprise": 1}), "surprise"),
        (described({"env": "A=b"}), "env"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.yaml"])
def test_invalid_specification_is_rejected(data: bytes | dict[str, Any], problem: str, name: str) -> None:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    with pytest.raises(SpecBroken, match=problem):
        parse(raw, name)


# ------------------------------------------------------------------------------------- the edits


def test_edits_that_a_vm_supports_are_added() -> None:
    edits = {
        "env": ["A=new", "B=x=y"],
        "mounts": [
            {"hostPath": "/opt/lib", "containerPath": "/usr/lib/gpu", "options": ["ro", "nosuid", "rbind"]},
            {
                "hostPath": "/opt/var",
                "containerPath": "/var/gpu",
                "options": ["rw", "rslave"],
                "type": "bind",
            },
        ],
        "deviceNodes": [
            {"path": "/dev/gpu", "hostPath": "/dev/fuse", "permissions": "rw"},
            {"path": "/dev/null"},
        ],
        "additionalGids": [7, 0, 8],
    }
    before = container(
        "vendor.test/gpu=0",
        envs=(("A", b"old"), ("C", b"c")),
        mounts=(MountSpec(container_path="/m", host_path="/m"),),
        security=SecuritySpec(supplemental_groups=(8, 9)),
    )
    after = applied(described(edits, {"env": ["D=of all"]}), before)
    assert dict(after.envs) == {"A": b"new", "B": b"x=y", "C": b"c", "D": b"of all"}
    assert after.mounts == (
        *before.mounts,
        MountSpec(container_path="/usr/lib/gpu", host_path="/opt/lib", readonly=True, options=("nosuid",)),
        MountSpec(container_path="/var/gpu", host_path="/opt/var", propagation=Propagation.HOST_TO_CONTAINER),
    )
    assert after.devices == (
        DeviceSpec(container_path="/dev/gpu", host_path="/dev/fuse", permissions="rw"),
        DeviceSpec(container_path="/dev/null", host_path="/dev/null"),
    )
    assert after.security.supplemental_groups == (8, 9, 7)


def test_edits_common_to_a_file_are_added_once() -> None:
    one = {"containerEdits": {"mounts": [{"hostPath": "/a", "containerPath": "/a"}]}}
    tree = described({}, {"mounts": [{"hostPath": "/b", "containerPath": "/b"}]})
    tree["devices"] = [{"name": "0", **one}, {"name": "1", **one}]
    names = ("vendor.test/gpu=0", "vendor.test/gpu=1", "vendor.test/gpu=0")
    after = applied(tree, container(*names))
    assert [mount.host_path for mount in after.mounts] == ["/b", "/a", "/a"]


@pytest.mark.parametrize(
    ("edits", "problem"),
    [
        ({"deviceNodes": [{"path": "/dev/nvidia0"}]}, "'/dev/nvidia0' is a device of the host"),
        ({"deviceNodes": [{"path": "x", "hostPath": "/dev/null"}]}, "no absolute path"),
        ({"deviceNodes": [{"path": "/dev/null", "permissions": "rx"}]}, "'rx'"),
        ({"hooks": [{"hookName": "createContainer", "path": "/usr/bin/hook"}]}, "hooks .*/usr/bin/hook"),
        ({"intelRdt": {"closID": "x"}}, "intelRdt"),
        ({"netDevices": [{"hostInterfaceName": "eth9", "name": "x"}]}, "netDevices"),
        ({"env": ["NONE"]}, "'NONE' is not NAME=VALUE"),
        ({"additionalGids": [2**32 - 1]}, "4294967295 is not a valid id"),
        ({"additionalGIDs": [-1]}, "-1 is not a valid id"),
        ({"mounts": [{"hostPath": "t", "containerPath": "/t"}]}, "does not have an absolute path"),
        ({"mounts": [{"hostPath": "/t", "containerPath": "/t", "type": "tmpfs"}]}, "of type 'tmpfs'"),
        ({"mounts": [{"hostPath": "/t", "containerPath": "/t", "options": ["sync"]}]}, "option 'sync'"),
        ({"mounts": [{"hostPath": "/t", "containerPath": "/t", "options": ["rshared"]}]}, "not privileged"),
    ],
)
@pytest.mark.parametrize("common", [False, True])
def test_unsupported_edits_are_rejected_with_device_and_field(
    edits: dict[str, Any], problem: str, common: bool
) -> None:
    tree = described({}, edits) if common else described(edits)
    with pytest.raises(InvalidSpec, match=problem) as caught:
        applied(tree)
    assert caught.value.field == FIELD
    assert "'vendor.test/gpu=0'" in caught.value.problem


def test_pod_without_vm_gets_device_of_host() -> None:
    tree = described({"deviceNodes": [{"path": "/dev/card", "hostPath": "/dev/dri/card0"}]})
    found = gather([[("/etc/cdi/a.json", parse(json.dumps(tree).encode(), "a.json"))]])
    given = apply(container("vendor.test/gpu=0"), found, in_vm=False)
    assert given.devices == (DeviceSpec(container_path="/dev/card", host_path="/dev/dri/card0"),)


@pytest.mark.parametrize("name", ["gpu", "vendor.test/gpu", "vendor.test/gpu=", "=0", "v/c=a/b", ""])
def test_malformed_device_name_is_rejected(name: str) -> None:
    with pytest.raises(InvalidSpec, match="not the name of a CDI device") as caught:
        applied(described({}), container(name))
    assert caught.value.field == FIELD


# -------------------------------------------------------------------------------- the directories


@pytest.fixture
def dirs(tmp_path: Path) -> tuple[Path, Path, Path]:
    etc, run = tmp_path / "etc", tmp_path / "run"
    for directory in (etc, run):
        directory.mkdir()
    return etc, run, tmp_path / "absent"


def write(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree))


def marked(text: str) -> dict[str, Any]:
    return described({"env": [f"FROM={text}"]})


def test_device_in_two_directories_is_taken_from_the_later(dirs: tuple[Path, Path, Path]) -> None:
    etc, run, _ = dirs
    write(etc / "a.json", marked("etc"))
    requesting = container("vendor.test/gpu=0")
    assert dict(with_devices(requesting, dirs).envs) == {"FROM": b"etc"}
    write(run / "b.yaml", marked("run"))
    assert dict(with_devices(requesting, dirs).envs) == {"FROM": b"run"}
    assert dict(with_devices(requesting, (run, etc)).envs) == {"FROM": b"etc"}


def test_device_twice_in_one_directory_is_rejected(dirs: tuple[Path, Path, Path]) -> None:
    etc, run, _ = dirs
    for name in ("a.json", "b.json", "c.json"):
        write(etc / name, marked(name))
    with pytest.raises(InvalidSpec, match=r"both .*/a\.json and .*/c\.json describe it"):
        with_devices(container("vendor.test/gpu=0"), dirs)
    write(run / "a.json", marked("run"))
    assert dict(with_devices(container("vendor.test/gpu=0"), dirs).envs) == {"FROM": b"run"}


def test_unknown_device_is_rejected_with_known_names_and_broken_files(
    dirs: tuple[Path, Path, Path],
) -> None:
    etc, run, _ = dirs
    write(etc / "a.json", described({}))
    (run / "broken.json").write_text("{")
    (run / "other.txt").write_text("no specification")
    (run / "folder.json").mkdir()
    with pytest.raises(InvalidSpec) as caught:
        with_devices(container("vendor.test/gpu=1"), dirs)
    assert caught.value.field == FIELD
    assert "no CDI specification of this node describes it" in caught.value.problem
    assert f"{run / 'broken.json'}: cannot be read" in caught.value.problem
    assert caught.value.accepted == "vendor.test/gpu=0"
    assert "other.txt" not in str(caught.value) and "folder" not in str(caught.value)
    with pytest.raises(InvalidSpec, match="none: this node has no CDI devices"):
        with_devices(container("vendor.test/gpu=1"), ())


def test_error_names_twenty_devices_and_files_too_large(dirs: tuple[Path, Path, Path]) -> None:
    etc, run, _ = dirs
    devices = [{"name": str(number), "containerEdits": {}} for number in range(30)]
    write(etc / "a.json", described({}, devices=devices))
    (run / "large.json").write_bytes(bytes(5 << 20))
    with pytest.raises(InvalidSpec, match=r"and 10 more$") as caught:
        with_devices(container("vendor.test/gpu=x"), dirs)
    assert "large.json: is larger than 4 MiB" in caught.value.problem


def test_mount_of_missing_source_is_rejected(dirs: tuple[Path, Path, Path]) -> None:
    edits = {"mounts": [{"hostPath": str(dirs[2]), "containerPath": "/x"}]}
    write(dirs[0] / "a.json", described(edits))
    with pytest.raises(InvalidSpec, match=r"vendor\.test/gpu=0.*absent' does not exist"):
        with_devices(container("vendor.test/gpu=0"), dirs)
