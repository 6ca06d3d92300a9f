"""Volumes that the kubelet itself makes and measures: emptyDir with limits, the downward API, its hosts file
and the termination log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit import images
from tests.kit.eventually import eventually_sync
from tests.kit.kubelet import NODE, container_of, is_ready
from tests.node.kubelet.conftest import BUSYBOX, Node

pytestmark = [pytest.mark.node, pytest.mark.timeout(300)]

MIB = 1 << 20
SLEEP = ["sleep", "3600"]
LIMITS = {
    "memory": {"medium": "Memory", "sizeLimit": "16Mi"},
    "disk": {"sizeLimit": "8Mi"},
}


@pytest.fixture(scope="module")
def limited(node: Node) -> Iterator[str]:
    """Return the container of a pod with an emptyDir of each medium."""
    mounts = [{"name": name, "mountPath": f"/{name}"} for name in LIMITS]
    container = {"name": "main", "image": BUSYBOX, "command": SLEEP, "volumeMounts": mounts}
    volumes = [{"name": name, "emptyDir": limit} for name, limit in LIMITS.items()]
    node.kubelet.add("limited", {"containers": [container], "volumes": volumes})
    yield id_of(node.kubelet.wait_for("limited", is_ready, 120))
    node.kubelet.remove("limited")


def id_of(pod: Any, name: str = "main") -> str:
    return str(container_of(pod, name)["containerID"]).partition("://")[2]


def volume_stats(node: Node, pod: str, volume: str) -> dict[str, Any]:
    for each in node.kubelet.json("/stats/summary")["pods"]:
        if each["podRef"]["name"] == f"{pod}-{NODE}":
            return next((dict(found) for found in each.get("volume", ()) if found["name"] == volume), {})
    return {}


def await_usage(node: Node, volume: str, used: int) -> dict[str, Any]:
    """Return the kubelet's metrics of a volume once it has measured at least so many bytes."""
    return eventually_sync(
        lambda: volume_stats(node, "limited", volume),
        until=lambda stats: stats.get("usedBytes", 0) >= used,
        timeout_s=60,
    )


def test_limit_of_a_memory_volume_is_hard_and_seen_by_df(node: Node, limited: str) -> None:
    cri = node.daemon.cri
    line = cri.exec(limited, "df", "-k", "/memory").stdout.splitlines()[-1].split()
    assert (int(line[1]), line[-1]) == (16 << 10, "/memory")
    written = cri.exec(limited, "dd", "if=/dev/zero", "of=/memory/file", "bs=1M", "count=32")
    assert "No space left" in written.stderr
    assert int(cri.exec(limited, "stat", "-c", "%s", "/memory/file").stdout) == 16 * MIB
    stats = await_usage(node, "memory", 15 * MIB)
    assert stats["capacityBytes"] == 16 * MIB
    cri.exec(limited, "rm", "/memory/file")


def test_limit_of_a_disk_volume_is_what_the_kubelet_measures(node: Node, limited: str) -> None:
    cri = node.daemon.cri
    script = "mkdir /disk/dir; for n in 1 2 3 4; do dd if=/dev/urandom of=/disk/dir/$n bs=1M count=3; done"
    assert cri.exec(limited, "sh", "-c", script).code == 0
    stats = await_usage(node, "disk", 12 * MIB)
    assert 12 * MIB <= stats["usedBytes"] < 13 * MIB
    assert stats["inodesUsed"] == 6
    # a static pod is critical: the kubelet decides to evict it, and does not
    eventually_sync(
        node.kubelet.log_text, until=lambda log: "cannot evict a critical pod" in log, timeout_s=60
    )


def test_downward_api_volume_that_the_kubelet_rewrites_is_followed_with_events(node: Node) -> None:
    # a projected volume would need an API server: the kubelet refuses it without one
    tool = node.shared / "watch"
    tool.write_bytes(images.helper("watch"))
    tool.chmod(0o755)
    labels = [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]
    mounts = [
        {"name": "tools", "mountPath": "/tools"},
        {"name": "info", "mountPath": "/info"},
    ]
    spec = {
        "containers": [
            {"name": "main", "image": BUSYBOX, "command": ["/tools/watch", "/info"], "volumeMounts": mounts}
        ],
        "volumes": [
            {"name": "tools", "hostPath": {"path": str(node.shared)}},
            {"name": "info", "downwardAPI": {"items": labels}},
        ],
    }
    node.kubelet.add("labelled", spec, labels={"state": "old"})
    container = id_of(node.kubelet.wait_for("labelled", is_ready, 120))
    cri = node.daemon.cri
    read = ("sh", "-c", "grep -c new /info/labels")
    assert cri.exec(container, *read).stdout == "0\n"
    node.kubelet.add("labelled", spec, labels={"state": "new"})
    eventually_sync(
        lambda: cri.exec(container, *read).stdout, until=lambda count: count == "1\n", timeout_s=90
    )
    log = next(Path(node.kubelet.logs).glob("default_labelled-*/main/0.log"))
    eventually_sync(log.read_text, until=lambda text: "MOVED_TO ..data" in text, timeout_s=10)
    pod = node.kubelet.pod("labelled")
    assert (id_of(pod), container_of(pod, "main")["restartCount"]) == (container, 0)
    node.kubelet.remove("labelled")


def test_hosts_file_and_termination_log_are_shared_with_the_kubelet(node: Node) -> None:
    script = "echo 10.0.0.9 added >>/etc/hosts; until grep -q seen /etc/hosts; do sleep 0.05; done"
    command = ["sh", "-c", f"{script}; printf why >/dev/termination-log; exit 3"]
    spec = {
        "restartPolicy": "Never",
        "containers": [{"name": "main", "image": BUSYBOX, "command": command}],
    }
    node.kubelet.add("writer", spec)
    hosts = node.kubelet.root / "pods" / "uid-writer" / "etc-hosts"
    eventually_sync(
        lambda: hosts.exists() and hosts.read_text(),
        until=lambda text: text and "added" in text,
        timeout_s=120,
    )
    with hosts.open("a") as file:
        file.write("10.0.0.10 seen\n")
    pod = node.kubelet.wait_for("writer", lambda pod: pod["status"].get("phase") == "Failed", 60)
    ended = container_of(pod, "main")["state"]["terminated"]
    assert (ended["exitCode"], ended["message"]) == (3, "why")
    node.kubelet.remove("writer")
