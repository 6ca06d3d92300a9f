"""Devices of containers: those that a guest has itself, and those that CDI specifications describe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
SLEEP = ("sleep", "3600")


@pytest.fixture
def cdi(daemon: Daemon) -> Iterator[Path]:
    first, later = daemon.cdi_dirs
    for directory in (first, later):
        directory.mkdir()
    yield first
    for directory in (first, later):
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()


def describe(path: Path, devices: dict[str, dict[str, Any]], **fields: Any) -> None:
    listed = [{"name": name, "containerEdits": edits} for name, edits in devices.items()]
    path.write_text(
        json.dumps({"cdiVersion": "0.7.0", "kind": "husk.test/card", "devices": listed, **fields})
    )


def named(*names: str) -> list[api.CDIDevice]:
    return [api.CDIDevice(name=name) for name in names]


def test_cdi_device_adds_what_a_guest_supports(cri: Cri, pod: Pod, cdi: Path) -> None:
    library = scratch_dir("library")
    (library / "driver").write_text("driver of the card")
    describe(
        cdi / "card.json",
        {
            "0": {
                "env": ["CARD=0"],
                "mounts": [
                    {"hostPath": str(library), "containerPath": "/opt/card", "options": ["ro", "rbind"]}
                ],
                "deviceNodes": [{"path": "/dev/card0", "hostPath": "/dev/fuse", "permissions": "rw"}],
                "additionalGids": [4242],
            }
        },
        containerEdits={"env": ["CARDS=yes"]},
    )
    container = cri.run(pod, BUSYBOX, SLEEP, env={"CARD": "none"}, CDI_devices=named("husk.test/card=0"))
    script = (
        'echo "$CARD $CARDS"; cat /opt/card/driver; echo; id -G; stat -c %t:%T /dev/card0;'
        " touch /opt/card/x 2>&1; exec 3<>/dev/card0 && echo open"
    )
    result = cri.exec(container, "sh", "-c", script)
    assert result.code == 0, result
    first, driver, groups, numbers, readonly, opened = result.stdout.splitlines()
    assert (first, driver, numbers, opened) == ("0 yes", "driver of the card", "a:e5", "open")
    assert "4242" in groups.split()
    assert "Read-only file system" in readonly
    # and it is still so after the daemon forgot what it knew
    assert [mount.container_path for mount in cri.status(container).mounts] == ["/opt/card"]


def test_cdi_device_is_taken_from_the_later_directory_and_from_annotations(
    daemon: Daemon, cri: Cri, pod: Pod, cdi: Path
) -> None:
    describe(cdi / "card.json", {"0": {"env": ["CARD=first"]}, "1": {}})
    device = "{name: '0', containerEdits: {env: [CARD=later]}}"
    yaml = f"cdiVersion: 0.6.0\nkind: husk.test/card\ndevices: [{device}]\n"
    (daemon.cdi_dirs[1] / "card.yaml").write_text(yaml)
    annotations = {"cdi.k8s.io/plugin": "husk.test/card=0,husk.test/card=1"}
    container = cri.run(pod, BUSYBOX, SLEEP, annotations=annotations)
    assert cri.exec(container, "sh", "-c", "echo $CARD").stdout == "later\n"
    assert dict(cri.status(container).annotations) == annotations


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("husk.test/card=9", "accepted: husk.test/card=disk, husk.test/card=hook"),
        ("husk.test/card=disk", "'/dev/sda' is a device of the host"),
        ("husk.test/card=hook", "/usr/bin/hook"),
        ("card", "VENDOR/CLASS=DEVICE"),
    ],
)
def test_device_that_no_guest_has_is_rejected(cri: Cri, pod: Pod, cdi: Path, name: str, problem: str) -> None:
    hook = {"hookName": "createContainer", "path": "/usr/bin/hook"}
    describe(cdi / "card.json", {"disk": {"deviceNodes": [{"path": "/dev/sda"}]}, "hook": {"hooks": [hook]}})
    with pytest.raises(grpc.RpcError) as fault:
        cri.create(pod, BUSYBOX, SLEEP, CDI_devices=named(name))
    assert fault.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = str(fault.value.details())
    assert "CDI_devices[0].name" in details and repr(name) in details and problem in details


def test_container_makes_a_tun_interface(cri: Cri, pod: Pod) -> None:
    """Its driver is loaded as the node is opened."""
    tun = api.Device(host_path="/dev/net/tun", container_path="/dev/net/tun", permissions="rw")
    container = cri.run(pod, BUSYBOX, SLEEP, devices=[tun])
    result = cri.exec(container, "sh", "-c", "stat -c %t:%T /dev/net/tun; exec 3<>/dev/net/tun && echo open")
    assert (result.code, result.stdout) == (0, "a:c8\nopen\n"), result


def test_pod_without_vm_has_devices_of_the_host(cri: Cri, cdi: Path) -> None:
    describe(
        cdi / "card.json", {"0": {"deviceNodes": [{"path": "/dev/card", "hostPath": "/dev/loop-control"}]}}
    )
    context = api.LinuxSandboxSecurityContext(namespace_options=api.NamespaceOption(network=api.NODE))
    linux = api.LinuxPodSandboxConfig(security_context=context, cgroup_parent=cri.cgroup_parent)
    pod = cri.run_pod("host-card", linux=linux, hostname="")
    container = cri.run(pod, BUSYBOX, SLEEP, CDI_devices=named("husk.test/card=0"))
    result = cri.exec(container, "sh", "-c", "stat -c %t:%T /dev/card; exec 3</dev/card && echo open")
    assert (result.code, result.stdout) == (0, "a:ed\nopen\n"), result
