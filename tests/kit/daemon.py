"""`husk serve` as a real process in a test namespace, with its own state, socket and configuration."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from sandbox.vm_pods.boot_image import ACL_MODULE, find_image
from tests.kit.cni import PLUGINS
from tests.kit.cri import Cri
from tests.kit.eventually import eventually_sync
from tests.kit.leaks import Census, processes_naming, remove_cgroups, take_census, wait_for_leaks
from tests.kit.namespace import Namespace
from tests.kit.scratch import scratch_dir, scratch_root

REPOSITORY = Path(__file__).resolve().parents[2]
GUEST_VARIABLE = "HUSK_TEST_GUEST"  # a directory with vmlinux and initramfs, as `husk guest build` prints


@dataclass(frozen=True)
class Program:
    """A build of Husk: its tree, the Python that it runs under, and its guest image."""

    tree: Path = REPOSITORY
    python: Path = Path(sys.executable)
    guest: Path | None = field(default_factory=lambda: _guest_of_environment())


def _guest_of_environment() -> Path | None:
    guest = os.environ.get(GUEST_VARIABLE)
    return Path(guest) if guest else None


def acls_on_volumes() -> bool:
    """Return whether the guest's kernel has the module for it."""
    image = find_image(Path(os.environ[GUEST_VARIABLE]).parent)
    assert image is not None
    return ACL_MODULE in image.modules


class Daemon:
    """Start, kill and restart one daemon. Its pods keep running in the namespace until `close`."""

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
        self.root.mkdir(mode=0o711)
        self.use(Program())
        self._process: subprocess.Popen[bytes] | None = None
        self.cri = Cri(self.socket, self.directory / "logs")

    def _write_config(self, cni: Path, mirrors: Path, settings: Mapping[str, Mapping[str, object]]) -> None:
        sections: dict[str, dict[str, object]] = {
            "": {
                "run": str(self.run_directory),
                "cgroup_root": self.cgroup,
                "default_handler": "std",
            },
            # pooled VMs would appear in every census; tests of the pool configure one
            "handlers.std": {"source": "template"},
            "cni": {"conf_dir": str(cni), "bin_dirs": [str(PLUGINS)]},
            "registry": {"config_path": str(mirrors)},
            "cdi": {"spec_dirs": [str(directory) for directory in self.cdi_dirs]},
        }
        for section, values in settings.items():
            sections[section] = sections.get(section, {}) | dict(values)
        text = ""
        for section, values in sections.items():
            text += f"[{section}]\n" if section else ""
            # JSON strings, numbers, booleans and lists of them are valid TOML values
            text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()) + "\n"
        self.config.write_text(text)

    def use(self, program: Program) -> None:
        """Let the next start be of this build. New pods boot its guest image at once."""
        self.program = program
        link = self.root / "guest"
        link.unlink(missing_ok=True)
        if program.guest is not None:
            link.symlink_to(program.guest)

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
        """Return the argv of `husk` with this daemon's options, run inside the namespace."""
        options = ["--root", str(self.root), "--socket", str(self.socket), "--config", str(self.config)]
        return self.namespace.command([str(self.program.python), "-m", "cri", *arguments, *options])

    def launch(self) -> None:
        """Start the process without waiting for its socket."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command("serve"),
                cwd=self.program.tree,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start(self, timeout_s: float = 30) -> None:
        """Start the process and return when it answers Version.

        Raises RuntimeError when it exits, and AssertionError after the timeout, with the daemon's log.
        """
        self.launch()
        eventually_sync(
            lambda: self.cri.call("Version", timeout_s=2) if self.require_alive() else None,
            timeout_s=timeout_s,
            describe=lambda: f"husk serve answers; its log:\n{self.log_text()[-6000:]}\n",
            retry_on=(grpc.RpcError,),
        )

    def require_alive(self) -> bool:
        """Return True while the process runs; raise RuntimeError with its log when it has exited."""
        if not self.alive:
            raise RuntimeError(f"husk serve has exited:\n{self.log_text()[-6000:]}")
        return True

    def terminate(self, timeout_s: float = 30) -> int:
        """Send SIGTERM and return the exit status. Raises subprocess.TimeoutExpired."""
        return self._end(signal.SIGTERM, timeout_s)

    def kill(self) -> int:
        """Send SIGKILL and return the exit status."""
        return self._end(signal.SIGKILL, 10)

    def _end(self, number: signal.Signals, timeout_s: float) -> int:
        assert self._process is not None, "the daemon was not started"
        self._process.send_signal(number)
        return self._process.wait(timeout_s)

    def close(self) -> None:
        """Remove all pods if the daemon runs, then end it. Idempotent."""
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
        """Stop and remove every pod."""
        for pod in self.cri.call("ListPodSandbox").items:
            self.cri.stop_pod(pod.id)
            self.cri.remove_pod(pod.id)

    # -------------------------------------------------------------------------------- VMs

    def vmm_pids(self, pod_id: str) -> list[int]:
        """Return the pids of a pod's hypervisor processes, found by the VM's name in their arguments."""
        found = (each.split(" ", 2) for each in processes_naming(f"husk-{pod_id}"))
        return [int(pid) for pid, program, *_ in found if "qemu-system" in program]

    def kill_vmm(self, pod_id: str) -> None:
        """Send SIGKILL to a pod's hypervisor; fails when none runs."""
        pids = self.vmm_pids(pod_id)
        assert pids, f"no VM runs for pod {pod_id}"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    # ----------------------------------------------------------------------------- evidence

    def version(self) -> str:
        """Return name and version of the runtime, as the Version call answers them."""
        answer = self.cri.call("Version")
        return f"{answer.runtime_name} {answer.runtime_version}"

    def log_text(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def evidence(self) -> str:
        """Return the daemon's last log lines and each guest's console, for the report of a failed test."""
        parts = [f"--- last lines of {self.log_path}", self.log_text()[-8000:]]
        for console in sorted(self.run_directory.glob("pods/*/console*.log")):
            parts += [f"--- {console}", console.read_text(errors="replace")[-4000:]]
        return "\n".join(parts)

    def census(self) -> Census:
        own = frozenset({self.pid}) if self._process is not None else frozenset()
        return take_census(self.namespace, self.root, self.run_directory, self.leases, self.cgroup, own)

    def leaks_since(self, before: Census, timeout_s: float = 30) -> list[str]:
        """Return what is left since `before`, empty if nothing is.

        Polls for up to `timeout_s`: killed processes take a moment to end, and a template that is being built
        holds parts of a VM.
        """
        return wait_for_leaks(lambda: self.census().since(before), timeout_s)
