"""Debian's containerd with its CRI plug-in, as the baseline, wholly inside a test namespace."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import grpc

from tests.kit.cri import Cri
from tests.kit.eventually import eventually_sync
from tests.kit.leaks import remove_cgroups
from tests.kit.namespace import Namespace
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir, scratch_root

CONFIG = """version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.internal.v1.opt"]
[grpc]
  address = "{directory}/containerd.sock"
[ttrpc]
  address = "{directory}/containerd.sock.ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{host}/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{cni}"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{mirrors}"
"""


class Containerd:
    """Start and end containerd, with the part of `kit.daemon.Daemon`'s interface that the benchmark uses."""

    name = "containerd"

    def __init__(self, namespace: Namespace, cni: Path, mirrors: Path) -> None:
        program = shutil.which("containerd")
        if program is None or shutil.which("runc") is None:
            raise FileNotFoundError("containerd and runc (Debian packages containerd, runc)")
        self.directory = scratch_dir("containerd")
        self.socket = self.directory / "containerd.sock"
        config = self.directory / "config.toml"
        config.write_text(CONFIG.format(directory=self.directory, cni=cni, mirrors=mirrors, host=HOST))
        self._namespace = namespace
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                namespace.command([program, "--config", str(config)]),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._cgroup = f"/{scratch_root().name}"
        self.cri = Cri(self.socket, self.directory / "logs", cgroup_parent=self._cgroup)
        self._await_ready()

    @property
    def pid(self) -> int:
        return self._process.pid

    def version(self) -> str:
        answer = self.cri.call("Version")
        return f"{answer.runtime_name} {answer.runtime_version}"

    def _await_ready(self, timeout_s: float = 30) -> None:
        def answers() -> bool:
            if self._process.poll() is not None:
                raise RuntimeError(f"containerd has exited with status {self._process.returncode}")
            self.cri.call("Version", timeout_s=2)
            return True

        try:
            eventually_sync(answers, timeout_s=timeout_s, retry_on=(grpc.RpcError,))
        except (AssertionError, RuntimeError) as error:
            log = (self.directory / "log").read_text()
            self.close()
            raise RuntimeError(f"containerd did not start: {error}\n{log[-4000:]}") from error

    def close(self) -> None:
        """Remove every pod, then end the daemon and what it has mounted. Idempotent."""
        try:
            for pod in self.cri.call("ListPodSandbox").items:
                self.cri.stop_pod(pod.id)
                self.cri.remove_pod(pod.id)
        except grpc.RpcError:
            pass  # it has exited or is broken; what it mounted is still released below
        self.cri.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        remove_cgroups(self._cgroup)
