"""A real kubelet, standalone: static pods from a directory, no API server, Husk as its only runtime.

It runs in the test's namespaces. What it would write outside its own directories (/var/log/containers, its
device plug-ins) goes to tmpfs mounts of the namespace. The kernel settings that it requires are the
machine's, so files with the required values are mounted over them in the namespace.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kit.eventually import eventually_sync
from tests.kit.leaks import remove_cgroups
from tests.kit.namespace import Namespace
from tests.kit.scratch import scratch_dir, scratch_root

PORT = 10250
NODE = "node.test"
ADDRESS = "10.99.0.1"  # the node's own; pods have theirs from the bridge
# kernel settings that the kubelet requires (pkg/util/sysctl of Kubernetes)
SETTINGS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


def prepare_node(namespace: Namespace, directory: Path) -> None:
    """Give the namespaces what a node has: an address, kernel settings, directories for the kubelet."""
    script = [
        "set -e",
        f"ip link add node0 type bridge && ip addr add {ADDRESS}/24 dev node0 && ip link set node0 up",
        "ip route add default dev node0",
        "mkdir -p /var/lib/kubelet",
        "mount -t tmpfs -o mode=755 husk-test-kubelet /var/lib/kubelet",
        "mount -t tmpfs -o mode=755 husk-test-log /var/log",
    ]
    for name, value in SETTINGS.items():
        file = directory / name.replace("/", ".")
        file.write_text(f"{value}\n")
        script.append(f"mount --bind {file} /proc/sys/{name}")
    namespace.run("sh", "-c", "\n".join(script))


class KubeletExited(Exception):
    """The process ended by itself; the text is the end of its log."""


@dataclass
class Kubelet:
    """A kubelet in a test namespace, started and stopped by the test."""

    namespace: Namespace
    program: Path
    runtime: Path  # its socket
    directory: Path = field(default_factory=lambda: scratch_dir("kubelet"))
    settings: Mapping[str, object] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def manifests(self) -> Path:
        return self.directory / "manifests"

    @property
    def root(self) -> Path:
        return self.directory / "root"

    @property
    def logs(self) -> Path:
        return self.directory / "pod-logs"

    @property
    def cgroup(self) -> str:
        return f"/{scratch_root().name}/{self.directory.name}"

    def configuration(self) -> Mapping[str, object]:
        configuration: dict[str, object] = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "staticPodPath": str(self.manifests),
            "containerRuntimeEndpoint": f"unix://{self.runtime}",
            "podLogsDir": str(self.logs),
            "volumePluginDir": str(self.directory / "plugins"),
            "address": "127.0.0.1",
            "port": PORT,
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupRoot": self.cgroup,
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": [],
            "resolvConf": "",
            "fileCheckFrequency": "1s",
            "syncFrequency": "5s",
            "volumeStatsAggPeriod": "5s",
            "imageMinimumGCAge": "1s",
            # usage of pods comes from the runtime, not from cgroups on the host
            "featureGates": {"PodAndContainerStatsFromCRI": True},
            "containerLogMaxSize": "20Ki",
            "containerLogMaxFiles": 10,
            "containerLogMonitorInterval": "3s",
            "registerNode": False,
        }
        return configuration | dict(self.settings)

    def start(self) -> None:
        """Start the process and return when it serves /pods.

        Raises KubeletExited when it exits, AssertionError after 60 s, both with the end of its log.
        """
        for each in (self.manifests, self.root, self.logs, self.directory / "certificates"):
            each.mkdir(exist_ok=True)
        for hierarchy in _hierarchies():
            (hierarchy / self.cgroup.lstrip("/")).mkdir(parents=True, exist_ok=True)
        config = self.directory / "config.json"
        config.write_text(json.dumps(self.configuration(), indent=1))
        command = [
            str(self.program),
            f"--config={config}",
            f"--root-dir={self.root}",
            f"--cert-dir={self.directory / 'certificates'}",
            f"--hostname-override={NODE}",
            f"--node-ip={ADDRESS}",
            "--v=2",
        ]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.namespace.command(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        eventually_sync(
            self._answers,
            timeout_s=60,
            describe=lambda: f"the kubelet answers; its log:\n{self.log_text()[-6000:]}\n",
            retry_on=(OSError, http.client.HTTPException, RuntimeError),
        )

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise KubeletExited(self.log_text()[-6000:])
        self.get("/pods")
        return True

    @property
    def log_path(self) -> Path:
        return self.directory / "kubelet.log"

    def log_text(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def close(self) -> None:
        """Idempotent. The pods are the runtime's; take the manifests away first."""
        self.stop()
        left = f"grep -o '{self.directory}[^ ]*' /proc/self/mounts | sort -ru | xargs -r umount -l"
        self.namespace.run("sh", "-c", left)
        remove_cgroups(scratch_root().name)

    # --------------------------------------------------------------------------- its port

    def get(self, path: str, timeout_s: float = 10) -> str:
        """Return the body of a response. Raises RuntimeError for a status other than 200."""
        connection = http.client.HTTPSConnection("127.0.0.1", PORT, timeout=timeout_s)
        connection.sock = self.dial_tls(timeout_s)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read().decode(errors="replace")
        finally:
            connection.close()
        if answer.status != 200:
            raise RuntimeError(f"GET {path}: {answer.status} {body[:500]}")
        return body

    def dial_tls(self, timeout_s: float = 10) -> ssl.SSLSocket:
        """A connection to its port; the certificate is one that it made for itself."""
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context.wrap_socket(self.namespace.dial("127.0.0.1", PORT, timeout_s))

    def dial_plain(self, host: str, port: int) -> socket.socket:
        """Its port without TLS, for a client that speaks none: a thread carries the bytes."""
        mine, theirs = socket.socketpair()
        threading.Thread(target=_carry, args=(self.dial_tls(60), mine), daemon=True).start()
        return theirs

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))

    # ------------------------------------------------------------------------------- pods

    def add(self, name: str, spec: Mapping[str, object], **metadata: object) -> None:
        """Have it run a static pod. Written beside and renamed, so that no half of it is read."""
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "uid": f"uid-{name}", **metadata},
            "spec": {"terminationGracePeriodSeconds": 2, **spec},
        }
        staged = self.directory / f"{name}.json"
        staged.write_text(json.dumps(pod))
        shutil.move(staged, self.manifests / staged.name)

    def remove(self, name: str) -> None:
        (self.manifests / f"{name}.json").unlink(missing_ok=True)

    def pod(self, name: str) -> Any:
        """Return a static pod as /pods has it, None if absent. The kubelet appends the node to its name."""
        found = [
            pod for pod in self.json("/pods")["items"] or () if pod["metadata"]["name"] == f"{name}-{NODE}"
        ]
        return found[0] if found else None

    def wait_for(self, name: str, ready: Callable[[Any], bool], timeout_s: float = 60) -> Any:
        """Return the pod when `ready` is true of it; raises AssertionError with its status and the log."""

        def state() -> str:
            pod = self.pod(name)
            status = json.dumps(pod["status"] if pod else None, indent=1)
            return f"pod {name}; its status: {status}\n{self.log_text()[-3000:]}\n"

        return eventually_sync(
            lambda: self.pod(name),
            until=lambda pod: pod is not None and ready(pod),
            timeout_s=timeout_s,
            describe=state,
        )


def _carry(tls: ssl.SSLSocket, plain: socket.socket) -> None:
    """Copy both ways until one end closes, then close both. In one thread, as TLS cannot be split in two."""
    with tls, plain, contextlib.suppress(OSError):
        while True:
            ready = [tls] if tls.pending() else select.select([tls, plain], [], [])[0]
            if tls in ready:
                tls.setblocking(False)  # a record may carry no application data
                with contextlib.suppress(ssl.SSLWantReadError):
                    data = tls.recv(1 << 16)
                    if not data:
                        return
                    plain.sendall(data)
            if plain in ready:
                data = plain.recv(1 << 16)
                if not data:
                    return
                tls.setblocking(True)
                tls.sendall(data)


def is_ready(pod: Any) -> bool:
    """Return whether the pod's Ready condition is true."""
    conditions = pod["status"].get("conditions") or ()
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def container_of(pod: Any, name: str) -> Any:
    """Return the status of a container, an init container or a sidecar."""
    status = pod["status"]
    every = [*status.get("containerStatuses", ()), *status.get("initContainerStatuses", ())]
    return next(each for each in every if each["name"] == name)


def _hierarchies() -> list[Path]:
    """Return every cgroup hierarchy that the kubelet may use: all on a v1 host, the only one on v2."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(line[1]) for line in lines if line[2] in ("cgroup", "cgroup2")]
