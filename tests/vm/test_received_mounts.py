"""Mounts that the host makes below a volume with HostToContainer: they appear inside, and whatever a
container has read, the host can take them away again."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.leaks import processes_naming
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
SLEEP = ("sleep", "3600")
APPEARS_S = 5.0  # a test machine is emulated and busy
# lists and reads all that is there, again and again
READER = "while :; do cat /data/sub/* /data/sub/deep/*; find /data; done >/dev/null 2>&1"


class Host:
    """mount(8) and umount(8) where the daemon runs."""

    def __init__(self, site: Site, folder: Path) -> None:
        self._site = site
        self.folder = folder

    def run(self, *arguments: str) -> str:
        return self._site.namespace.run(*arguments)

    def mount(self, name: str, *arguments: str) -> Path:
        """Mount a tmpfs with a file, `came`, below the volume."""
        point = self.folder / name
        self.run("mkdir", "-p", str(point))
        self.run("mount", *(arguments or ("-t", "tmpfs", "later")), str(point))
        self.run("sh", "-c", f"echo {name} >{point}/came")
        return point

    def device(self, point: Path) -> int:
        return int(self.run("stat", "-c", "%d", str(point)))


@pytest.fixture
def host(site: Site) -> Iterator[Host]:
    folder = scratch_dir("received")
    yield Host(site, folder)
    site.namespace.run(
        "sh", "-c", f"grep -o '{folder}[^ ]*' /proc/self/mounts | sort -ru | xargs -r umount -l"
    )


def volume(host: Host, **fields: Any) -> api.Mount:
    return api.Mount(
        **{
            "container_path": "/data",
            "host_path": str(host.folder),
            "propagation": api.PROPAGATION_HOST_TO_CONTAINER,
            **fields,
        }
    )


def eventually(read: Callable[[], Any], wanted: Any) -> None:
    eventually_sync(read, until=lambda seen: seen == wanted, timeout_s=APPEARS_S)


def await_output(cri: Cri, containers: Sequence[str], script: str, wanted: str) -> None:
    for container in containers:
        eventually_sync(
            lambda container=container: cri.exec(container, "sh", "-c", script).stdout,  # type: ignore[misc]
            until=lambda text: text == wanted,
            timeout_s=APPEARS_S,
        )


def shown(cri: Cri, container: str, path: str) -> str:
    return cri.exec(container, "sh", "-c", f"cat {path}/came 2>/dev/null").stdout


def devices_in_use(daemon: Daemon, pod: Pod) -> set[int]:
    """Return the file systems of the files that the pod's virtiofsds hold open."""
    found = set()
    for line in processes_naming(f"{daemon.run_directory}/pods/{pod.id}/"):
        pid, program = line.split(" ")[:2]
        for descriptor in Path(f"/proc/{pid}/fd").iterdir() if "virtiofsd" in program else ():
            with contextlib.suppress(OSError):
                found.add(descriptor.stat().st_dev)
    return found


def await_end(daemon: Daemon, pod: Pod, device: int) -> None:
    """Wait until nothing of the pod uses a file system any more."""
    eventually(lambda: device in devices_in_use(daemon, pod), False)


def test_mount_that_a_container_has_read_is_unmounted_at_once(
    daemon: Daemon, cri: Cri, pod: Pod, host: Host
) -> None:
    (host.folder / "sub").mkdir()
    first, second = (cri.run(pod, BUSYBOX, SLEEP, mounts=[volume(host)]) for _ in range(2))
    for _ in range(3):
        point = host.mount("sub")
        device = host.device(point)
        await_output(cri, (first, second), "find /data | xargs cat 2>/dev/null", "sub\n")
        assert device in devices_in_use(daemon, pod)
        host.run("umount", str(point))
        host.run("rmdir", str(point))
        host.run("mkdir", str(point))
        await_output(cri, (first, second), "ls /data/sub", "")
        await_end(daemon, pod, device)


def test_mount_that_existed_before_the_container_is_unmounted(cri: Cri, pod: Pod, host: Host) -> None:
    point = host.mount("sub")
    deep = host.mount("sub/deep")
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=[volume(host)])
    assert shown(cri, container, "/data/sub/deep") == "sub/deep\n"
    host.run("umount", str(deep))
    eventually(lambda: cri.exec(container, "ls", "/data/sub").stdout, "came\ndeep\n")
    eventually(lambda: cri.exec(container, "ls", "/data/sub/deep").stdout, "")
    again = host.mount("sub/deep")
    eventually(lambda: shown(cri, container, "/data/sub/deep"), "sub/deep\n")
    host.run("umount", str(again))
    host.run("umount", str(point))
    eventually(lambda: cri.exec(container, "ls", "/data/sub").stdout, "")


def test_mounts_come_and_go_under_a_reading_container(cri: Cri, pod: Pod, host: Host) -> None:
    (host.folder / "sub").mkdir()
    reader = cri.run(pod, BUSYBOX, ["sh", "-c", READER], mounts=[volume(host)])
    for _ in range(30):
        point = host.mount("sub")
        deep = host.mount("sub/deep")
        # a mount is busy for the moment in which the daemon copies it; as the kubelet does, try again
        for each in (deep, point):
            eventually_sync(
                lambda each=each: host.run("umount", str(each)) == "",  # type: ignore[misc]
                timeout_s=5,
                retry_on=(subprocess.CalledProcessError,),
            )
    host.mount("sub")
    eventually(lambda: shown(cri, reader, "/data/sub"), "sub\n")
    assert cri.status(reader).state == api.CONTAINER_RUNNING


def test_open_file_outlives_its_mount(daemon: Daemon, cri: Cri, pod: Pod, host: Host) -> None:
    point = host.mount("sub")
    script = "exec 3</data/sub/came; echo open; while [ ! -e /data/go ]; do :; done; cat <&3"
    container = cri.run(pod, BUSYBOX, ["sh", "-c", script], mounts=[volume(host)])
    device = host.device(point)
    eventually_sync(
        lambda: [line.text for line in cri.log(container)],
        until=lambda lines: lines == ["open"],
        timeout_s=10,
    )
    host.run("umount", str(point))
    (host.folder / "go").touch()
    cri.wait_exited(container)
    assert [line.text for line in cri.log(container)] == ["open", "sub"]
    await_end(daemon, pod, device)


def test_mounts_made_while_the_daemon_was_down_appear(daemon: Daemon, cri: Cri, host: Host) -> None:
    pod = cri.run_pod("received")
    gone = host.mount("gone")
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=[volume(host)])
    assert shown(cri, container, "/data/gone") == "gone\n"
    daemon.kill()
    host.run("umount", str(gone))
    host.mount("sub")
    daemon.start()
    eventually(lambda: shown(cri, container, "/data/sub"), "sub\n")
    eventually(lambda: cri.exec(container, "ls", "/data/gone").stdout, "")


def test_volume_of_another_pod_is_not_busy_for_a_pod_with_the_hosts_root(cri: Cri, host: Host) -> None:
    """As a node exporter has it: / at /host, HostToContainer."""
    exporter = cri.run(
        cri.run_pod("exporter"),  # its second virtiofsd ends with it
        BUSYBOX,
        SLEEP,
        mounts=[volume(host, container_path="/host", host_path="/", readonly=True)],
    )
    point = host.mount("pods/uid/volumes/data")
    inside = f"/host{point}"
    other = cri.run_pod("other")
    user = cri.run(other, BUSYBOX, SLEEP, mounts=[api.Mount(container_path="/data", host_path=str(point))])
    cri.exec(user, "sh", "-c", "echo written >/data/file")
    eventually(lambda: cri.exec(exporter, "cat", f"{inside}/file").stdout, "written\n")
    assert "written" not in cri.exec(exporter, "df", inside).stderr
    assert "Read-only" in cri.exec(exporter, "touch", f"{inside}/x").stderr
    cri.remove_pod(other)
    host.run("umount", str(point))
    host.run("rmdir", str(point))
    eventually(lambda: cri.exec(exporter, "ls", inside).code != 0, True)
