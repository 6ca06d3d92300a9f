"""`husk serve` as a real process in a test namespace, with state, socket and configuration of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import grpc

from tests.kit.cni import PLUGINS
from tests.kit.cri import Cri
from tests.kit.leaks import Census, processes_naming, remove_cgroups, take_census
from tests.kit.namespace import Namespace
from tests.kit.scratch import scratch_dir, scratch_root

REPOSITORY = Path(__file__).resolve().parents[2]
GUEST_VARIABLE = "HUSK_TEST_GUEST"  # a directory with vmlinux and initramfs, as `husk guest build` prints


class Daemon:
    """Starts, kills and restarts one daemon; its pods live on in the namespace until `close`."""

    name = "husk"

    def __init__(
        self,
        namespace: Namespace,
        cni: Path,
        mirrors: Path,
        *,
        leases: Path | None = None,
        settings: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None:
        self.namespace = namespace
        self.directory = scratch_dir()
        self.root = self.directory / "root"
        self.socket = self.directory / "husk.sock"
        self.log_path = self.directory / "serve.log"
        self.leases = leases or cni.parent / "leases"
        self.cgroup = f"/{scratch_root().name}/{self.directory.name}"
        self.cdi_dirs = (self.directory / "cdi", self.directory / "cdi-run")
        self.config = self.directory / "config.toml"
        self._write_config(cni, mirrors, settings or {})
        self._link_guest_image()
        self._process: subprocess.Popen[bytes] | None = None
        self.cri = Cri(self.socket, self.directory / "logs")

    def _write_config(self, cni: Path, mirrors: Path, settings: Mapping[str, Mapping[str, object]]) -> None:
        wished: dict[str, dict[str, object]] = {
            "": {
                "run": str(self.run_directory),
                "cgroup_root": self.cgroup,
                "default_handler": "std",
            },
            # VMs that wait for a pod would be in every census; tests of the pool ask for it
            "handlers.std": {"source": "template"},
            "cni": {"conf_dir": str(cni), "bin_dirs": [str(PLUGINS)]},
            "registry": {"config_path": str(mirrors)},
            "cdi": {"spec_dirs": [str(directory) for directory in self.cdi_dirs]},
        }
        for section, values in settings.items():
            wished[section] = wished.get(section, {}) | dict(values)
        text = ""
        for section, values in wished.items():
            text += f"[{section}]\n" if section else ""
            # a JSON string, number, boolean or list of them is the same in TOML
            text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()) + "\n"
        self.config.write_text(text)

    def _link_guest_image(self) -> None:
        guest = os.environ.get(GUEST_VARIABLE)
        self.root.mkdir(mode=0o711)
        if guest:
            (self.root / "guest").symlink_to(guest)

    # --------------------------------------------------------------------------- life cycle

    @property
    def run_directory(self) -> Path:
        return self.directory / "run"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the daemon was not started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def command(self, *arguments: str) -> list[str]:
        """`husk` with this daemon's options, run inside the namespace."""
        options = ["--root", str(self.root), "--socket", str(self.socket), "--config", str(self.config)]
        return self.namespace.command([sys.executable, "-m", "cri", *arguments, *options])

    def launch(self) -> None:
        """Start the process, and wait for nothing."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command("serve"),
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start(self, deadline_s: float = 30) -> None:
        """Returns once Version answers; raises RuntimeError with the daemon's log."""
        self.launch()
        end = time.monotonic() + deadline_s
        while True:
            try:
                self.cri.call("Version", timeout_s=2)
                return
            except grpc.RpcError:
                if not self.alive or time.monotonic() > end:
                    raise RuntimeError(f"husk serve did not start:\n{self.log_text()[-6000:]}") from None
                time.sleep(0.05)

    def terminate(self, deadline_s: float = 30) -> int:
        """SIGTERM, and the exit status."""
        return self._end(signal.SIGTERM, deadline_s)

    def kill(self) -> int:
        """SIGKILL, and the exit status."""
        return self._end(signal.SIGKILL, 10)

    def _end(self, number: signal.Signals, deadline_s: float) -> int:
        assert self._process is not None, "the daemon was not started"
        self._process.send_signal(number)
        return self._process.wait(deadline_s)

    def close(self) -> None:
        """Remove all pods through a living daemon, then end it. Idempotent."""
        if self._process is None:
            return
        if self.alive:
            try:
                self.remove_all()
            finally:
                try:
                    self.terminate()
                except subprocess.TimeoutExpired:
                    self.kill()
                    raise
        self.cri.close()
        self._process = None
        remove_cgroups(scratch_root().name)

    def remove_all(self) -> None:
        for pod in self.cri.call("ListPodSandbox").items:
            self.cri.stop_pod(pod.id)
            self.cri.remove_pod(pod.id)

    # -------------------------------------------------------------------------------- VMs

    def vmm_pids(self, pod_id: str) -> list[int]:
        """The hypervisor processes of a pod, known by the name they were given."""
        found = (each.split(" ", 2) for each in processes_naming(f"husk-{pod_id}"))
        return [int(pid) for pid, program, *_ in found if "qemu-system" in program]

    def kill_vmm(self, pod_id: str) -> None:
        pids = self.vmm_pids(pod_id)
        assert pids, f"no VM runs for pod {pod_id}"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    # ----------------------------------------------------------------------------- evidence

    def version(self) -> str:
        answer = self.cri.call("Version")
        return f"{answer.runtime_name} {answer.runtime_version}"

    def log_text(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def evidence(self) -> str:
        """What helps to understand a failure: the daemon's last lines and each guest's console."""
        parts = [f"--- last lines of {self.log_path}", self.log_text()[-8000:]]
        for console in sorted(self.run_directory.glob("pods/*/console*.log")):
            parts += [f"--- {console}", console.read_text(errors="replace")[-4000:]]
        return "\n".join(parts)

    def census(self) -> Census:
        own = frozenset({self.pid}) if self._process is not None else frozenset()
        return take_census(self.namespace, self.root, self.run_directory, self.leases, self.cgroup, own)

    def leaks_since(self, before: Census, patience_s: float = 30) -> list[str]:
        """What is left since `before`; looks again for a while, as ended processes take a moment
        and a template that is being made has parts of a VM."""
        end = time.monotonic() + patience_s
        while (found := self.census().since(before)) and time.monotonic() < end:
            time.sleep(0.1)
        return found
