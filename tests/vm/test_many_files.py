"""Pods use more files than their virtiofsds may hold descriptors for, and work on.

With HUSK_TEST_FILES=200000 the tests have the size of a large pod, which takes minutes without KVM; by
default they have one that fits a CI run. Each says how many descriptors a virtiofsd had at most.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from cri.proto import runtime_v1_pb2 as api
from sandbox.vm_pods.inode_watch import count_descriptors
from tests.conftest import Site
from tests.kit import images
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.images import Image, Layer
from tests.kit.leaks import processes_naming
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

BUSYBOX = f"{HOST}/husk/busybox:1"
LARGE = f"{HOST}/husk/large:1"
LIMIT = 4096
FILES = int(os.environ.get("HUSK_TEST_FILES", "10000"))
IMAGE_FILES = max(24_000, FILES * 3 // 4)  # the tests' machines have a limit of 20,000
PER_DIRECTORY = 1000
EACH_S = FILES / 50  # what one pass over all files may take on a busy machine without KVM
SAMPLE_S = 0.005

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300 + 12 * EACH_S)]

WORK = """
cd $1 && mkdir made && cd made || exit 1
d=0; while [ $d -lt $2 ]; do
    mkdir $d && cd $d || exit 1
    n=0; while [ $n -lt 100 ]; do echo $d-$n >$n || exit 1; n=$((n+1)); done
    cd .. && d=$((d+1))
done
find . -type f | wc -l
find . -type f -exec cat {} + | sort | sha256sum | cut -d ' ' -f 1
cd .. && rm -r made && echo removed
"""


class LimitedDaemon(Daemon):
    """A daemon whose hard limit of descriptors is LIMIT, and which may not raise it."""

    def command(self, *arguments: str) -> list[str]:
        bound = ["setpriv", "--bounding-set=-sys_resource", "prlimit", f"--nofile={LIMIT}:{LIMIT}"]
        return [*bound, *super().command(*arguments)]


@pytest.fixture(scope="module")
def limited(site: Site) -> Iterator[Daemon]:
    made: Daemon = LimitedDaemon(
        site.namespace, site.cni, site.mirrors, leases=site.leases, settings={"metrics": {"port": 0}}
    )
    made.start()
    made.cri.timeout_s = 6 * EACH_S
    made.cri.pull(BUSYBOX)
    yield made
    made.close()


def servers(daemon: Daemon, pod: Pod) -> Sequence[int]:
    """Return the processes of a pod's virtiofsds."""
    found = (each.split(" ", 2) for each in processes_naming(f"{daemon.run_directory}/pods/{pod.id}/"))
    return [int(pid) for pid, program, *_ in found if "virtiofsd" in program]


def descriptors(pids: Sequence[int]) -> int:
    return max(count_descriptors(pid) for pid in pids)


def limits(pid: int) -> Sequence[str]:
    with open(f"/proc/{pid}/limits") as file:  # noqa: PTH123
        return [line.split()[3] for line in file if line.startswith("Max open files")]


@contextmanager
def sampled(daemon: Daemon, pod: Pod) -> Iterator[list[int]]:
    """Count descriptors all the while; the list gets the most that a virtiofsd had."""
    pids, ended, most = servers(daemon, pod), threading.Event(), [0]
    assert {line for pid in pids for line in limits(pid)} == {str(LIMIT)}

    def sample() -> None:
        while not ended.wait(SAMPLE_S):
            most[0] = max(most[0], descriptors(pids))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()
    print(f"descriptors: at most {most[0]} of {LIMIT}")


def expect(calls: Sequence[object], printed: Sequence[str]) -> None:
    for call in calls:
        answer = call.result(timeout=6 * EACH_S)  # type: ignore[attr-defined]
        found = answer.stdout.decode().split()
        assert (answer.exit_code, found) == (0, list(printed)), answer.stderr[-500:]


def fill(count: int) -> Path:
    """Make files on the host, many in a directory; return where."""
    folder = scratch_dir("many")
    for number in range(count):
        if number % 5000 == 0:
            (folder / str(number)).mkdir()
        (folder / str(number - number % 5000) / f"{number}").touch()
    return folder


def test_files_made_listed_hashed_and_removed_by_two_containers_exceed_the_descriptors(
    limited: Daemon,
) -> None:
    """Half of FILES in a volume, and half in root filesystems, at the same time."""
    cri: Cri = limited.cri
    pod = cri.run_pod("many")
    volume = api.Mount(container_path="/data", host_path=str(scratch_dir("many")))
    containers = [cri.run(pod, BUSYBOX, ["sleep", "36000"], mounts=[volume]) for _ in range(2)]
    hundreds = FILES // 400
    lines = sorted(f"{d}-{n}\n" for d in range(hundreds) for n in range(100))
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    with sampled(limited, pod) as most:
        calls = []
        for number, container in enumerate(containers):
            for place in (f"/data/{number}", "/own"):
                cri.exec(container, "mkdir", place)
                command = ["sh", "-c", WORK, "sh", place, str(hundreds)]
                calls.append(cri.begin("ExecSync", container_id=container, cmd=command))
        expect(calls, [str(100 * hundreds), digest, "removed"])
    assert most[0] < LIMIT * 3 // 4
    pids = servers(limited, pod)
    eventually_sync(lambda: descriptors(pids), until=lambda count: count < LIMIT // 2, timeout_s=20)
    assert cri.exec(containers[0], "sh", "-c", "ls /bin /data; echo x >/data/after").code == 0
    cri.stop_pod(pod)
    cri.remove_pod(pod)


def test_search_at_full_speed_while_no_daemon_runs_finds_all(limited: Daemon) -> None:
    """Many in a directory, which the guest looks up in one go, many at a time."""
    cri, folder = limited.cri, fill(FILES)
    pod = cri.run_pod("search")
    volume = api.Mount(container_path="/data", host_path=str(folder))
    script = "while [ ! -e /data/begin ]; do sleep 0.1; done; cd /data; "
    script += "find . -name '*[0-9]' -size 0 -type f | wc -l; ls -lR . | grep -c '^-.*[0-9]$'; touch $0.ended"
    containers = [cri.run(pod, BUSYBOX, ["sh", "-c", script, name], mounts=[volume]) for name in "ab"]
    with sampled(limited, pod) as most:
        limited.kill()
        (folder / "begin").touch()
        eventually_sync(
            lambda: len(list(folder.glob("*.ended"))), until=lambda ended: ended == 2, timeout_s=6 * EACH_S
        )
    limited.start()
    for container in containers:
        cri.wait_exited(container)
        assert [line.text for line in cri.log(container)] == [str(FILES)] * 2
    assert most[0] < LIMIT * 3 // 4
    cri.stop_pod(pod)
    cri.remove_pod(pod)


def test_search_of_a_large_image_under_the_default_limit_finds_all(site: Site, daemon: Daemon) -> None:
    layer = Layer()
    for number in range(IMAGE_FILES):
        layer.add(f"usr/lib/part{number // PER_DIRECTORY}/{number}.dat", str(number))
    site.registry.push("husk/large", "1", Image((images.base_layer(), layer)))
    daemon.cri.pull(LARGE)
    pod = daemon.cri.run_pod("large")
    containers = [daemon.cri.run(pod, LARGE, ["sleep", "36000"]) for _ in range(2)]
    find = "find / -xdev -name '*.dat' -type f -size +0 | wc -l; find / -xdev -name '*.dat' -newer / | wc -l"
    calls = [daemon.cri.begin("ExecSync", container_id=each, cmd=["sh", "-c", find]) for each in containers]
    expect(calls, [str(IMAGE_FILES), "0"])
    daemon.cri.stop_pod(pod)
    daemon.cri.remove_pod(pod)
    daemon.cri.call("RemoveImage", image={"image": LARGE})
