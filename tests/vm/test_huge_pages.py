"""Huge pages: their limits grow the VM, and an emptyDir on them is a directory of the guest's hugetlbfs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit import images
from tests.kit.cri import Cri, Pod
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
SLEEP = ("sleep", "3600")
MIB = 1 << 20


@pytest.fixture(scope="module")
def program() -> Path:
    path = scratch_dir("program") / "huge"
    path.write_bytes(images.helper("huge"))
    path.chmod(0o755)
    return path


@pytest.fixture
def volume(site: Site) -> Iterator[Path]:
    """A hugetlbfs, mounted as the kubelet does it."""
    path = scratch_dir("huge")
    site.namespace.run("mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "huge", str(path))
    site.namespace.run("chmod", "1777", str(path))
    yield path
    site.namespace.run("umount", "-l", str(path))


def limits(mib: int, size: str = "2MB") -> api.LinuxContainerConfig:
    # the kubelet names every size that its node has
    pages = [
        api.HugepageLimit(page_size=size, limit=mib * MIB),
        api.HugepageLimit(page_size="1GB" if size != "1GB" else "2MB", limit=0),
    ]
    return api.LinuxContainerConfig(resources=api.LinuxContainerResources(hugepage_limits=pages))


def total(cri: Cri, container: str) -> int:
    """Return the MiB of huge pages that the guest has allocated."""
    words = cri.exec(container, "grep", "HugePages_Total", "/proc/meminfo").stdout.split()
    return 2 * int(words[1])


def test_containers_of_a_pod_share_a_volume_of_huge_pages(
    cri: Cri, pod: Pod, program: Path, volume: Path
) -> None:
    mounts = [
        api.Mount(container_path="/bin/huge", host_path=str(program), readonly=True),
        api.Mount(container_path="/huge", host_path=str(volume)),
    ]
    one = cri.run(pod, BUSYBOX, SLEEP, mounts=mounts, linux=limits(32))
    other = cri.run(pod, BUSYBOX, SLEEP, mounts=mounts, linux=limits(32))
    assert total(cri, one) == 64
    assert " /huge hugetlbfs " in cri.exec(one, "cat", "/proc/mounts").stdout
    assert cri.exec(one, "stat", "-c", "%a", "/huge").stdout == "1777\n"
    assert cri.exec(one, "huge", "/huge/shared", "32").stdout == "was 0\n"
    assert cri.exec(other, "huge", "/huge/shared", "32").stdout == "was 42\n"
    # the volume lives as long as the pod
    assert cri.exec(one, "rm", "/huge/shared").code == 0
    assert cri.exec(one, "huge", "-", "32").code == 0
    # a container may use as much as its limit, whatever the guest has
    refused = cri.exec(one, "huge", "-", "34")
    assert (refused.code, refused.stdout) == (1, "mmap: Cannot allocate memory\n")
    assert list(volume.iterdir()) == []


def test_memory_for_huge_pages_is_added_to_the_vm(cri: Cri, pod: Pod, program: Path) -> None:
    def available(container: str) -> int:
        return int(cri.exec(container, "grep", "MemAvailable", "/proc/meminfo").stdout.split()[1]) // 1024

    mounts = [api.Mount(container_path="/bin/huge", host_path=str(program), readonly=True)]
    plain = cri.run(pod, BUSYBOX, SLEEP)
    before = available(plain)
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=mounts, linux=limits(256))
    assert total(cri, container) == 256
    assert available(plain) > before - 30, (available(plain), before)
    assert cri.exec(container, "huge", "-", "256").stdout == "was 0\n"
    # and more while it runs
    more = limits(300).resources
    cri.call("UpdateContainerResources", container_id=container, linux=more)
    assert total(cri, container) == 300
    assert cri.exec(container, "huge", "-", "300").stdout == "was 0\n"


def test_pages_of_another_size_are_rejected(cri: Cri, pod: Pod) -> None:
    with pytest.raises(grpc.RpcError) as fault:
        cri.create(pod, BUSYBOX, SLEEP, linux=limits(1024, "1GB"))
    assert fault.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = str(fault.value.details())
    assert "hugepage_limits" in details and "1GB" in details and "accepted: pages of 2MB" in details
