"""Templates, the pool and growth, with real VMs, and what copies of one VM must not share."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cri.proto import runtime_v1_pb2 as api
from sandbox.host.proc import read_stat
from tests.conftest import Site
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.leaks import processes_naming
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
FILL_S = 60
MIB = 1 << 20


@pytest.fixture(scope="module")
def pool(site: Site) -> Iterator[Daemon]:
    """A daemon with a pool of two, and handlers for the other sources. When it ends, nothing is left."""
    made = Daemon(
        site.namespace,
        site.cni,
        site.mirrors,
        leases=site.leases,
        settings={
            "handlers.pool": {"source": "pool", "pool_size": 2},
            "handlers.template": {"source": "template"},
            "handlers.boot": {"source": "boot"},
        },
    )
    before = made.census()
    made.start()
    made.cri.pull(BUSYBOX)
    yield made
    if made.alive:
        made.remove_all()
        made.terminate()
    left = made.leaks_since(before)
    made.close()
    assert left == [], made.evidence()


def fill(daemon: Daemon) -> None:
    """Wait until two pooled VMs are paused."""
    eventually_sync(
        lambda: paused(daemon), until=lambda ids: len(ids) == 2, timeout_s=FILL_S, describe=daemon.evidence
    )


def paused(daemon: Daemon) -> list[str]:
    """Return the ids of pods whose record is in state waiting and whose VM uses no CPU time."""
    found = []
    for path in (daemon.root / "pods").glob("*.json"):
        # record and VMM of a VM that is being taken down may vanish meanwhile
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            record = json.loads(path.read_text())
            waits = record.get("state") == "waiting" and record["runtime"].get("guest_kernel")
            if waits and is_idle(daemon, record["id"]):
                found.append(record["id"])
    return found


def is_idle(daemon: Daemon, pod_id: str) -> bool:
    """Return whether its VMM uses no CPU time for 0.3 s."""
    pids = daemon.vmm_pids(pod_id)
    if not pids:
        return False

    def ticks() -> int:
        stat = read_stat(pids[0])
        return stat.cpu_ticks if stat else 0

    begin = ticks()
    time.sleep(0.3)
    return ticks() == begin


def facts(cri: Cri, pod: Pod) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cri.pod_status(pod, verbose=True).info["info"])
    return found


def read(cri: Cri, container: str, command: str) -> str:
    answer = cri.exec(container, "sh", "-c", command)
    assert answer.code == 0, answer
    return str(answer.stdout).strip()


def test_pod_acquires_a_pooled_vm(pool: Daemon) -> None:
    fill(pool)
    ready = set(paused(pool))
    pod = pool.cri.run_pod("claimed", handler="pool")
    assert pod.id in ready
    info = facts(pool.cri, pod)
    assert info["source"] == "pool"
    assert {"resume", "network", "guest"} <= {phase["name"] for phase in info["phases"]}
    container = pool.cri.run(pod, BUSYBOX, ["sleep", "3600"])
    assert read(pool.cri, container, "hostname") == "claimed"
    assert pool.cri.pod_ip(pod) in read(pool.cri, container, "ip -o addr show eth0")
    assert "192.0.2." not in read(pool.cri, container, "ip addr; ip route"), "the warm-up has left no trace"
    pool.cri.stop_pod(pod)
    pool.cri.remove_pod(pod)


def test_copies_of_one_vm_share_no_identity(pool: Daemon) -> None:
    """Entropy, machine id, boot id, MAC, hostname: of two from the pool and two from the template."""
    seen = []
    for number, handler in enumerate(("pool", "pool", "template", "template")):
        if handler == "pool":
            fill(pool)
        pod = pool.cri.run_pod(f"copy-{number}", handler=handler, hostname=f"copy-{number}")
        assert facts(pool.cri, pod)["source"] == handler
        container = pool.cri.run(pod, BUSYBOX, ["sleep", "3600"])
        seen.append(
            {
                "entropy": read(pool.cri, container, "head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'"),
                "uuid": read(pool.cri, container, "cat /proc/sys/kernel/random/uuid"),
                "boot id": read(pool.cri, container, "cat /proc/sys/kernel/random/boot_id"),
                "MAC": read(pool.cri, container, "cat /sys/class/net/eth0/address"),
                "hostname": read(pool.cri, container, "hostname"),
                "address": pool.cri.pod_ip(pod),
            }
        )
        again = read(pool.cri, container, "cat /proc/sys/kernel/random/boot_id")
        assert again == seen[-1]["boot id"], "it stays the same in one pod"
    for name in seen[0]:
        values = [each[name] for each in seen]
        assert all(values) and len(set(values)) == len(values), f"{name}: {values}"
    pool.remove_all()


@pytest.mark.parametrize("handler", ["pool", "template", "boot"])
def test_clocks_are_right_as_soon_as_the_pod_runs(pool: Daemon, handler: str) -> None:
    """A pooled VM was paused meanwhile: its clock is set when it is claimed."""
    if handler == "pool":
        fill(pool)
        time.sleep(2)
    pod = pool.cri.run_pod(f"clock-{handler}", handler=handler)
    container = pool.cri.run(pod, BUSYBOX, ["sleep", "3600"])

    def offset_s() -> tuple[float, float]:
        """Return the offset of the guest's wall clock, and that of its monotonic clock to ours."""
        best = (1e9, 0.0, 0.0)
        for _ in range(5):
            before, wall, mono = time.monotonic(), time.time(), time.monotonic()
            # busybox has no nanoseconds; adjtimex reads the clock itself
            text = read(pool.cri, container, "adjtimex | grep -E 'time.tv_(sec|usec)'; cat /proc/uptime")
            took = time.monotonic() - before
            seconds = float(re.search(r"tv_sec:\s*(\d+)", text)[1])  # type: ignore[index]
            parts = float(re.search(r"tv_usec:\s*(\d+)", text)[1])  # type: ignore[index]
            up = float(text.splitlines()[-1].split()[0])
            if took < best[0]:
                best = (took, seconds + parts / 1e6 - wall - took / 2, up - mono - took / 2)
        return best[1], best[2]

    wall, mono = offset_s()
    assert abs(wall) < 0.1, f"wall clock off by {wall:.3f} s"
    time.sleep(3)
    wall_later, mono_later = offset_s()
    assert abs(wall_later) < 0.1
    assert abs(mono_later - mono) < 0.1, "the monotonic clock runs at the rate of ours"
    pool.cri.stop_pod(pod)
    pool.cri.remove_pod(pod)


@pytest.mark.parametrize("handler", ["pool", "template", "boot"])
def test_pod_gets_the_memory_and_cpus_of_its_limits(pool: Daemon, handler: str) -> None:
    if handler == "pool":
        fill(pool)
    limits = api.LinuxContainerResources(
        memory_limit_in_bytes=512 * MIB, cpu_quota=180_000, cpu_period=100_000
    )
    pod = pool.cri.run_pod(f"large-{handler}", handler=handler, linux={"resources": limits})
    assert facts(pool.cri, pod)["source"] == handler
    container = pool.cri.run(pod, BUSYBOX, ["sleep", "3600"])
    assert read(pool.cri, container, "nproc") == "2"
    total_kib = int(read(pool.cri, container, "awk '/MemTotal/ {print $2}' /proc/meminfo"))
    assert 520 * 1024 < total_kib < 900 * 1024
    # and it is usable
    assert read(pool.cri, container, "head -c 400m /dev/zero | tail -c 1 | od -An -tx1") == "00"
    pool.cri.stop_pod(pod)
    pool.cri.remove_pod(pod)


def test_running_pod_is_grown_for_raised_limits(pool: Daemon) -> None:
    fill(pool)
    pod = pool.cri.run_pod("grows", handler="pool")
    container = pool.cri.run(pod, BUSYBOX, ["sleep", "3600"])
    assert read(pool.cri, container, "nproc") == "1"
    raised = {"memory_limit_in_bytes": 600 * MIB, "cpu_quota": 200_000, "cpu_period": 100_000}
    pool.cri.call("UpdateContainerResources", container_id=container, linux=raised)
    assert read(pool.cri, container, "nproc") == "2"
    assert int(read(pool.cri, container, "awk '/MemTotal/ {print $2}' /proc/meminfo")) > 600 * 1024
    pool.cri.stop_pod(pod)
    pool.cri.remove_pod(pod)


def kill_virtiofsd(daemon: Daemon, pod_id: str) -> None:
    """Kill a virtiofsd of a pod, found by its share, which its arguments name."""
    found = (each.split(" ", 2) for each in processes_naming(f"{daemon.run_directory}/pods/{pod_id}/"))
    pids = [int(pid) for pid, program, *_ in found if "virtiofsd" in program]
    assert pids, f"no virtiofsd runs for {pod_id}"
    os.kill(max(pids), signal.SIGKILL)


@pytest.mark.parametrize("kill", [Daemon.kill_vmm, kill_virtiofsd], ids=["VMM", "virtiofsd"])
def test_pooled_vm_that_dies_is_replaced(pool: Daemon, kill: Callable[[Daemon, str], None]) -> None:
    fill(pool)
    victim = paused(pool)[0]
    kill(pool, victim)
    eventually_sync(
        lambda: paused(pool),
        until=lambda ids: victim not in ids and len(ids) == 2,
        timeout_s=FILL_S,
        describe=pool.evidence,
    )
    pod = pool.cri.run_pod(f"after-{kill.__name__}", handler="pool")
    assert pod.id != victim and facts(pool.cri, pod)["source"] == "pool"
    pool.cri.stop_pod(pod)
    pool.cri.remove_pod(pod)


def test_damaged_template_is_made_again_and_pods_boot_meanwhile(pool: Daemon) -> None:
    fill(pool)
    (template,) = [path for path in (pool.run_directory / "templates").iterdir() if (path / "ram").exists()]
    with (template / "state").open("r+b") as state:
        state.truncate(10_000)
    made = template.stat().st_ino
    pod = pool.cri.run_pod("unlucky", handler="template")
    assert facts(pool.cri, pod)["source"] == "boot"
    assert "cannot be restored and is deleted" in pool.log_text()
    eventually_sync(
        lambda: template.stat().st_ino if (template / "state").exists() else made,
        until=lambda inode: inode != made,
        timeout_s=FILL_S,
        describe=pool.evidence,
        retry_on=(FileNotFoundError,),
    )
    again = pool.cri.run_pod("lucky", handler="template")
    assert facts(pool.cri, again)["source"] == "template"
    pool.remove_all()


def test_pooled_vms_of_a_killed_daemon_are_taken_down_by_the_next(pool: Daemon) -> None:
    fill(pool)
    pod = pool.cri.run_pod("stays", handler="pool")
    container = pool.cri.run(pod, BUSYBOX, ["sleep", "3600"])
    fill(pool)
    before = paused(pool)
    pool.kill()
    assert all(pool.vmm_pids(each) for each in before), "they outlive the daemon"
    pool.start()
    assert not any(pool.vmm_pids(each) for each in before), "and the next one takes them down"
    assert read(pool.cri, container, "echo still here") == "still here"
    fill(pool)
    pool.remove_all()


def test_daemon_that_stops_takes_down_pooled_vms(pool: Daemon) -> None:
    fill(pool)
    before = paused(pool)
    assert pool.terminate() == 0
    assert not any(pool.vmm_pids(each) for each in before)
    pool.start()
