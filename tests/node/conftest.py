"""crictl against the real daemon. The binary comes from tests/node/build-tool."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Site
from tests.kit.daemon import Daemon
from tests.kit.gotools import tool
from tests.kit.namespace import Namespace


@dataclass(frozen=True)
class Running:
    """Ids of a pod and of a container in it, and the file that the pod was created from."""

    pod: str
    pod_file: str
    container: str


@dataclass(frozen=True)
class Crictl:
    """Run crictl in the daemon's namespace."""

    binary: str
    namespace: Namespace
    socket: Path
    directory: Path  # for configuration files of pods and containers

    def command(self, *words: str) -> list[str]:
        """Return the argv of crictl, run in the daemon's namespace, as URLs of streams are on its loopback.

        The timeout replaces crictl's 2 s, too short for a VM that boots under emulation.
        """
        config = self.directory / "crictl.yaml"
        config.touch()  # in place of the machine's configuration
        end_points = [f"--{kind}-endpoint=unix://{self.socket}" for kind in ("runtime", "image")]
        command = [self.binary, f"--config={config}", *end_points, "--timeout=60s", *words]
        return self.namespace.command(command)

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = self.command(*words)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if check and done.returncode != 0:
            raise AssertionError(f"crictl {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def say(self, *words: str) -> str:
        """Return what a command prints, without surrounding white space. Raises AssertionError."""
        return self.run(*words).stdout.strip()

    def json(self, *words: str) -> Any:
        """Return a command's JSON output. crictl accepts flags only before the first name."""
        return json.loads(self.run(words[0], "-o", "json", *words[1:]).stdout)

    def file(self, name: str, document: object) -> str:
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps(document))
        return str(path)

    def pod_file(self, name: str, **fields: object) -> str:
        metadata = {"name": name, "uid": f"uid-{name}", "namespace": "default", "attempt": 0}
        logs = self.directory / "logs" / name
        logs.mkdir(parents=True, exist_ok=True)
        document = {"metadata": metadata, "log_directory": str(logs), "linux": {}} | fields
        return self.file(f"pod-{name}", document)

    def start(self, pod: str, container: str, image: str, command: list[str], **fields: object) -> Running:
        """Run a pod with a container of a pulled image; `fields` are the pod's."""
        pod_file = self.pod_file(pod, **fields)
        pod_id = self.say("runp", pod_file)
        container_id = self.say("create", pod_id, self.container_file(container, image, command), pod_file)
        self.run("start", container_id)
        return Running(pod_id, pod_file, container_id)

    def container_file(self, name: str, image: str, command: list[str], **fields: object) -> str:
        document: dict[str, object] = {
            "metadata": {"name": name},
            "image": {"image": image},
            "command": command,
            "log_path": f"{name}.log",
            "linux": {},
        }
        return self.file(f"container-{name}", document | fields)


@pytest.fixture(scope="module")
def crictl(site: Site, daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Crictl:
    """Return a crictl for the module's daemon."""
    return Crictl(str(tool("crictl")), site.namespace, daemon.socket, tmp_path_factory.mktemp("crictl"))


@pytest.fixture(autouse=True)
def leave_nothing(tidy: None) -> None:
    """Check for leaks after each test."""
