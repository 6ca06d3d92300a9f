"""Debian's docker-registry in a test namespace, on loopback, and a client that pushes images to it.

Runtimes reach it as a mirror (`write_mirrors`): the names in tests look like those of real registries, and no
traffic leaves the namespace.
"""

from __future__ import annotations

import http.client
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.kit.eventually import eventually_sync
from tests.kit.images import Form, Image, digest_of, index_of
from tests.kit.namespace import Namespace
from tests.kit.scratch import scratch_dir

HOST = "registry.test"  # what image names in tests begin with


class Registry:
    """A running docker-registry with its own directory. Close it. Raises FileNotFoundError if not
    installed."""

    def __init__(self, namespace: Namespace, port: int = 5000) -> None:
        program = shutil.which("docker-registry")
        if program is None:
            raise FileNotFoundError("docker-registry (Debian package docker-registry)")
        self.port = port
        self._namespace = namespace
        self.directory = scratch_dir("registry")
        config = self.directory / "config.yml"
        config.write_text(
            "version: 0.1\n"
            "log: {level: warn, accesslog: {disabled: true}}\n"
            "storage:\n"
            f'  filesystem: {{rootdirectory: "{self.directory}/data"}}\n'
            "  delete: {enabled: true}\n"
            f'http: {{addr: "127.0.0.1:{port}"}}\n'
        )
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                namespace.command([program, "serve", str(config)]),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        self._await_ready()

    @property
    def url(self) -> str:
        """Its URL inside the namespace."""
        return f"http://127.0.0.1:{self.port}"

    def _await_ready(self, deadline_s: float = 20) -> None:
        log = self.directory / "log"
        try:
            eventually_sync(self._accepts, timeout_s=deadline_s, retry_on=(OSError,), describe=log.read_text)
        except BaseException:
            self.close()
            raise

    def _accepts(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"docker-registry ended:\n{(self.directory / 'log').read_text()}")
        self._namespace.dial("127.0.0.1", self.port).close()
        return True

    def push(self, repository: str, tag: str, image: Image) -> str:
        """Push an image; returns the manifest's digest. Raises RuntimeError."""
        with _Pusher(self, repository) as pusher:
            return pusher.image(tag, image)

    def push_index(self, repository: str, tag: str, images: Sequence[Image], form: Form = Form.OCI) -> str:
        """Push an index and its images; returns the index's digest. Raises RuntimeError."""
        with _Pusher(self, repository) as pusher:
            for image in images:
                pusher.image(digest_of(image.manifest()), image)
            return pusher.manifest(tag, form.index, index_of(images, form))

    def write_mirrors(self, directory: Path, hosts: Sequence[str] = (HOST,)) -> Path:
        """Write <host>/hosts.toml files that send pulls from these hosts here; returns `directory`."""
        for host in hosts:
            (directory / host).mkdir(parents=True, exist_ok=True)
            (directory / host / "hosts.toml").write_text(
                f'server = "{self.url}"\n\n[host."{self.url}"]\n  capabilities = ["pull", "resolve"]\n'
            )
        return directory

    def close(self) -> None:
        """Kill the process and wait for its end. Idempotent."""
        self._process.kill()
        self._process.wait()


class _Pusher:
    """One connection that pushes into one repository (distribution-spec, "Push")."""

    def __init__(self, registry: Registry, repository: str) -> None:
        self._repository = repository
        self._wire = http.client.HTTPConnection("127.0.0.1", registry.port, timeout=30)
        self._wire.sock = registry._namespace.dial("127.0.0.1", registry.port, 30)

    def __enter__(self) -> _Pusher:
        return self

    def __exit__(self, *_: object) -> None:
        self._wire.close()

    def image(self, reference: str, image: Image) -> str:
        """Push an image; returns the manifest's digest."""
        for blob in image.blobs():
            self._blob(blob)
        return self.manifest(reference, image.form.manifest, image.manifest())

    def manifest(self, reference: str, media_type: str, data: bytes) -> str:
        """Push a manifest or index; returns its digest."""
        self._ask("PUT", f"/v2/{self._repository}/manifests/{reference}", data, media_type)
        return digest_of(data)

    def _blob(self, data: bytes) -> None:
        headers = self._ask("POST", f"/v2/{self._repository}/blobs/uploads/")
        place = headers["Location"].partition("/v2/")[2]
        separator = "&" if "?" in place else "?"
        self._ask("PUT", f"/v2/{place}{separator}digest={digest_of(data)}", data)

    def _ask(
        self, method: str, path: str, body: bytes = b"", media_type: str = "application/octet-stream"
    ) -> Mapping[str, str]:
        self._wire.request(method, path, body, {"Content-Type": media_type})
        answer = self._wire.getresponse()
        text = answer.read()
        if answer.status >= 400:
            raise RuntimeError(f"{method} {path}: {answer.status} {text[:200]!r}")
        return dict(answer.getheaders())
