"""Debian's docker-registry on loopback, a real busybox in it, and the registry's death and return."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from image.errors import ManifestNotFound, RegistryUnavailable
from image.image_store import ImageStore
from image.options import ImageOptions
from image.registry import Timing
from tests.kit.eventually import eventually_sync
from tests.kit.images import Form, Image, busybox, digest_of, index_of

STARTED_S = 20.0


class DockerRegistry:
    """Debian's docker-registry on a free port of loopback, outside of any namespace."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("docker-registry")
        assert program is not None, "docker-registry (Debian package docker-registry)"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._command = [program, "serve", str(folder / "config.yml")]
        self._log = folder / "log"
        (folder / "config.yml").write_text(
            "version: 0.1\nlog: {level: warn, accesslog: {disabled: true}}\n"
            f'storage: {{filesystem: {{rootdirectory: "{folder}/data"}}}}\n'
            f'http: {{addr: "127.0.0.1:{self.port}"}}\n'
        )
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        eventually_sync(self._accepts, timeout_s=STARTED_S, retry_on=(OSError,), describe=self._log.read_text)

    def _accepts(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"docker-registry ended:\n{self._log.read_text()}")
        socket.create_connection(("127.0.0.1", self.port)).close()
        return True

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def push(self, repository: str, tag: str, image: Image) -> None:
        for blob in image.blobs():
            location = self._request("POST", f"/v2/{repository}/blobs/uploads/", b"", 202)
            path = location.partition(self.address)[2] or location
            self._request("PUT", f"{path}&digest={digest_of(blob)}", blob, 201)
        self.put_manifest(repository, tag, image.manifest(), image.form.manifest)

    def put_manifest(self, repository: str, tag: str, data: bytes, media_type: str) -> None:
        self._request("PUT", f"/v2/{repository}/manifests/{tag}", data, 201, media_type)

    def _request(self, method: str, path: str, body: bytes, expected: int, kind: str = "") -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            headers = {"Content-Type": kind or "application/octet-stream"}
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            assert answer.status == expected, answer.read()
            return answer.getheader("location", "")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    registry = DockerRegistry(tmp_path_factory.mktemp("registry"))
    try:
        for form in Form:
            registry.push("test/busybox", form.name.lower(), busybox(form.name, form=form))
        others = [busybox("index", architecture=name) for name in ("arm64", "amd64")]
        for image in others:
            registry.push("test/busybox", image.architecture, image)
        registry.put_manifest("test/busybox", "multi", index_of(others), Form.OCI.index)
        yield registry
    finally:
        registry.stop()


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    timing = Timing(attempts=8, backoff_s=0.2, backoff_limit_s=1)
    store = ImageStore(tmp_path, msgspec.structs.replace(ImageOptions(), timing=timing))
    store.load()
    return store


@pytest.mark.parametrize("tag", ["oci", "docker", "multi"])
async def test_image_of_docker_registry_is_pulled_and_runs(
    registry: DockerRegistry, store: ImageStore, tmp_path: Path, tag: str
) -> None:
    image = await store.pull(f"{registry.address}/test/busybox:{tag}")
    root = tmp_path / "root"
    await store.rootfs.up("c1", image.chain_ids, root)
    try:
        command = ["chroot", str(root), "/bin/sh", "-c", "echo from $(id -un) > /new && cat /new"]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
        assert done.stdout == "from root\n"
        assert store.rootfs.usage("c1").inodes == 1
    finally:
        await store.rootfs.down("c1", root)
        await store.close()


async def test_absent_tag_and_repository_are_not_found(registry: DockerRegistry, store: ImageStore) -> None:
    for name in ("test/busybox:absent", "absent/repository:1"):
        with pytest.raises(ManifestNotFound, match="UNKNOWN"):
            await store.pull(f"{registry.address}/{name}")
    await store.close()


async def test_registry_that_returns_in_time_is_retried(registry: DockerRegistry, store: ImageStore) -> None:
    await asyncio.to_thread(registry.stop)
    pull = asyncio.create_task(store.pull(f"{registry.address}/test/busybox:oci"))
    await asyncio.to_thread(registry.start)
    assert (await pull).size > 0
    await store.close()


async def test_registry_that_stays_away_is_unavailable(registry: DockerRegistry, tmp_path: Path) -> None:
    quick = ImageStore(tmp_path / "quick", ImageOptions(timing=Timing(attempts=2, backoff_s=0.01)))
    quick.load()
    await asyncio.to_thread(registry.stop)
    try:
        with pytest.raises(RegistryUnavailable, match="after 2 attempts"):
            await quick.pull(f"{registry.address}/test/busybox:oci")
    finally:
        await asyncio.to_thread(registry.start)
    await quick.close()
