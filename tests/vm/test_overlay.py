"""overlayfs inside a pod: on a volume, on disk or in memory, and on directories of the container's root."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit import images
from tests.kit.cri import Cri, Pod
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
MEET = f"{HOST}/husk/meet:1"
SLEEP = ("sleep", "3600")
PRIVILEGED = api.LinuxContainerSecurityContext(privileged=True)

MOUNT = """
set -e
mkdir -p $1 && cd $1 && mkdir lower upper work merged
mkdir lower/kept lower/gone && echo low >lower/file && echo low >lower/old && ln -s file lower/link
touch lower/kept/hidden lower/gone/inner && mkfifo lower/fifo
mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
"""
CHANGE = """
set -e
cd $1/merged
echo more >>file && mv file renamed && rm old && rm -r gone && mkdir gone && touch gone/new
rm kept/hidden && chown -h 7:7 link && chmod 600 fifo && ln renamed second && truncate -s 1M sparse
"""
LOOK = """
cd $1/merged
find . | sort | tr '\\n' ' '
cat renamed second | tr '\\n' ' '
stat -c %u:%g:%a link fifo | tr '\\n' ' '
"""
EXPECTED = (
    ". ./fifo ./gone ./gone/new ./kept ./link ./renamed ./second ./sparse low more low more 7:7:777 0:0:600 "
)
LIST = """
import os, sys
for folder, directories, files in os.walk(sys.argv[1]):
    for name in directories + files:
        path = os.path.join(folder, name)
        print(name, *os.listxattr(path, follow_symlinks=False))
"""


@pytest.fixture(scope="module")
def pod(cri: Cri) -> Pod:
    security = api.LinuxSandboxSecurityContext(privileged=True)
    linux = api.LinuxPodSandboxConfig(security_context=security, cgroup_parent=cri.cgroup_parent)
    return cri.run_pod("overlay", linux=linux)


@pytest.fixture(params=["disk", "memory"])
def volume(site: Site, request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = scratch_dir("overlay")
    if request.param == "memory":
        site.namespace.run("mount", "-t", "tmpfs", "tmpfs", str(folder))
    yield folder
    if request.param == "memory":
        site.namespace.run("umount", str(folder))


def privileged(cri: Cri, pod: Pod, *, image: str = BUSYBOX, volume: Path | None = None) -> str:
    mounts = [api.Mount(container_path="/data", host_path=str(volume))] if volume else []
    linux = api.LinuxContainerConfig(security_context=PRIVILEGED)
    return cri.run(pod, image, SLEEP, linux=linux, mounts=mounts)


def sh(cri: Cri, container: str, script: str, *arguments: str) -> str:
    result = cri.exec(container, "sh", "-c", script, "sh", *arguments)
    assert result.code == 0, result
    return result.stdout


def test_overlay_on_a_volume_has_all_changes_of_its_upper_layer(
    site: Site, cri: Cri, pod: Pod, volume: Path
) -> None:
    container = privileged(cri, pod, volume=volume)
    sh(cri, container, MOUNT + CHANGE, "/data/a")
    assert sh(cri, container, LOOK, "/data/a") == EXPECTED
    again = (
        "umount $1/merged && cd $1 && mount -t overlay o -o lowerdir=lower,upperdir=upper,workdir=work merged"
    )
    sh(cri, container, again, "/data/a")
    assert sh(cri, container, LOOK, "/data/a") == EXPECTED, "whiteouts and opaque directories are kept"
    listed = site.namespace.run(sys.executable, "-c", LIST, str(volume / "a/upper"))
    attributes = {name: names for name, *names in map(str.split, listed.splitlines())}
    assert "user.virtiofs.trusted.overlay.opaque" in attributes["gone"]
    assert not any(name.startswith("trusted.") for names in attributes.values() for name in names)


def test_overlay_with_user_attributes_on_a_volume_is_mounted(cri: Cri, pod: Pod, volume: Path) -> None:
    """As containers in containers do that have a user namespace."""
    container = privileged(cri, pod, volume=volume)
    options = MOUNT.replace("-o lowerdir", "-o userxattr,lowerdir")
    sh(cri, container, options + CHANGE, "/data/b")
    assert sh(cri, container, LOOK, "/data/b") == EXPECTED


def test_overlay_whose_lower_layer_is_the_containers_root_is_mounted(
    cri: Cri, pod: Pod, volume: Path
) -> None:
    container = privileged(cri, pod, volume=volume)
    script = """
    set -e; mkdir -p /data/c/u /data/c/w /data/c/m /below; echo low >/below/file
    mount -t overlay o -o lowerdir=/below:/bin,upperdir=/data/c/u,workdir=/data/c/w /data/c/m
    cat /data/c/m/file; /data/c/m/busybox echo runs; rm /data/c/m/file; test -e /data/c/m/file || echo gone
    """
    assert sh(cri, container, script) == "low\nruns\ngone\n"


@pytest.mark.parametrize(
    "place", ["/kept/a", "/var/lib/docker/a", "/var/lib/containers/storage", "/dev/shm/a"]
)
def test_overlay_on_a_plain_directory_of_the_root_has_all_changes(cri: Cri, pod: Pod, place: str) -> None:
    """/kept is a VOLUME of the image."""
    cri.pull(MEET)
    container = privileged(cri, pod, image=MEET)
    sh(cri, container, MOUNT + CHANGE, place)
    group = 2000 if place.startswith("/kept") else 0  # by the setgid bit of the VOLUME
    assert sh(cri, container, LOOK, place) == EXPECTED.replace("0:0:600", f"0:{group}:600")
    assert sh(cri, container, "stat -c %u:%g:%a /kept; cat /kept/file") == "1000:2000:2750\nof the image\n"


def test_overlay_elsewhere_on_the_root_is_refused(cri: Cri, pod: Pod) -> None:
    """See docs/limits.md: the root is an overlay itself."""
    container = privileged(cri, pod)
    result = cri.exec(container, "sh", "-c", MOUNT, "sh", "/elsewhere")
    assert result.code != 0 and "Invalid argument" in result.stderr


def test_container_that_may_not_mount_has_no_plain_directories(cri: Cri, pod: Pod) -> None:
    container = cri.run(pod, BUSYBOX, SLEEP)
    assert cri.exec(container, "ls", "/var/lib/docker").code != 0


@pytest.mark.parametrize("volume", ["disk"], indirect=True)
def test_trusted_attributes_of_host_and_guest_do_not_meet(
    site: Site, cri: Cri, pod: Pod, volume: Path
) -> None:
    for name in ("ours", "theirs", "caps"):
        (volume / name).touch()
    (volume / "attribute").write_bytes(images.helper("attribute"))
    (volume / "attribute").chmod(0o755)
    os.setxattr(volume / "ours", "trusted.ours", b"1")
    os.setxattr(
        volume / "caps", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000")
    )
    container = privileged(cri, pod, volume=volume)
    set_theirs = ("/data/attribute", "/data/theirs")
    assert cri.exec(container, *set_theirs, "trusted.theirs", "1").code == 0
    assert os.listxattr(volume / "theirs") == ["user.virtiofs.trusted.theirs"]
    result = cri.exec(container, *set_theirs, "user.virtiofs.trusted.theirs", "2")
    assert result.code != 0, "the name under which the host keeps it is not the guest's"
    result = cri.exec(container, "/data/attribute", "/data/ours", "trusted.ours")
    assert result.code != 0 and os.listxattr(volume / "ours") == ["trusted.ours"]
    # one of a file capability would be removed by the guest, where it can be seen, with a change of owner
    sh(cri, container, "chown 5 /data/caps")
    assert os.listxattr(volume / "caps") == []
