"""`husk ps` lists what a real pod holds, and marks what has no owner or a record that cannot be used."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from typing import Any

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.kit.cri import Cri
from tests.kit.daemon import Daemon
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
SLEEP = ["sleep", "3600"]
Row = dict[str, Any]


def ps(daemon: Daemon) -> list[Row]:
    """Return the rows of `husk ps --json`."""
    done = subprocess.run(daemon.command("ps", "--json"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert isinstance(rows, list)
    return rows


def of_pod(rows: list[Row], pod: str) -> list[Row]:
    return [row for row in rows if row["pod"] == pod]


def kinds(rows: list[Row]) -> Counter[str]:
    return Counter(str(row["kind"]) for row in rows)


def test_ps_lists_all_that_a_pod_holds_with_owner_age_and_cost(daemon: Daemon, cri: Cri) -> None:
    before = ps(daemon)
    pod = cri.run_pod("held")
    container = cri.run(pod, BUSYBOX, SLEEP)
    found = of_pod(ps(daemon), pod.id)
    assert {(row["owner"], row["state"]) for row in found} == {("default/held", "ready")}
    counts = kinds(found)
    assert counts["record"] == 2 and counts["vm"] == 1 and counts["helper"] == 2
    for kind in ("cgroup", "namespace", "tap", "interface", "network", "directory", "rootfs", "plan"):
        assert counts[kind] == 1, (kind, counts)
    assert counts["lease"] == 2, "an address of each family"
    assert counts["mount"] >= 3
    by_kind = {str(row["kind"]): row for row in found}
    vm = by_kind["vm"]
    assert [int(vm["name"])] == daemon.vmm_pids(pod.id)
    assert vm["memoryBytes"] > 16 << 20 and vm["cpuSeconds"] > 0 and 0 <= vm["ageSeconds"] < 600
    assert by_kind["rootfs"]["container"] == container
    leased = {str(row["name"]).rpartition("/")[2] for row in found if row["kind"] == "lease"}
    assert cri.pod_ip(pod) in leased
    assert not [row for row in ps(daemon) if row["state"] in ("orphan", "quarantined")]
    text = subprocess.run(daemon.command("ps"), capture_output=True, text=True, timeout=60).stdout
    assert len(text.splitlines()) >= len(found) and "default/held" in text
    cri.stop_pod(pod)
    assert set(kinds(of_pod(ps(daemon), pod.id))) <= {"record", "rootfs", "plan", "mount", "directory"}
    cri.remove_pod(pod)
    assert of_pod(ps(daemon), pod.id) == []
    own = [row for row in ps(daemon) if row["state"] not in ("unknown", "shared")]
    assert kinds(own) - kinds(before) == Counter()


def test_ps_lists_a_host_pod(daemon: Daemon, cri: Cri) -> None:
    options = api.NamespaceOption(network=api.NODE)
    context = api.LinuxSandboxSecurityContext(namespace_options=options)
    pod = cri.run_pod("node", linux=api.LinuxPodSandboxConfig(security_context=context), hostname="")
    cri.run(pod, BUSYBOX, SLEEP)
    counts = kinds(of_pod(ps(daemon), pod.id))
    assert counts["process"] >= 3 and counts["record"] == 2 and counts["cgroup"] >= 1
    cri.remove_pod(pod)


@pytest.mark.parametrize("damaged", ["truncated", "lost"])
def test_ps_marks_a_quarantined_pod_and_what_it_holds(daemon: Daemon, cri: Cri, damaged: str) -> None:
    pod = cri.run_pod(f"quarantined-{damaged}")
    container = cri.run(pod, BUSYBOX, SLEEP)
    record = daemon.root / "pods" / f"{pod.id}.json"
    daemon.kill()
    record.write_bytes(record.read_bytes()[:40]) if damaged == "truncated" else record.unlink()
    without = of_pod(ps(daemon), pod.id)
    daemon.start()
    for found in (without, of_pod(ps(daemon), pod.id)):
        assert {row["state"] for row in found} == {"quarantined"}
        counts = kinds(found)
        assert counts["process"] + counts["vm"] + counts["helper"] >= 3
        assert counts["lease"] == 2 and counts["tap"] == counts["cgroup"] == 1
        assert container in {row["container"] for row in found}
    text = subprocess.run(daemon.command("ps"), capture_output=True, text=True, timeout=60).stdout
    assert f"crictl stopp {pod.id}" in text and "QUARANTINED!" in text
    cri.stop_pod(pod)
    cri.remove_pod(pod)
    assert of_pod(ps(daemon), pod.id) == []


def test_ps_marks_what_has_no_owner(daemon: Daemon, cri: Cri) -> None:
    id = "0123456789abcdef" * 4
    lost = daemon.root / "rootfs" / id
    lost.mkdir()
    (daemon.run_directory / "netns" / id).touch()
    marked = [row for row in ps(daemon) if row["state"] == "orphan"]
    assert sorted((row["kind"], row["pod"]) for row in marked) == [("namespace", id), ("rootfs", id)]
    [namespace] = [row for row in marked if row["kind"] == "namespace"]
    assert "enter" in str(namespace["detail"])
    lost.rmdir()
    (daemon.run_directory / "netns" / id).unlink()
