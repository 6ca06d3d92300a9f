"""Bad input to the real daemon: a clear error each time, and nothing left behind afterwards."""

from __future__ import annotations

import http.server
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit import images
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
METRICS_PORT = 9477  # the default


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cgroup_rot = '/x'", ["cgroup_rot", "cgroup_root"]),
        ("[handlers.big]\nmemory_mib = 'many'", ["handlers.big.memory_mib"]),
        ("root = ", ["TOML"]),
    ],
)
def test_broken_configuration_exits_with_2_and_names_the_key(
    daemon: Daemon, tmp_path: Path, text: str, names: list[str]
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(text)
    command = [word if word != str(daemon.config) else str(config) for word in daemon.command("serve")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    for name in [str(config), *names]:
        assert name in done.stderr


def test_pull_of_unknown_image_is_not_found(cri: Cri) -> None:
    with pytest.raises(grpc.RpcError) as fault:
        cri.pull(f"{HOST}/husk/nonesuch:1")
    assert fault.value.code() == grpc.StatusCode.NOT_FOUND
    assert "husk/nonesuch" in str(fault.value.details())


def test_container_of_an_image_not_pulled_is_not_found(cri: Cri, pod: Pod) -> None:
    with pytest.raises(grpc.RpcError) as fault:
        cri.create(pod, f"{HOST}/husk/never-pulled:1")
    assert fault.value.code() == grpc.StatusCode.NOT_FOUND


class Spoiler(http.server.BaseHTTPRequestHandler):
    """A registry that fails in the way that the repository's name says."""

    layer = images.mark("spoiled").packed()
    image = images.Image((images.mark("spoiled"),))
    released = threading.Event()  # ends requests that hang

    def do_GET(self) -> None:
        kind = self.path.split("/")[2]
        if kind == "hangs":
            self.released.wait()
        elif kind.isdigit():
            self.answer(int(kind), b"{}")
        elif "/manifests/" in self.path:
            self.answer(200, self.image.manifest(), images.Form.OCI.manifest)
        elif images.digest_of(self.image.config()) in self.path:
            self.answer(200, self.image.config())
        elif kind == "truncated":
            self.answer(200, self.layer[: len(self.layer) // 2], length=len(self.layer))
        else:
            self.answer(200, b"x" * len(self.layer))

    do_HEAD = do_GET

    def answer(
        self, status: int, body: bytes, media: str = "application/octet-stream", length: int = 0
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def spoiler(site: Site) -> Iterator[str]:
    """A host name whose mirror is a Spoiler on loopback inside the namespace."""
    Spoiler.released.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Spoiler, bind_and_activate=False)
    server.socket.close()
    server.socket = site.namespace.listen("127.0.0.1", 5999)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    folder = site.mirrors / "spoiled.test"
    folder.mkdir(exist_ok=True)
    url = "http://127.0.0.1:5999"
    (folder / "hosts.toml").write_text(
        f'server = "{url}"\n[host."{url}"]\n  capabilities = ["pull", "resolve"]\n'
    )
    yield "spoiled.test"
    Spoiler.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("kind", ["401", "429", "500", "truncated", "wrong-bytes"])
def test_pull_from_failing_registry_names_it_and_leaves_nothing(cri: Cri, spoiler: str, kind: str) -> None:
    before = {each.id for each in cri.call("ListImages").images}
    with pytest.raises(grpc.RpcError) as fault:
        cri.pull(f"{spoiler}/{kind}/image:1")
    assert fault.value.code() != grpc.StatusCode.DEADLINE_EXCEEDED
    # the host, or the blob whose bytes are not what its digest says
    assert any(name in str(fault.value.details()) for name in (spoiler, "127.0.0.1", "blob sha256:"))
    assert {each.id for each in cri.call("ListImages").images} == before


def test_registry_that_hangs_delays_no_other_pull(cri: Cri, spoiler: str) -> None:
    hanging = cri.begin("PullImage", image=api.ImageSpec(image=f"{spoiler}/hangs/image:1"))
    cri.pull(BUSYBOX)
    cri.pull(f"{HOST}/husk/web:1")
    assert not hanging.done()
    Spoiler.released.set()  # closes the connection without a response, also of each retry
    fault = hanging.exception()
    assert fault.code() == grpc.StatusCode.UNAVAILABLE
    assert "127.0.0.1:5999" in fault.details()


def test_pull_by_unknown_digest_is_not_found(cri: Cri) -> None:
    with pytest.raises(grpc.RpcError) as fault:
        cri.pull(f"{HOST}/husk/busybox@sha256:{'0' * 64}")
    assert fault.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "script",
    [
        'echo \'{"cniVersion": "1.0.0", "code": 11, "msg": "made to fail"}\'; exit 1',
        "echo this is not JSON",
        "echo made to fail >&2; kill -9 $$",
    ],
    ids=["error", "rubbish", "killed"],
)
def test_failing_cni_plugin_is_named_and_leaves_nothing(site: Site, tmp_path: Path, script: str) -> None:
    plugins, conf = tmp_path / "bin", tmp_path / "net.d"
    plugins.mkdir()
    conf.mkdir()
    plugin = plugins / "failing"
    plugin.write_text(f'#!/bin/sh\ncat >/dev/null\n[ "$CNI_COMMAND" = ADD ] || exit 0\n{script}\n')
    plugin.chmod(0o755)
    (conf / "10.conflist").write_text(
        '{"cniVersion": "1.0.0", "name": "broken", "plugins": [{"type": "failing"}]}'
    )
    settings: dict[str, dict[str, object]] = {
        "cni": {"conf_dir": str(conf), "bin_dirs": [str(plugins)]},
        "metrics": {"port": 0},
    }
    daemon = Daemon(site.namespace, site.cni, site.mirrors, leases=site.leases, settings=settings)
    daemon.start()
    try:
        before = daemon.census()
        with pytest.raises(grpc.RpcError) as fault:
            daemon.cri.run_pod("no-network")
        assert "failing" in str(fault.value.details()) or "made to fail" in str(fault.value.details())
        assert not daemon.cri.call("ListPodSandbox").items
        assert daemon.leaks_since(before) == []
    finally:
        daemon.close()


def test_missing_cni_configuration_is_reported_and_used_once_it_appears(site: Site, tmp_path: Path) -> None:
    conf = tmp_path / "net.d"
    conf.mkdir()
    settings: dict[str, dict[str, object]] = {"cni": {"conf_dir": str(conf)}, "metrics": {"port": 0}}
    daemon = Daemon(site.namespace, site.cni, site.mirrors, leases=site.leases, settings=settings)
    daemon.start()
    try:

        def network() -> Any:
            conditions = daemon.cri.call("Status").status.conditions
            return next(each for each in conditions if each.type == "NetworkReady")

        missing = network()
        assert not missing.status
        assert str(conf) in missing.message
        before = daemon.census()
        with pytest.raises(grpc.RpcError):
            daemon.cri.run_pod("no-network")
        assert daemon.leaks_since(before) == []
        for file in site.cni.iterdir():
            (conf / file.name).write_bytes(file.read_bytes())
        eventually_sync(network, until=lambda condition: condition.status, timeout_s=15)
    finally:
        daemon.close()


def test_serve_with_metrics_port_in_use_leaves_pods_alone(
    daemon: Daemon, cri: Cri, pod: Pod, site: Site
) -> None:
    container = cri.run(pod, BUSYBOX, ["sleep", "3600"])
    vmm = daemon.vmm_pids(pod.id)
    assert daemon.terminate() == 0
    with site.namespace.listen("127.0.0.1", METRICS_PORT):
        done = subprocess.run(
            daemon.command("serve"), capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 2
    assert "metrics.port" in done.stderr and "recovered" not in done.stderr
    daemon.start()
    assert daemon.vmm_pids(pod.id) == vmm
    assert cri.exec(container, "true").code == 0


def test_missing_program_is_named_by_doctor(daemon: Daemon) -> None:
    command = daemon.command("doctor")
    separator = command.index("--")
    hidden = [*command[: separator + 1], "env", "PATH=/nonexistent", *command[separator + 1 :]]
    done = subprocess.run(hidden, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "qemu-system-x86" in done.stdout + done.stderr
