"""The pod of deploy/quickstart: builds a sample image, runs a pod over the CRI socket, prints what it shows.

quickstart_pod.py image FILE          write an image with a small web server, made from Debian's busybox
quickstart_pod.py run SOCKET LOGS     run a pod with it; print times, page and log, and the pod's id last
quickstart_pod.py stop SOCKET POD     stop and remove that pod
"""

from __future__ import annotations

import json
import platform
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from cri.cli.client import CallFailed, Client
from cri.proto import runtime_v1_pb2 as pb
from tests.kit import images

IMAGE = "example.test/husk/hello:1"
PAGE = "Hello from a pod that is a virtual machine.\n"
RUNTIME = pb.DESCRIPTOR.services_by_name["RuntimeService"]
POD_NAME = "quickstart"


def write_image(file: str) -> None:
    """Write the sample image as a tar of an OCI layout."""
    images.write_oci_layout(Path(file), {IMAGE: images.web(PAGE)})


class Quickstart:
    """Calls of the RuntimeService that run and show one pod."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def call(self, method: str, **fields: Any) -> Any:
        """Call an rpc with these fields in its request. Raises CallFailed."""
        kind = getattr(pb, f"{method}Request")
        return self._client.call(RUNTIME, method, kind(**fields), timeout_s=240)

    def run(self, logs: Path) -> str:
        """Run a pod, print what it shows and return its id. On failure the pod is removed again."""
        self._print_status()
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=POD_NAME, uid=f"{time.time_ns()}", namespace="default"),
            hostname=POD_NAME,
            log_directory=str(logs),
            linux=pb.LinuxPodSandboxConfig(),
        )
        begin = time.monotonic()
        pod = self.call("RunPodSandbox", config=config).pod_sandbox_id
        try:
            spent = {"pod": time.monotonic() - begin}
            container = self._container(pod, config, spent)
            self._print_outcome(pod, container, spent)
        except BaseException:
            self.stop(pod)
            raise
        return str(pod)

    def _print_status(self) -> None:
        info = self.call("Status", verbose=True).info
        accelerator, reason = (
            json.loads(info.get(key, '""')) for key in ("accelerator", "acceleratorReason")
        )
        print(f"accelerator:   {accelerator}" + (f" ({reason})" if reason else ""))

    def _container(self, pod: str, config: pb.PodSandboxConfig, spent: dict[str, float]) -> str:
        begin = time.monotonic()
        request = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name="web"), image=pb.ImageSpec(image=IMAGE), log_path="web.log"
        )
        made = self.call("CreateContainer", pod_sandbox_id=pod, config=request, sandbox_config=config)
        spent["container created"] = time.monotonic() - begin
        begin = time.monotonic()
        self.call("StartContainer", container_id=made.container_id)
        spent["container started"] = time.monotonic() - begin
        return str(made.container_id)

    def _print_outcome(self, pod: str, container: str, spent: dict[str, float]) -> None:
        kernel = self.call("ExecSync", container_id=container, cmd=["uname", "-r"], timeout=30).stdout
        print(f"host kernel:   {platform.release()}")
        print(f"guest kernel:  {kernel.decode().strip()}")
        status = self.call("PodSandboxStatus", pod_sandbox_id=pod, verbose=True)
        print("time:")
        for name, seconds in spent.items():
            print(f"  {name:24} {1000 * seconds:7.0f} ms")
        for phase in json.loads(status.info["info"]).get("phases", []):
            print(f"    {phase['name']:22} {1000 * (phase['endSeconds'] - phase['beginSeconds']):7.0f} ms")
        url = f"http://{status.status.network.ip}/"
        print(f"page at {url}\n  {fetch(url).strip()}")
        log = Path(self.call("ContainerStatus", container_id=container).status.log_path)
        print(f"log {log}")
        for line in log_lines(log):
            print(f"  {line}")
        print(f"pod {pod}", flush=True)

    def stop(self, pod: str) -> None:
        """Stop and remove a pod. Raises CallFailed."""
        self.call("StopPodSandbox", pod_sandbox_id=pod)
        self.call("RemovePodSandbox", pod_sandbox_id=pod)


def fetch(url: str, deadline_s: float = 20) -> str:
    """Return the page as soon as the server listens. Raises OSError at the deadline."""
    # no proxy of the environment: it cannot reach a pod's address
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + deadline_s
    while True:
        try:
            with opener.open(url, timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def log_lines(log: Path, deadline_s: float = 5) -> list[str]:
    """Return the log's lines, once there is one: the last request is logged a moment after its response."""
    end = time.monotonic() + deadline_s
    while not (text := log.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    return text.splitlines()


def main(arguments: list[str]) -> int:
    """Run one of the three commands; return the exit status."""
    match arguments:
        case ["image", file]:
            write_image(file)
        case ["run", socket, logs]:
            with Client(Path(socket)) as client:
                Quickstart(client).run(Path(logs))
        case ["stop", socket, pod]:
            with Client(Path(socket)) as client:
                Quickstart(client).stop(pod)
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (CallFailed, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        sys.exit(1)
