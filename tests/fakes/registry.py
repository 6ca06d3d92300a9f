"""A registry in this process, on loopback, which misbehaves on request.

Images are put in directly. `fail` plans a fault for the next requests whose path holds a text; it is
used up `times` times. `seen` is every request, for what must not have been sent.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import json
import socket
import ssl
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import zstandard

OCI = "application/vnd.oci.image"
DOCKER = "application/vnd.docker"


@dataclass(frozen=True)
class Status:
    """Answers with this status."""

    code: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class Hang:
    """Sends no response."""


@dataclass(frozen=True)
class Truncate:
    """Announces the whole body, sends this many bytes of it, and closes the connection."""

    size: int


@dataclass(frozen=True)
class StallAfter:
    """Announces the whole body and sends only this many bytes, with the connection open."""

    size: int


@dataclass(frozen=True)
class Corrupt:
    """Sends as many bytes as announced, but other ones."""


@dataclass(frozen=True)
class Drip:
    """Announces the whole body and sends `size` bytes of it each `period_s`."""

    size: int
    period_s: float


Fault = Status | Hang | Truncate | StallAfter | Corrupt | Drip


@dataclass(frozen=True)
class Seen:
    """A request."""

    method: str
    path: str  # without the query
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass
class _Plan:
    path: str
    fault: Fault
    times: int
    begin: int | None = None  # of the Range that is meant; None: any request


@dataclass
class FakeRegistry:
    """The registry's behaviour and content; `serving` makes `address` answer."""

    ranges: bool = True  # whether Range is honoured
    ranges_to_the_end: bool = False  # whatever end a Range has
    sign_in: str = ""  # "", "basic" or "bearer"
    username: str = "user"
    password: str = "hunter2-secret"
    identity_token: str = "identity-secret"
    token: str = "token-secret"
    open_tokens: bool = False  # the token service serves anyone
    realm: str = ""  # empty: this server's own /token
    # other challenges: header lines before the registry's own one
    challenges_before: Sequence[str] = ()
    challenges_in_one_line: bool = False
    tls: ssl.SSLContext | None = None
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[tuple[str, str], tuple[bytes, str]] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    address: str = ""

    def __post_init__(self) -> None:
        self._plans: list[_Plan] = []
        self._lock = threading.Lock()
        self._released = threading.Event()

    # ----------------------------------------------------------------------------- contents

    def put_blob(self, data: bytes) -> str:
        """Add a blob; returns its digest."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        return digest

    def put_manifest(self, repository: str, tag: str, value: object, media_type: str) -> str:
        """Add a document, by its digest and, unless empty, a tag; returns the digest."""
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.manifests[repository, digest] = data, media_type
        if tag:
            self.manifests[repository, tag] = data, media_type
        return digest

    def put_image(
        self,
        repository: str,
        tag: str,
        layers: Sequence[bytes],
        *,
        config: Mapping[str, object] | None = None,
        compression: str = "gzip",
        docker: bool = False,
        architecture: str = "amd64",
        diff_ids: Sequence[str] | None = None,
    ) -> str:
        """Add an image of these plain tars; returns the manifest's digest."""
        digests = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
        description = {
            "architecture": architecture,
            "os": "linux",
            "config": dict(config or {}),
            "rootfs": {"type": "layers", "diff_ids": list(diff_ids or digests)},
        }
        raw = json.dumps(description).encode()
        packed = [compress(layer, compression) for layer in layers]
        kind = f"{DOCKER}.distribution.manifest.v2+json" if docker else f"{OCI}.manifest.v1+json"
        suffix = {"gzip": "gzip", "zstd": "zstd", "plain": ""}[compression]
        if docker:
            layer_type = f"{DOCKER}.image.rootfs.diff.tar" + (f".{suffix}" if suffix else "")
        else:
            layer_type = f"{OCI}.layer.v1.tar" + (f"+{suffix}" if suffix else "")
        config_type = f"{DOCKER}.container.image.v1+json" if docker else f"{OCI}.config.v1+json"
        manifest = {
            "schemaVersion": 2,
            "mediaType": kind,
            "config": self._descriptor(raw, config_type),
            "layers": [self._descriptor(data, layer_type) for data in packed],
        }
        return self.put_manifest(repository, tag, manifest, kind)

    def put_index(
        self,
        repository: str,
        tag: str,
        entries: Sequence[tuple[str, Mapping[str, str] | None]],
        *,
        docker: bool = False,
    ) -> str:
        """Add an index of manifests that were added before, each with its platform or None."""
        kind = f"{DOCKER}.distribution.manifest.list.v2+json" if docker else f"{OCI}.index.v1+json"
        manifests = []
        for digest, platform in entries:
            data, media_type = self.manifests[repository, digest]
            entry: dict[str, object] = {"mediaType": media_type, "digest": digest, "size": len(data)}
            manifests.append(entry if platform is None else entry | {"platform": dict(platform)})
        value = {"schemaVersion": 2, "mediaType": kind, "manifests": manifests}
        return self.put_manifest(repository, tag, value, kind)

    def config_id(self, repository: str, tag: str) -> str:
        """Return the digest of an image's configuration."""
        digest: str = json.loads(self.manifests[repository, tag][0])["config"]["digest"]
        return digest

    def layer_digests(self, repository: str, tag: str) -> list[str]:
        """Return the digests of an image's compressed layers."""
        return [layer["digest"] for layer in json.loads(self.manifests[repository, tag][0])["layers"]]

    def _descriptor(self, data: bytes, media_type: str) -> dict[str, object]:
        return {"mediaType": media_type, "digest": self.put_blob(data), "size": len(data)}

    # ------------------------------------------------------------------------- misbehaviour

    def fail(self, path: str, fault: Fault, times: int = 1) -> None:
        """Let the next `times` requests whose path contains `path` fail."""
        self._plans.append(_Plan(path, fault, times))

    def fail_part(self, path: str, begin: int, fault: Fault, times: int = 1) -> None:
        """Let the next `times` requests for a range that begins here fail."""
        self._plans.append(_Plan(path, fault, times, begin))

    def forget_faults(self) -> None:
        """Answer all requests from now on."""
        self._plans.clear()

    def take_fault(self, path: str, wanted: str) -> Fault | None:
        """Return the fault for a request with this Range, and count it as used; None to answer it."""
        with self._lock:
            for plan in self._plans:
                meant = plan.begin is None or wanted.startswith(f"bytes={plan.begin}-")
                if plan.times and plan.path in path and meant:
                    plan.times -= 1
                    return plan.fault
        return None

    def is_released(self, timeout_s: float) -> bool:
        """Return whether the test has ended; waits this long for it."""
        return self._released.wait(timeout_s)

    def wait_released(self) -> None:
        """Block until the end of the test."""
        self._released.wait(60)

    def paths(self) -> list[str]:
        """Return the paths of all requests."""
        return [seen.path for seen in self.seen]

    # ------------------------------------------------------------------------------ serving

    @contextlib.contextmanager
    def serving(self, host: str = "127.0.0.1") -> Iterator[FakeRegistry]:
        """Serve on a free port of an address of loopback."""
        handler = type("Handler", (_Handler,), {"registry": self})
        kind = _ServerV6 if ":" in host else ThreadingHTTPServer
        server = kind((host, 0), handler)
        server.daemon_threads = True
        if self.tls is not None:
            server.socket = self.tls.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.address = f"{f'[{host}]' if ':' in host else host}:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._released.set()
            server.shutdown()
            server.server_close()
            thread.join()


class _ServerV6(ThreadingHTTPServer):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    registry: ClassVar[FakeRegistry]
    timeout = 60

    def log_message(self, format: str, *args: Any) -> None:
        return

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError, TimeoutError):
            super().handle_one_request()
            return
        self.close_connection = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        self._answer(body)

    def do_GET(self) -> None:
        self._answer(b"")

    def _answer(self, body: bytes) -> None:
        url = urlsplit(self.path)
        registry = self.registry
        query = parse_qs(url.query)
        registry.seen.append(
            Seen(self.command, url.path, query, {k.lower(): v for k, v in self.headers.items()}, body)
        )
        fault = registry.take_fault(url.path, self.headers.get("range", ""))
        match fault:
            case Status(code, headers, content):
                self._send(code, content, headers)
                return
            case Hang():
                registry.wait_released()
                self.close_connection = True
                return
            case _:
                pass
        if url.path == "/token":
            self._token(query, body)
        elif not self._signed_in():
            self._challenge()
        else:
            self._content(url.path, fault)

    def _content(self, path: str, fault: Fault | None) -> None:
        repository, _, rest = path.removeprefix("/v2/").rpartition("/")
        repository, _, kind = repository.rpartition("/")
        if kind == "manifests" and (found := self.registry.manifests.get((repository, rest))):
            data, media_type = found
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            headers = {"Content-Type": media_type, "Docker-Content-Digest": digest}
            self._send(200, data, headers, fault)
        elif kind == "blobs" and (blob := self.registry.blobs.get(rest)) is not None:
            self._blob(blob, fault)
        else:
            code = "MANIFEST_UNKNOWN" if kind == "manifests" else "BLOB_UNKNOWN"
            self._error(404, code, "not here")

    def _blob(self, blob: bytes, fault: Fault | None) -> None:
        wanted = self.headers.get("range", "")
        if wanted and self.registry.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = (
                int(first),
                int(last) + 1 if last and not self.registry.ranges_to_the_end else len(blob),
            )
            headers = {"Content-Range": f"bytes {begin}-{end - 1}/{len(blob)}"}
            self._send(206, blob[begin:end], headers, fault)
        else:
            self._send(200, blob, {}, fault)

    def _send(
        self,
        code: int,
        body: bytes,
        headers: Mapping[str, str] | Sequence[tuple[str, str]],
        fault: Fault | None = None,
    ) -> None:
        self.send_response(code)
        for name, value in headers.items() if isinstance(headers, Mapping) else headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        match fault:
            case Truncate(size):
                self.wfile.write(body[:size])
                self.close_connection = True
            case StallAfter(size):
                self.wfile.write(body[:size])
                self.registry.wait_released()
                self.close_connection = True
            case Drip(size, period_s):
                for begin in range(0, len(body), size):
                    self.wfile.write(body[begin : begin + size])
                    if self.registry.is_released(period_s):
                        break
                self.close_connection = True
            case Corrupt():
                self.wfile.write(bytes(b ^ 0xFF for b in body))
            case _:
                self.wfile.write(body)

    def _error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
        self._send(status, body, headers or {})

    # ------------------------------------------------------------------------------ sign-in

    def _signed_in(self) -> bool:
        shown = self.headers.get("authorization", "")
        match self.registry.sign_in:
            case "basic":
                return shown == self._basic()
            case "bearer":
                return shown == f"Bearer {self.registry.token}"
        return True

    def _basic(self) -> str:
        text = f"{self.registry.username}:{self.registry.password}"
        return "Basic " + base64.b64encode(text.encode()).decode()

    def _challenge(self) -> None:
        scheme = "https" if self.registry.tls else "http"
        realm = self.registry.realm or f"{scheme}://{self.registry.address}/token"
        value = 'Basic realm="test"'
        if self.registry.sign_in == "bearer":
            value = f'Bearer realm="{realm}",service="test.service",scope="repository:some/thing:pull"'
        # like a careless server, return what was sent
        shown = self.headers.get("authorization", "").partition(" ")[2]
        lines = [*self.registry.challenges_before, value]
        if self.registry.challenges_in_one_line:
            lines = [", ".join(lines)]
        body = json.dumps({"errors": [{"code": "UNAUTHORIZED", "message": f"you sent {shown}"}]}).encode()
        self._send(401, body, [("WWW-Authenticate", line) for line in lines])

    def _token(self, query: Mapping[str, list[str]], body: bytes) -> None:
        form = parse_qs(body.decode())
        by_refresh = form.get("refresh_token") == [self.registry.identity_token]
        by_basic = self.headers.get("authorization", "") == self._basic()
        if self.registry.open_tokens or by_refresh or (by_basic and query.get("service") == ["test.service"]):
            self._send(200, json.dumps({"access_token": self.registry.token}).encode(), {})
        else:
            self._error(401, "DENIED", "no such user")


# ----------------------------------------------------------------------------------- layers


def compress(layer: bytes, how: str) -> bytes:
    """Compress by "gzip", "zstd" or "plain"."""
    pack: Callable[[bytes], bytes] = {
        "gzip": lambda data: gzip.compress(data, 1, mtime=0),
        "zstd": zstandard.ZstdCompressor().compress,
        "plain": lambda data: data,
    }[how]
    return pack(layer)


def make_layer(files: Mapping[str, bytes | str | None]) -> bytes:
    """Return a plain tar: bytes are a file, text is a symbolic link's target, None is a directory."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.mtime = 1_700_000_000
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return out.getvalue()
