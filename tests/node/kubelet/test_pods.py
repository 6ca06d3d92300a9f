"""Static pods of a real kubelet on Husk: start, probes, volumes, figures, restart and removal."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.kit.cri import ExecResult
from tests.kit.eventually import eventually_sync
from tests.kit.kubelet import NODE, container_of, is_ready
from tests.node.kubelet.conftest import BUSYBOX, MANAGERS, MEMORY_EVICTION, UNUSED, WEB, Node

pytestmark = [pytest.mark.node, pytest.mark.timeout(600)]

HOST_PORT = 18080
NODE_PORT = 18081


def container(name: str, script: str = "", **fields: object) -> dict[str, object]:
    """Return a busybox container that runs a script, or sleeps."""
    command = ["sh", "-c", script or "exec sleep 3600"]
    return {"name": name, "image": BUSYBOX, "command": command, **fields}


def mounted(name: str, path: str, **fields: object) -> dict[str, object]:
    return {"name": name, "mountPath": path, **fields}


def full(shared: Path) -> dict[str, object]:
    """Return a pod with an init container, a sidecar, all probes, and all volumes that need no API server."""
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
    """Return a pod like kube-proxy's, with the node's network and processes."""
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
    """Write files as the kubelet does for a ConfigMap: a link to a directory, replaced as a whole."""
    version = shared / "settings/..2026"
    version.mkdir(parents=True)
    (version / "name").write_text("husk\n")
    (shared / "settings/..data").symlink_to("..2026")
    (shared / "settings/name").symlink_to("..data/name")
    (shared / "single").write_text("a single file\n")


@pytest.fixture(scope="module")
def pods(node: Node) -> Node:
    """Add all pods of this module at once, so that they boot in parallel."""
    write_settings(node.shared)
    node.kubelet.add("full", full(node.shared))
    grow = container("grow", "sleep 1; x=x; while true; do x=$x$x; done")
    grow["resources"] = {"limits": {"memory": "32Mi"}}
    node.kubelet.add("hungry", {"containers": [grow]})
    last = container("last", "echo the last words >/dev/termination-log; exit 3")
    node.kubelet.add("ends", {"containers": [last], "restartPolicy": "Never"})
    # a tmpfs of the guest: a volume in memory is on the host's
    load = "dd if=/dev/zero of=/dev/shm/block bs=1M count=50 2>/dev/null; while true; do :; done"
    node.kubelet.add("busy", {"containers": [container("busy", load)]})
    chatter = "n=0; while true; do echo line $n of a log that grows; n=$((n+1)); done"
    node.kubelet.add("shares", of_the_node(node.shared))
    node.kubelet.add("talks", {"containers": [container("talks", f"{chatter} | head -n 4000; sleep 3600")]})
    return node


def log_files(node: Node, pod: str, name: str) -> list[Path]:
    """Return a container's log files: the present one and the rotated ones."""
    directory = node.kubelet.logs / f"default_{pod}-{NODE}_uid-{pod}" / name
    return sorted(directory.glob("0.log*")) if directory.is_dir() else []


def log_content(node: Node, pod: str, name: str) -> bytes:
    """Return all that is logged. The newest rotated file is plain text, older ones are compressed."""
    found = b""
    for file in log_files(node, pod, name):
        content = file.read_bytes()
        found += gzip.decompress(content) if file.suffix == ".gz" else content
    return found


def probed(node: Node) -> int:
    """Count the requests that the web server of the pod "full" has answered with 200, by its log."""
    return log_content(node, "full", "web").count(b"response:200")


def run(node: Node, pod: str, name: str, *argv: str) -> ExecResult:
    """Run a command in a container of a static pod."""
    status = container_of(node.kubelet.pod(pod), name)
    return node.daemon.cri.exec(status["containerID"].removeprefix("husk://"), *argv)


def test_pod_with_init_sidecar_and_probes_becomes_ready(pods: Node) -> None:
    pod = pods.kubelet.wait_for("full", is_ready, 120)
    first = container_of(pod, "first")["state"]["terminated"]
    assert (first["exitCode"], first["reason"]) == (0, "Completed")
    for name in ("sidecar", "web", "second"):
        status = container_of(pod, name)
        assert (status["ready"], status["restartCount"], status["started"]) == (True, 0, True), name
    assert pod["status"]["phase"] == "Running"
    assert pod["status"]["podIP"].startswith("10.88.")
    assert container_of(pod, "web")["resources"]["limits"]["memory"] == "64Mi"


def test_volumes_of_every_kind_are_mounted_and_updated(pods: Node) -> None:
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
    eventually_sync(lambda: seen("cat /settings/name"), until=lambda text: text == "newer\n", timeout_s=20)


def test_host_port_reaches_the_pod(pods: Node) -> None:
    pods.kubelet.wait_for("full", is_ready, 120)
    assert pods.namespace.fetch("127.0.0.1", HOST_PORT) == "hello from the pod\n"


def test_host_network_pod_runs_without_a_vm(pods: Node) -> None:
    pod = pods.kubelet.wait_for("shares", is_ready, 120)
    for name in ("daemon", "loop"):
        assert (container_of(pod, name)["ready"], container_of(pod, name)["restartCount"]) == (True, 0), name
    assert pods.namespace.fetch("127.0.0.1", NODE_PORT) == "hello from the pod\n"
    eventually_sync(
        lambda: pods.kubelet.get(f"/containerLogs/default/shares-{NODE}/daemon"),
        until=lambda text: "200" in text,
        timeout_s=20,
    )
    assert run(pods, "shares", "daemon", "cat", "/shared/single").stdout == "a single file\n"
    assert run(pods, "shares", "daemon", "touch", "/shared/new").code != 0
    sandboxes = pods.daemon.cri.call("ListPodSandbox").items
    (id,) = (each.id for each in sandboxes if each.metadata.name == f"shares-{NODE}")
    assert json.loads(pods.daemon.cri.pod_status(id, verbose=True).info["info"])["isolation"] == "process"

    def usage() -> tuple[float, float]:
        containers = {each["name"]: each for each in summary(pods, "shares").get("containers") or []}
        loop = containers.get("loop", {})
        cpu = loop.get("cpu", {}).get("usageNanoCores", 0) / 1e9
        return cpu, loop.get("memory", {}).get("workingSetBytes", 0) / 1e6

    cpu, memory = eventually_sync(usage, until=lambda each: each[0] > 0.2 and each[1] > 25, timeout_s=60)
    assert 0.2 < cpu <= 1.1
    assert 25 < memory < 120


def test_container_logs_are_served(pods: Node) -> None:
    pods.kubelet.wait_for("full", is_ready, 120)
    eventually_sync(
        lambda: pods.kubelet.get(f"/containerLogs/default/full-{NODE}/web"),
        until=lambda text: "200" in text,
        timeout_s=20,
    )


def test_container_out_of_memory_is_restarted_with_its_reason(pods: Node) -> None:
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


def test_failed_container_reports_message_and_exit_code(pods: Node) -> None:
    pod = pods.kubelet.wait_for("ends", lambda pod: pod["status"]["phase"] == "Failed", 60)
    ended = container_of(pod, "last")["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"], ended["message"]) == (3, "Error", "the last words\n")


def test_log_rotation_loses_no_line(pods: Node) -> None:
    """The kubelet renames a log that is too long and makes the runtime open a new one."""
    eventually_sync(
        lambda: log_files(pods, "talks", "talks"), until=lambda found: len(found) >= 2, timeout_s=60
    )
    eventually_sync(
        lambda: log_content(pods, "talks", "talks").count(b" of a log that grows\n"),
        until=lambda count: count == 4000,
        timeout_s=30,
        retry_on=(OSError,),
    )


# ------------------------------------------------------------------------------------ figures


def summary(node: Node, name: str) -> Mapping[str, Any]:
    pods = node.kubelet.json("/stats/summary")["pods"]
    return next((pod for pod in pods if pod["podRef"]["name"] == f"{name}-{NODE}"), {})


def test_summary_reports_cpu_and_memory_of_a_busy_container(pods: Node) -> None:
    pods.kubelet.wait_for("busy", is_ready, 120)

    def usage() -> tuple[float, float]:
        containers = summary(pods, "busy").get("containers") or [{}]
        cpu = containers[0].get("cpu", {}).get("usageNanoCores", 0) / 1e9
        memory = containers[0].get("memory", {}).get("workingSetBytes", 0) / 1e6
        return cpu, memory

    cpu, memory = eventually_sync(usage, until=lambda each: each[0] > 0.5 and each[1] > 45, timeout_s=60)
    assert 0.5 < cpu <= 1.1
    assert 45 < memory < 80


def busy_metrics(node: Node, page: str) -> dict[str, float]:
    """Return the metrics of the busy container on a page, once its memory is in them."""
    node.kubelet.wait_for("busy", is_ready, 120)

    def read() -> dict[str, float]:
        found = {}
        for line in node.kubelet.get(page).splitlines():
            if line.startswith("container_") and 'container="busy"' in line:
                found[line.partition("{")[0]] = float(line.rpartition("}")[2].split()[0])
        return found

    return eventually_sync(
        read, until=lambda found: found.get("container_memory_working_set_bytes", 0) > 45e6, timeout_s=60
    )


def test_resource_metrics_report_the_busy_container(pods: Node) -> None:
    found = busy_metrics(pods, "/metrics/resource")
    assert found["container_cpu_usage_seconds_total"] > 0
    assert found["container_start_time_seconds"] > 1e9


def test_cadvisor_metrics_come_from_the_runtime(pods: Node) -> None:
    found = busy_metrics(pods, "/metrics/cadvisor")
    assert found["container_cpu_usage_seconds_total"] > 0
    assert found["container_memory_rss"] < found["container_memory_usage_bytes"]


def test_image_file_system_is_known(pods: Node) -> None:
    """The kubelet needs its figures to collect images and to evict pods when the disk is full."""
    images = pods.kubelet.json("/stats/summary")["node"]["runtime"]["imageFs"]
    assert images["capacityBytes"] > images["usedBytes"] > 0
    assert images["inodes"] > 0


# -------------------------------------------------------------------------- restart and removal


def test_runtime_restart_restarts_no_container(pods: Node) -> None:
    before = pods.kubelet.wait_for("full", is_ready, 120)
    pods.daemon.kill()
    pods.daemon.start()
    # eight readiness probes, one a second: the kubelet has listed pods and run every probe again
    answered = probed(pods)
    eventually_sync(
        lambda: probed(pods),
        until=lambda count: count >= answered + 8,
        timeout_s=60,
        retry_on=(OSError,),  # a file that is being rotated
    )
    after = pods.kubelet.wait_for("full", is_ready, 60)
    for name in ("sidecar", "web", "second"):
        old, new = container_of(before, name), container_of(after, name)
        assert (new["containerID"], new["restartCount"]) == (old["containerID"], 0)


def test_pod_deletion_runs_prestop_and_leaves_nothing(pods: Node) -> None:
    pods.kubelet.wait_for("full", is_ready, 120)
    for name in ("full", "hungry", "ends", "busy", "talks", "shares"):
        pods.kubelet.remove(name)
    eventually_sync(
        lambda: [pod.metadata.name for pod in pods.daemon.cri.call("ListPodSandbox").items],
        until=lambda names: names == [],
        timeout_s=120,
    )
    assert (pods.shared / "prestop").read_text() == "stopping\n"
    assert [line for line in pods.daemon.leaks_since(pods.before) if "links: " not in line] == []
    assert json.loads(pods.kubelet.get("/pods"))["items"] in (None, [])


def test_full_disk_evicts_unused_images(node: Node) -> None:
    """The threshold makes the kubelet consider the disk full by the runtime's figures."""
    node.kubelet.stop()
    node.daemon.cri.pull(UNUSED)
    hard = {**MEMORY_EVICTION, "imagefs.available": "99%"}
    node.kubelet.settings = {**MANAGERS, "evictionHard": hard}
    node.kubelet.start()

    def names() -> list[str]:
        images = node.daemon.cri.call("ListImages").images
        return [name for image in images for name in image.repo_tags]

    eventually_sync(names, until=lambda found: UNUSED not in found, timeout_s=60)
