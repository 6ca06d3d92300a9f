"""A pod reads more files than its virtiofsds may hold descriptors for, and works on.

With HUSK_TEST_FILES=200000 the test has the size of a large pod; by default it has one that fits a CI run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit.cri import Cri
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.leaks import processes_naming
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
LIMIT = 4096
FILES = int(os.environ.get("HUSK_TEST_FILES", "12000"))
EACH_S = FILES / 50  # what one pass over all files may take on a busy machine without KVM
WORK = """
cd "$1" && mkdir made && cd made || exit 1
d=0; while [ $d -lt $2 ]; do
    mkdir $d && cd $d || exit 1
    n=0; while [ $n -lt 100 ]; do echo $d-$n >$n || exit 1; n=$((n+1)); done
    cd .. && d=$((d+1))
done
find . -type f | wc -l
find . -type f -exec cat {} + | sort -u | wc -l
cd .. && rm -r made && echo removed
"""


class LimitedDaemon(Daemon):
    """A daemon whose hard limit of descriptors is LIMIT, and which may not raise it."""

    def command(self, *arguments: str) -> list[str]:
        bound = ["setpriv", "--bounding-set=-sys_resource", "prlimit", f"--nofile={LIMIT}:{LIMIT}"]
        return [*bound, *super().command(*arguments)]


@pytest.fixture(scope="module")
def limited(site: Site) -> Iterator[Daemon]:
    made: Daemon = LimitedDaemon(site.namespace, site.cni, site.mirrors, leases=site.leases)
    made.start()
    made.cri.pull(BUSYBOX)
    yield made
    made.close()


def servers(daemon: Daemon, pod_id: str) -> Sequence[int]:
    """Return the processes of a pod's virtiofsds."""
    found = (each.split(" ", 2) for each in processes_naming(f"{daemon.run_directory}/pods/{pod_id}/"))
    return [int(pid) for pid, program, *_ in found if "virtiofsd" in program]


def descriptors(pids: Sequence[int]) -> int:
    return max(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)  # noqa: PTH208


def test_more_files_than_descriptors_are_made_listed_read_and_removed(limited: Daemon) -> None:
    cri: Cri = limited.cri
    pod = cri.run_pod("many")
    folder = scratch_dir("many")
    volume = api.Mount(container_path="/data", host_path=str(folder))
    container = cri.run(pod, BUSYBOX, ["sleep", "36000"], mounts=[volume])
    pids = servers(limited, pod.id)
    assert {line for pid in pids for line in limits(pid)} == {str(LIMIT)}
    cri.exec(container, "mkdir", "/own")
    calls = [
        cri.begin("ExecSync", container_id=container, cmd=["sh", "-c", WORK, "sh", path, str(FILES // 100)])
        for path in ("/data", "/own")
    ]
    for call in calls:
        answer = call.result(timeout=4 * EACH_S)
        printed = answer.stdout.decode().split()
        assert (answer.exit_code, printed) == (0, [str(FILES), str(FILES), "removed"]), answer.stderr[-500:]
    eventually_sync(lambda: descriptors(pids), until=lambda count: count < LIMIT // 2 + 200, timeout_s=20)
    assert cri.exec(container, "sh", "-c", "ls /bin /data; echo x >/data/after").code == 0
    cri.stop_pod(pod)
    cri.remove_pod(pod)


def test_search_at_full_speed_through_more_files_than_descriptors_finds_all(limited: Daemon) -> None:
    """Many in a directory, which the guest looks up in one go, many at a time."""
    cri, count = limited.cri, 5 * FILES
    folder = scratch_dir("search")
    for number in range(count):
        if number % 5000 == 0:
            (folder / str(number)).mkdir()
        (folder / str(number - number % 5000) / f"{number}").touch()
    pod = cri.run_pod("search")
    volume = api.Mount(container_path="/data", host_path=str(folder))
    containers = [cri.run(pod, BUSYBOX, ["sleep", "36000"], mounts=[volume]) for _ in range(2)]
    script = "find /data -type f | wc -l; find /data -type f -mtime -9 -size 0 | wc -l; "
    script += "ls -lR /data | grep -c '^-'"
    calls = [cri.begin("ExecSync", container_id=each, cmd=["sh", "-c", script]) for each in containers]
    for call in calls:
        answer = call.result(timeout=4 * EACH_S)
        assert answer.stdout.decode().split() == [str(count)] * 3, answer.stderr[-500:]
    cri.stop_pod(pod)
    cri.remove_pod(pod)


def limits(pid: int) -> Sequence[str]:
    with open(f"/proc/{pid}/limits") as file:  # noqa: PTH123
        return [line.split()[3] for line in file if line.startswith("Max open files")]
