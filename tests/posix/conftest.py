"""A pod of Husk, and one of containerd, with the three places in which the suites run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.bench.containerd import Containerd
from tests.conftest import Site
from tests.kit import images
from tests.kit.cri import Cri
from tests.kit.daemon import Daemon
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir
from tests.posix.suites import TOOLS, Place

IMAGE = f"{HOST}/husk/posix:1"
SHORT = os.environ.get("HUSK_TEST_POSIX") == "short"
PLACES = ("rootfs", "disk", "memory")
MEMORY_SIZE = "64m"  # sizeLimit of the memory volume: what stress-ng may fill of the VM's memory


def image() -> images.Image:
    """Return busybox, with a sleep that is a program by itself: pjdfstest executes a copy of it under another
    name, which busybox would not know."""
    layer = images.Layer().add("usr/local/bin/sleep", images.helper("pause"), mode=0o755)
    return images.Image((images.base_layer(), layer))


@pytest.fixture(scope="session")
def tools() -> Path:
    """Build what runs, or take it from the cache."""
    build = Path(__file__).with_name("build-tools")
    return Path(subprocess.run([build], check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


@pytest.fixture(scope="module", params=["husk"] if SHORT else ["husk", "containerd"])
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def started(site: Site, runtime: str) -> Iterator[Cri]:
    """Start the runtime."""
    if runtime == "containerd":
        site.registry.push("pause", "1", images.pause())
        baseline = Containerd(site.namespace, site.cni, site.mirrors)
        yield baseline.cri
        baseline.close()
        return
    daemon = Daemon(site.namespace, site.cni, site.mirrors, leases=site.leases)
    daemon.start()
    before = daemon.census()
    yield daemon.cri
    daemon.remove_all()
    left = daemon.leaks_since(before)
    daemon.close()
    assert left == [], daemon.evidence()


@pytest.fixture(scope="module")
def container(site: Site, started: Cri, tools: Path) -> Iterator[str]:
    """Run a privileged container: root filesystem, disk volume and memory volume (emptyDir of medium Memory),
    which the kubelet makes as here."""
    disk, memory = scratch_dir("disk"), scratch_dir("memory")
    disk.chmod(0o755)
    site.namespace.run("mount", "-t", "tmpfs", "-o", f"mode=755,size={MEMORY_SIZE}", "tmpfs", str(memory))
    site.registry.push("husk/posix", "1", image())
    started.pull(IMAGE)
    sandbox = api.LinuxSandboxSecurityContext(privileged=True)
    linux = api.LinuxPodSandboxConfig(security_context=sandbox, cgroup_parent=started.cgroup_parent)
    pod = started.run_pod("posix", linux=linux)
    security = api.LinuxContainerSecurityContext(privileged=True)
    mounts = [
        api.Mount(container_path="/disk", host_path=str(disk)),
        api.Mount(container_path="/memory", host_path=str(memory)),
        api.Mount(container_path=TOOLS, host_path=str(tools), readonly=True),
    ]
    made = started.run(
        pod,
        IMAGE,
        ("sleep", "86400"),
        linux=api.LinuxContainerConfig(security_context=security),
        mounts=mounts,
    )
    assert started.exec(made, "mkdir", "-m", "755", "/rootfs").code == 0
    yield made
    started.stop_pod(pod)
    started.remove_pod(pod)
    site.namespace.run("umount", str(memory))


@pytest.fixture(params=PLACES)
def place(started: Cri, container: str, request: pytest.FixtureRequest) -> Place:
    return Place(started, container, str(request.param))
