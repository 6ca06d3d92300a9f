"""The kubelet's static CPU and memory managers: what they give to a container, its VM has on the host."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sandbox.capabilities import mask_of
from sandbox.host.proc import effective_capabilities
from tests.kit.eventually import eventually_sync
from tests.kit.kubelet import NODE, is_ready
from tests.node.kubelet.conftest import BUSYBOX, RESERVED_CPU, Node

pytestmark = [pytest.mark.node, pytest.mark.timeout(600)]


def pod(**resources: str) -> dict[str, object]:
    """Return a pod; with resources, which are its limits and its requests, it is Guaranteed."""
    container = {"name": "c", "image": BUSYBOX, "command": ["sleep", "3600"]}
    return {"containers": [container | ({"resources": {"limits": resources}} if resources else {})]}


def processes(node: Node, name: str) -> list[Path]:
    """Return the VMM of a pod and its helpers, as directories of /proc."""
    sandboxes = node.daemon.cri.call("ListPodSandbox").items
    (id,) = (each.id for each in sandboxes if each.metadata.name == f"{name}-{NODE}")
    found = json.loads(node.daemon.cri.pod_status(id, verbose=True).info["info"])
    return [Path("/proc", str(pid)) for pid in (found["pid"], *found["helpers"].values())]


def allowed(node: Node, name: str, what: str) -> set[str]:
    """Return the lists of CPUs, or of memory nodes, of all threads of a pod's processes."""
    return {
        line
        for process in processes(node, name)
        for status in process.glob("task/*/status")
        for line in re.findall(rf"{what}_allowed_list:\t(\S+)", status.read_text())
    }


def own_score() -> int:
    """Return the least that a daemon without CAP_SYS_RESOURCE can give."""
    return int(Path("/proc/self/oom_score_adj").read_text())


def test_exclusive_cpu_of_a_guaranteed_pod_is_its_vms_alone(node: Node) -> None:
    node.kubelet.add("shared", pod())
    node.kubelet.wait_for("shared", is_ready, 120)
    before = allowed(node, "shared", "Cpus")
    node.kubelet.add("exclusive", pod(cpu="1", memory="64Mi"))
    node.kubelet.wait_for("exclusive", is_ready, 120)
    (own,) = allowed(node, "exclusive", "Cpus")
    assert own.isdecimal() and own != RESERVED_CPU
    assert allowed(node, "exclusive", "Mems") == {"0"}
    # the manager takes it from the other pods, at its next round
    eventually_sync(
        lambda: allowed(node, "shared", "Cpus"),
        until=lambda found: all(own not in re.split("[-,]", each) for each in found),
        timeout_s=60,
    )
    scores = {
        name: {int((each / "oom_score_adj").read_text()) for each in processes(node, name)}
        for name in ("exclusive", "shared")
    }
    protected = -997 if effective_capabilities() & mask_of(["SYS_RESOURCE"]) else own_score()
    assert scores == {"exclusive": {protected}, "shared": {1000}}, "by the kubelet's quality of service"
    node.kubelet.remove("exclusive")
    eventually_sync(
        lambda: allowed(node, "shared", "Cpus"), until=lambda found: found == before, timeout_s=60
    )
    node.kubelet.remove("shared")
    eventually_sync(
        lambda: [each.metadata.name for each in node.daemon.cri.call("ListPodSandbox").items],
        until=lambda names: not {f"{name}-{NODE}" for name in scores} & set(names),
        timeout_s=60,
    )
