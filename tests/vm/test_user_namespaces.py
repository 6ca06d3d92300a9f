"""Pods with a user namespace: whose files are whose, inside the container and on the host."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.kit.atomic_writer import write_volume
from tests.kit.cri import Cri, Pod
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
MEET = f"{HOST}/husk/meet:1"
SLEEP = ("sleep", "3600")
BASE, LENGTH = 70000, 65536


def ids() -> list[api.IDMapping]:
    return [api.IDMapping(container_id=0, host_id=BASE, length=LENGTH)]


def options() -> api.NamespaceOption:
    space = api.UserNamespace(mode=api.POD, uids=ids(), gids=ids())
    return api.NamespaceOption(pid=api.CONTAINER, userns_options=space)


def linux(**fields: object) -> api.LinuxContainerConfig:
    security = api.LinuxContainerSecurityContext(namespace_options=options(), **fields)  # type: ignore[arg-type]
    return api.LinuxContainerConfig(security_context=security)


@pytest.fixture(scope="module")
def pod(cri: Cri) -> Pod:
    security = api.LinuxSandboxSecurityContext(namespace_options=options())
    return cri.run_pod("shifted", linux=api.LinuxPodSandboxConfig(security_context=security))


def test_user_namespaces_are_offered_and_reported(cri: Cri, pod: Pod) -> None:
    (handler,) = [each for each in cri.call("Status").runtime_handlers if not each.name]
    assert handler.features.user_namespaces
    reported = cri.pod_status(pod).status.linux.namespaces.options.userns_options
    assert (reported.mode, reported.uids[0].host_id) == (api.POD, BASE)


def test_ids_and_image_files_are_mapped(cri: Cri, pod: Pod) -> None:
    container = cri.run(pod, BUSYBOX, SLEEP, linux=linux())
    assert cri.exec(container, "cat", "/proc/self/uid_map").stdout.split() == ["0", str(BASE), str(LENGTH)]
    owners = cri.exec(container, "stat", "-c", "%u:%g", "/", "/bin/busybox", "/etc/hosts", "/dev/null").stdout
    assert owners.split() == ["0:0"] * 4
    assert cri.exec(container, "sh", "-c", "echo mine >/etc/own && stat -c %u /etc/own").stdout == "0\n"
    # a user of the image, by name
    worker = cri.run(pod, BUSYBOX, SLEEP, linux=linux(run_as_username="worker"))
    assert cri.exec(worker, "sh", "-c", "touch /tmp/x; stat -c %u /tmp/x; id -u").stdout == "1000\n1000\n"


def test_volumes_are_mapped(cri: Cri, pod: Pod) -> None:
    """Shifted where the kubelet asks for it, and as they are on the disk where it does not."""
    shifted, plain = scratch_dir("volume"), scratch_dir("volume")
    mounts = [
        api.Mount(container_path="/s", host_path=str(shifted), uidMappings=ids(), gidMappings=ids()),
        api.Mount(container_path="/p", host_path=str(plain)),
    ]
    container = cri.run(pod, BUSYBOX, SLEEP, linux=linux(), mounts=mounts)
    assert cri.exec(container, "sh", "-c", "stat -c %u /s; touch /s/file").stdout == "0\n"
    assert (shifted / "file").stat().st_uid == 0
    denied = cri.exec(container, "touch", "/p/file")
    assert "Permission denied" in denied.stderr
    assert not Path(plain / "file").exists()


def test_two_containers_share_a_mapped_volume(cri: Cri, pod: Pod) -> None:
    """One file system for both, with the owners that the volume's mapping gives, also for another user."""
    cri.pull(MEET)
    folder = scratch_dir("shared")
    mount = api.Mount(container_path="/data", host_path=str(folder), uidMappings=ids(), gidMappings=ids())
    server = cri.run(pod, MEET, ("meet", "serve", "/data"), linux=linux(), mounts=[mount])
    eventually_sync((folder / "ready").exists, until=bool, timeout_s=10)
    other = cri.run(pod, MEET, SLEEP, linux=linux(), mounts=[mount])
    met = cri.exec(other, "meet", "check", "/data").stdout.split()
    assert sorted(met) == ["fcntl", "fifo", "flock", "inotify", "map", "rename", "socket"]
    assert cri.status(server).state == api.CONTAINER_RUNNING
    assert cri.exec(other, "sh", "-c", "mkdir -m 1777 /data/open; echo x >/data/private").code == 0
    assert cri.exec(other, "chmod", "600", "/data/private").code == 0
    user = cri.run(pod, MEET, SLEEP, linux=linux(run_as_user=api.Int64Value(value=1000)), mounts=[mount])
    assert cri.exec(user, "touch", "/data/open/mine").code == 0
    assert cri.exec(other, "stat", "-c", "%u:%g", "/data/open/mine").stdout == "1000:1000\n"
    assert (folder / "open/mine").stat().st_uid == 1000
    assert "Permission denied" in cri.exec(user, "cat", "/data/private").stderr


def test_live_configuration_is_mapped_too(cri: Cri, pod: Pod) -> None:
    """The guest has a copy of it, whose owners are shifted as the volume's would be."""
    path = scratch_dir("kubelet") / "pods/uid/volumes/kubernetes.io~secret/s"
    write_volume(path, {"key": "old"}, mode=0o400)
    mount = api.Mount(
        container_path="/s", host_path=str(path), readonly=True, uidMappings=ids(), gidMappings=ids()
    )
    container = cri.run(pod, BUSYBOX, SLEEP, linux=linux(), mounts=[mount])
    assert cri.exec(container, "stat", "-L", "-c", "%u:%g %a", "/s/key").stdout == "0:0 400\n"
    write_volume(path, {"key": "new"}, mode=0o400)
    eventually_sync(
        lambda: cri.exec(container, "cat", "/s/key").stdout, until=lambda text: text == "new", timeout_s=2
    )


def test_container_with_another_user_namespace_is_rejected(cri: Cri, pod: Pod) -> None:
    with pytest.raises(grpc.RpcError) as fault:
        cri.create(pod, BUSYBOX, SLEEP)
    assert "userns_options" in str(fault.value.details())
