"""Files of the host's kernel, whose size says nothing of what they hold: /proc, /sys and the like."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST
from tests.vm.test_virtiofsd_end import assert_killed, await_not_ready, end

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
SLEEP = ("sleep", "3600")


def mount(source: str, target: str = "", **fields: Any) -> api.Mount:
    return api.Mount(container_path=target or f"/host{source}", host_path=source, **fields)


@pytest.fixture
def own(cri: Cri) -> Iterator[Pod]:
    pod = cri.run_pod("kernel-files")
    yield pod
    cri.stop_pod(pod)
    cri.remove_pod(pod)


def read(cri: Cri, container: str, script: str) -> str:
    done = cri.exec(container, "sh", "-c", script)
    assert done.code == 0, done.stderr
    return done.stdout


def content(cri: Cri, container: str, path: str) -> str:
    """Return a file's content, read by read(2): busybox's cat uses sendfile(2)."""
    return read(cri, container, f"dd bs=64k if={path} 2>/dev/null")


def test_files_of_proc_and_sys_hold_what_the_host_has(cri: Cri, own: Pod, site: Site) -> None:
    plain = cri.run(own, BUSYBOX, SLEEP)
    mounts = [mount("/proc"), mount("/sys", readonly=True), mount("/proc/version", "/version")]
    container = cri.run(own, BUSYBOX, SLEEP, mounts=mounts)
    for path in (
        "/proc/version",
        "/proc/filesystems",
        "/proc/sys/kernel/random/boot_id",
        "/sys/kernel/mm/swap",
    ):
        if Path(path).is_file():
            assert content(cri, container, f"/host{path}") == Path(path).read_text()
    assert content(cri, container, "/version") == Path("/proc/version").read_text()
    assert read(cri, container, "head -c 5 /host/proc/version") == Path("/proc/version").read_text()[:5]
    # longer than a page, and than what one read returns
    names = read(cri, container, "cut -d' ' -f3 /host/proc/kallsyms | head -n 20000 | md5sum")
    assert names == site.namespace.run("sh", "-c", "cut -d' ' -f3 /proc/kallsyms | head -n 20000 | md5sum")
    # another process reads what has changed, and so does one that seeks back
    first, second = (content(cri, container, "/host/proc/uptime") for _ in range(2))
    assert float(first.split()[0]) < float(second.split()[0])
    script = "exec 3</host/proc/uptime; head -n1 <&3; sleep 0.1; exec 3</host/proc/uptime; head -n1 <&3"
    again = read(cri, container, script).splitlines()
    assert len(again) == 2 and again[0] != again[1]
    assert content(cri, container, "/host/sys/class/net/lo/mtu").strip().isdigit()
    assert cri.exec(container, "sh", "-c", "echo 1 >/host/sys/kernel/mm/ksm/run").code != 0
    assert cri.exec(plain, "cat", "/proc/version").code == 0


@pytest.fixture
def group() -> Iterator[Path]:
    """A cgroup whose limit of processes can be set."""
    top = Path("/sys/fs/cgroup")
    made = (top if (top / "cgroup.controllers").exists() else top / "pids") / f"hk-written-{os.getpid()}"
    made.mkdir()
    yield made
    made.rmdir()


def test_file_of_the_kernel_can_be_written_where_the_mount_is_writable(
    cri: Cri, own: Pod, group: Path
) -> None:
    container = cri.run(own, BUSYBOX, SLEEP, mounts=[mount(str(group), "/group")])
    assert content(cri, container, "/group/pids.max") == "max\n"
    read(cri, container, "echo 77 >/group/pids.max")
    assert content(cri, container, "/group/pids.max") == "77\n"
    assert (group / "pids.max").read_text() == "77\n"


def test_sendfile_reads_files_of_the_kernel_in_guests_before_linux_6_5_alone(cri: Cri, own: Pod) -> None:
    """Later ones splice from the page cache, by the size of the file (docs/limits.md)."""
    container = cri.run(own, BUSYBOX, SLEEP, mounts=[mount("/proc")])
    major, minor = (int(each) for each in read(cri, container, "uname -r").split(".")[:2])
    expected = Path("/proc/version").read_text() if (major, minor) < (6, 5) else ""
    assert read(cri, container, "cat /host/proc/version") == expected


def test_next_daemon_knows_the_share_and_sees_its_end(cri: Cri, own: Pod, daemon: Daemon) -> None:
    first = cri.run(own, BUSYBOX, SLEEP, mounts=[mount("/proc")])
    daemon.kill()
    daemon.start()
    assert content(cri, first, "/host/proc/version") == Path("/proc/version").read_text()
    second = cri.run(own, BUSYBOX, SLEEP, mounts=[mount("/proc"), mount("/sys")])
    assert content(cri, second, "/host/sys/class/net/lo/mtu").strip().isdigit()
    cri.remove(first)
    assert content(cri, second, "/host/proc/version") == Path("/proc/version").read_text()
    end(daemon, own.id, "uncached")
    await_not_ready(cri, own, "uncached")
    assert_killed(cri, second, "uncached")


def test_mounts_of_the_host_below_sys_appear_and_can_be_unmounted(cri: Cri, own: Pod, site: Site) -> None:
    """A directory of configfs or the like that the host mounts later."""
    point = "/sys/kernel/config"
    if (
        not Path(point).is_dir()
        or site.namespace.run("sh", "-c", f"grep -c ' {point} ' /proc/self/mounts || :") != "0\n"
    ):
        point = "/sys/fs/fuse/connections"
    share = mount("/sys", propagation=api.PROPAGATION_HOST_TO_CONTAINER)
    container = cri.run(own, BUSYBOX, SLEEP, mounts=[share])
    site.namespace.run("mount", "-t", "tmpfs", "later", point)
    try:
        site.namespace.run("touch", f"{point}/came")
        names = eventually_sync(
            lambda: read(cri, container, f"ls /host{point}"), until=lambda seen: "came" in seen, timeout_s=10
        )
        assert names == "came\n"
    finally:
        site.namespace.run("umount", point)
    eventually_sync(
        lambda: read(cri, container, f"ls /host{point}"), until=lambda seen: "came" not in seen, timeout_s=10
    )


def test_proc_and_sys_mounted_over_their_places_in_the_root_of_the_host(cri: Cri, own: Pod) -> None:
    """As node exporters have them."""
    mounts = [
        mount("/", "/host", readonly=True, propagation=api.PROPAGATION_HOST_TO_CONTAINER),
        mount("/proc", "/host/proc", readonly=True),
        mount("/sys", "/host/sys", readonly=True),
    ]
    container = cri.run(own, BUSYBOX, SLEEP, mounts=mounts)
    assert content(cri, container, "/host/proc/version") == Path("/proc/version").read_text()
    assert content(cri, container, "/host/etc/hostname") == Path("/etc/hostname").read_text()
    assert content(cri, container, "/host/sys/class/net/lo/mtu").strip().isdigit()


@pytest.mark.parametrize("propagation", [api.PROPAGATION_PRIVATE, api.PROPAGATION_HOST_TO_CONTAINER])
def test_root_of_the_host_has_the_files_of_its_kernel(cri: Cri, own: Pod, propagation: int) -> None:
    for _ in range(2):  # the second one uses the export of the first
        root = mount("/", "/host", readonly=True, propagation=propagation)
        container = cri.run(own, BUSYBOX, SLEEP, mounts=[root])
        assert content(cri, container, "/host/proc/version") == Path("/proc/version").read_text()
        assert content(cri, container, "/host/sys/class/net/lo/mtu").strip().isdigit()
        assert content(cri, container, "/host/etc/passwd") == Path("/etc/passwd").read_text()
