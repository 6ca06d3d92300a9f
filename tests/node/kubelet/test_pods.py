"""Static pods of a real kubelet on Husk: what comes up, what it is told, and that nothing stays."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.kit.cri import Cri
from tests.kit.kubelet import NODE, container_of, is_ready
from tests.node.kubelet.conftest import BUSYBOX, UNUSED, WEB, Node

pytestmark = [pytest.mark.node, pytest.mark.timeout(600)]

HOST_PORT = 18080
NODE_PORT = 18081


def container(name: str, script: str = "", **fields: object) -> dict[str, object]:
    """One of busybox that runs a script; without one it sleeps."""
    command = ["sh", "-c", script or "exec sleep 3600"]
    return {"name": name, "image": BUSYBOX, "command": command, **fields}


def mounted(name: str, path: str, **fields: object) -> dict[str, object]:
    return {"name": name, "mountPath": path, **fields}


def full(shared: Path) -> dict[str, object]:
    """Init container, sidecar, probes of every kind, volumes of every kind that needs no API server."""
    web = {
        "name": "web",
        "image": WEB,
        "ports": [{"containerPort": 80, "hostPort": HOST_PORT}],
        "resources": {"requests": {"cpu": "100m", "memory": "32Mi"}, "limits": {"memory": "64Mi"}},
        "startupProbe": {"tcpSocket": {"port": 80}, "periodSeconds": 1, "failureThreshold": 30},
        "readinessProbe": {"httpGet": {"path": "/index.html", "port": 80}, "periodSeconds": 1},
        "livenessProbe": {"exec": {"command": ["test", "-f", "/work/prepared"]}, "periodSeconds": 2},
        "volumeMounts": [
            mounted("work", "/work"),
            mounted("memory", "/memory"),
            mounted("settings", "/settings", readOnly=True),
            mounted("settings", "/one/setting", subPath="..data/name", readOnly=True),
            mounted("single", "/etc/single"),
            mounted("memory", "/part", subPath="below"),
            mounted("shared", "/shared"),
        ],
        "lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", "echo stopping >/shared/prestop"]}}},
    }
    sidecar = container("sidecar", "while true; do date >/work/alive; sleep 1; done", restartPolicy="Always")
    return {
        "initContainers": [
            container("first", "touch /work/prepared", volumeMounts=[mounted("work", "/work")]),
            {**sidecar, "volumeMounts": [mounted("work", "/work")]},
        ],
        "containers": [web, container("second")],
        "volumes": [
            {"name": "work", "emptyDir": {}},
            {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
            {"name": "shared", "hostPath": {"path": str(shared), "type": "Directory"}},
            {"name": "settings", "hostPath": {"path": str(shared / "settings"), "type": "Directory"}},
            {"name": "single", "hostPath": {"path": str(shared / "single"), "type": "File"}},
        ],
    }


def of_the_node(shared: Path) -> dict[str, object]:
    """As kube-proxy and CNI daemons are: with the node's network and processes."""
    probe = {"httpGet": {"host": "127.0.0.1", "path": "/index.html", "port": NODE_PORT}, "periodSeconds": 1}
    daemon = {
        "name": "daemon",
        "image": WEB,
        "command": ["httpd", "-f", "-vv", "-p", f"127.0.0.1:{NODE_PORT}", "-h", "/www"],
        "readinessProbe": probe,
        "livenessProbe": {"exec": {"command": ["true"]}, "periodSeconds": 1},
        "resources": {"limits": {"memory": "64Mi"}},
        "volumeMounts": [mounted("shared", "/shared", readOnly=True)],
    }
    return {
        "hostNetwork": True,
        "hostPID": True,
        "initContainers": [container("first", "test -d /proc/1")],
        "containers": [
            daemon,
            container("loop", "x=$(head -c 30000000 /dev/zero | tr '\\0' x); while :; do :; done"),
        ],
        "volumes": [{"name": "shared", "hostPath": {"path": str(shared), "type": "Directory"}}],
    }


def write_settings(shared: Path) -> None:
    """As the kubelet lays a ConfigMap out: files behind a link that is replaced as a whole."""
    version = shared / "settings/..2026"
    version.mkdir(parents=True)
    (version / "name").write_text("husk\n")
    (shared / "settings/..data").symlink_to("..2026")
    (shared / "settings/name").symlink_to("..data/name")
    (shared / "single").write_text("a single file\n")


@pytest.fixture(scope="module")
def pods(node: Node) -> Node:
    """All pods of this module, added at once, so that they boot side by side."""
    write_settings(node.shared)
    node.kubelet.add("full", full(node.shared))
    grow = container("grow", "sleep 1; x=x; while true; do x=$x$x; done")
    grow["resources"] = {"limits": {"memory": "32Mi"}}
    node.kubelet.add("hungry", {"containers": [grow]})
    last = container("last", "echo the last words >/dev/termination-log; exit 3")
    node.kubelet.add("ends", {"containers": [last], "restartPolicy": "Never"})
    # the guest's own tmpfs: a volume in memory is in the host's
    load = "dd if=/dev/zero of=/dev/shm/block bs=1M count=50 2>/dev/null; while true; do :; done"
    node.kubelet.add("busy", {"containers": [container("busy", load)]})
    chatter = "n=0; while true; do echo line $n of a log that grows; n=$((n+1)); done"
    node.kubelet.add("shares", of_the_node(node.shared))
    node.kubelet.add("talks", {"containers": [container("talks", f"{chatter} | head -n 4000; sleep 3600")]})
    return node


def run(node: Node, pod: str, name: str, *argv: str) -> Any:
    status = container_of(node.kubelet.pod(pod), name)
    return node.daemon.cri.exec(status["containerID"].removeprefix("husk://"), *argv)


def test_a_whole_pod_becomes_ready(pods: Node) -> None:
    pod = pods.kubelet.wait_for("full", is_ready, 120)
    first = container_of(pod, "first")["state"]["terminated"]
    assert (first["exitCode"], first["reason"]) == (0, "Completed")
    for name in ("sidecar", "web", "second"):
        status = container_of(pod, name)
        assert (status["ready"], status["restartCount"], status["started"]) == (True, 0, True), name
    assert pod["status"]["phase"] == "Running"
    assert pod["status"]["podIP"].startswith("10.88.")
    assert container_of(pod, "web")["resources"]["limits"]["memory"] == "64Mi"


def test_volumes(pods: Node) -> None:
    pods.kubelet.wait_for("full", is_ready, 120)

    def seen(script: str) -> str:
        return str(run(pods, "full", "web", "sh", "-c", script).stdout)

    assert seen("ls /work") == "alive\nprepared\n"
    assert seen("cat /settings/name /one/setting /etc/single") == "husk\nhusk\na single file\n"
    assert seen("echo kept >/memory/below/x; cat /part/x") == "kept\n"
    # a ConfigMap's update: another directory, and the link replaced
    fresh = pods.shared / "settings/..2027"
    fresh.mkdir()
    (fresh / "name").write_text("newer\n")
    (pods.shared / "settings/..new").symlink_to("..2027")
    (pods.shared / "settings/..new").rename(pods.shared / "settings/..data")
    Cri.wait_for(lambda: seen("cat /settings/name"), lambda text: text == "newer\n", 20)


def test_host_port(pods: Node) -> None:
    pods.kubelet.wait_for("full", is_ready, 120)
    assert pods.namespace.fetch("127.0.0.1", HOST_PORT) == "hello from the pod\n"


def test_a_pod_of_the_node(pods: Node) -> None:
    pod = pods.kubelet.wait_for("shares", is_ready, 120)
    for name in ("daemon", "loop"):
        assert (container_of(pod, name)["ready"], container_of(pod, name)["restartCount"]) == (True, 0), name
    assert pods.namespace.fetch("127.0.0.1", NODE_PORT) == "hello from the pod\n"
    Cri.wait_for(
        lambda: pods.kubelet.get(f"/containerLogs/default/shares-{NODE}/daemon"),
        lambda text: "200" in text,
        20,
    )
    assert run(pods, "shares", "daemon", "cat", "/shared/single").stdout == "a single file\n"
    assert run(pods, "shares", "daemon", "touch", "/shared/new").code != 0
    sandboxes = pods.daemon.cri.call("ListPodSandbox").items
    (id,) = (each.id for each in sandboxes if each.metadata.name == f"shares-{NODE}")
    assert json.loads(pods.daemon.cri.pod_status(id, verbose=True).info["info"])["isolation"] == "process"

    def look() -> tuple[float, float]:
        containers = {each["name"]: each for each in summary(pods, "shares").get("containers") or []}
        loop = containers.get("loop", {})
        cpu = loop.get("cpu", {}).get("usageNanoCores", 0) / 1e9
        return cpu, loop.get("memory", {}).get("workingSetBytes", 0) / 1e6

    cpu, memory = Cri.wait_for(look, lambda each: each[0] > 0.2 and each[1] > 25, 60)
    assert 0.2 < cpu <= 1.1
    assert 25 < memory < 120


def test_logs(pods: Node) -> None:
    pods.kubelet.wait_for("full", is_ready, 120)
    Cri.wait_for(
        lambda: pods.kubelet.get(f"/containerLogs/default/full-{NODE}/web"), lambda text: "200" in text, 20
    )


def test_out_of_memory_restarts_with_a_reason(pods: Node) -> None:
    def killed(pod: Any) -> bool:
        status = container_of(pod, "grow")
        ended = status.get("lastState", {}).get("terminated") or status["state"].get("terminated") or {}
        return bool(status["restartCount"] >= 1 and ended.get("reason") == "OOMKilled")

    pod = pods.kubelet.wait_for("hungry", killed, 120)
    status = container_of(pod, "grow")
    assert status["lastState"]["terminated"]["exitCode"] == 137

    def backs_off(pod: Any) -> bool:
        waiting = container_of(pod, "grow")["state"].get("waiting") or {}
        return bool(waiting.get("reason") == "CrashLoopBackOff")

    pods.kubelet.wait_for("hungry", backs_off, 120)


def test_termination_message_and_code(pods: Node) -> None:
    pod = pods.kubelet.wait_for("ends", lambda pod: pod["status"]["phase"] == "Failed", 60)
    ended = container_of(pod, "last")["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"], ended["message"]) == (3, "Error", "the last words\n")


def test_log_rotation(pods: Node) -> None:
    """The kubelet renames a log that is too long and has the runtime open a new one; nothing is lost."""
    directory = pods.kubelet.logs / f"default_talks-{NODE}_uid-talks/talks"

    def files() -> list[Path]:
        return sorted(directory.glob("0.log*")) if directory.is_dir() else []

    Cri.wait_for(files, lambda found: len(found) >= 2, 60)

    # the newest rotated file is plain, older ones are packed
    def lines() -> int:
        total = 0
        for file in files():
            text = file.read_bytes()
            if file.suffix == ".gz":
                text = gzip.decompress(text)
            total += text.count(b" of a log that grows\n")
        return total

    Cri.wait_for(lines, lambda count: count == 4000, 30)


# ------------------------------------------------------------------------------------ figures


def summary(node: Node, name: str) -> Mapping[str, Any]:
    pods = node.kubelet.json("/stats/summary")["pods"]
    return next((pod for pod in pods if pod["podRef"]["name"] == f"{name}-{NODE}"), {})


def test_summary_tells_a_busy_loop_and_fifty_megabytes(pods: Node) -> None:
    pods.kubelet.wait_for("busy", is_ready, 120)

    def look() -> tuple[float, float]:
        containers = summary(pods, "busy").get("containers") or [{}]
        cpu = containers[0].get("cpu", {}).get("usageNanoCores", 0) / 1e9
        memory = containers[0].get("memory", {}).get("workingSetBytes", 0) / 1e6
        return cpu, memory

    cpu, memory = Cri.wait_for(look, lambda each: each[0] > 0.5 and each[1] > 45, 60)
    assert 0.5 < cpu <= 1.1
    assert 45 < memory < 80


def test_resource_metrics(pods: Node) -> None:
    pods.kubelet.wait_for("busy", is_ready, 120)

    def look() -> dict[str, float]:
        found = {}
        for line in pods.kubelet.get("/metrics/resource").splitlines():
            if line.startswith("container_") and 'container="busy"' in line:
                found[line.partition("{")[0]] = float(line.rpartition("}")[2].split()[0])
        return found

    found = Cri.wait_for(look, lambda each: each.get("container_memory_working_set_bytes", 0) > 45e6, 60)
    assert found["container_cpu_usage_seconds_total"] > 0
    assert found["container_start_time_seconds"] > 1e9


def test_cadvisor_metrics_come_from_the_runtime(pods: Node) -> None:
    pods.kubelet.wait_for("busy", is_ready, 120)

    def look() -> dict[str, float]:
        found = {}
        for line in pods.kubelet.get("/metrics/cadvisor").splitlines():
            if line.startswith("container_") and 'container="busy"' in line:
                found[line.partition("{")[0]] = float(line.rpartition("}")[2].split()[0])
        return found

    found = Cri.wait_for(look, lambda each: each.get("container_memory_working_set_bytes", 0) > 45e6, 60)
    assert found["container_cpu_usage_seconds_total"] > 0
    assert found["container_memory_rss"] < found["container_memory_usage_bytes"]


def test_image_file_system_is_known(pods: Node) -> None:
    """Without it the kubelet could neither collect images nor evict for their sake."""
    images = pods.kubelet.json("/stats/summary")["node"]["runtime"]["imageFs"]
    assert images["capacityBytes"] > images["usedBytes"] > 0
    assert images["inodes"] > 0


# -------------------------------------------------------------------------- restart and removal


def test_a_restart_of_the_runtime_restarts_no_container(pods: Node) -> None:
    before = pods.kubelet.wait_for("full", is_ready, 120)
    pods.daemon.kill()
    pods.daemon.start()
    time.sleep(8)  # the kubelet has looked again, and probes have run
    after = pods.kubelet.wait_for("full", is_ready, 60)
    for name in ("sidecar", "web", "second"):
        old, new = container_of(before, name), container_of(after, name)
        assert (new["containerID"], new["restartCount"]) == (old["containerID"], 0)


def test_deletion_runs_the_hook_and_leaves_nothing(pods: Node) -> None:
    pods.kubelet.wait_for("full", is_ready, 120)
    for name in ("full", "hungry", "ends", "busy", "talks", "shares"):
        pods.kubelet.remove(name)
    Cri.wait_for(
        lambda: [pod.metadata.name for pod in pods.daemon.cri.call("ListPodSandbox").items],
        lambda names: names == [],
        120,
    )
    assert (pods.shared / "prestop").read_text() == "stopping\n"
    assert [line for line in pods.daemon.leaks_since(pods.before) if "links: " not in line] == []
    assert json.loads(pods.kubelet.get("/pods"))["items"] in (None, [])


def test_a_full_disk_has_unused_images_removed(node: Node) -> None:
    """By eviction, which takes the disk to be full here: its figures are the runtime's."""
    node.kubelet.stop()
    node.daemon.cri.pull(UNUSED)
    node.kubelet.settings = {"evictionHard": {"imagefs.available": "99%"}}
    node.kubelet.start()

    def names() -> list[str]:
        images = node.daemon.cri.call("ListImages").images
        return [name for image in images for name in image.repo_tags]

    Cri.wait_for(names, lambda found: UNUSED not in found, 60)
