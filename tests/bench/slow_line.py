"""A pull over a line that one connection cannot fill: one large layer, RATE a connection, DELAY_S a request.

The registry is a separate process with the files of one image. The kernel paces each of its connections
(SO_MAX_PACING_RATE of socket(7)), which needs no qdisc, and it waits DELAY_S before each response, as a
registry does that is so far away. Run as a program it is given the descriptor of a listening socket and the
directory: blobs by digest, and `manifest`.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import Popen

from tests.bench.figures import Figures
from tests.bench.subjects import Site, settle_disk
from tests.kit.images import Form, Image, Layer, Packing, digest_of
from tests.kit.scratch import scratch_dir

HOST = "slow.test"
NAME = f"{HOST}/large:1"
PORT = 5001
RATE = 200_000_000 // 8  # bytes per second
DELAY_S = 0.005
FILE_BYTES = 16 << 20
_SO_MAX_PACING_RATE = 47  # asm-generic/socket.h; not in the module socket


def pulls(site: Site, figures: Figures, rounds: int, mebibytes: int) -> None:
    """Time pulls of a layer of this size, which does not compress."""
    folder = scratch_dir("slow-registry")
    _write_image(folder, mebibytes)
    (site.mirrors / HOST).mkdir(exist_ok=True)
    url = f"http://127.0.0.1:{PORT}"
    (site.mirrors / HOST / "hosts.toml").write_text(f'server = "{url}"\n[host."{url}"]\n')
    with site.namespace.listen("127.0.0.1", PORT) as listening:
        command = [sys.executable, "-m", "tests.bench.slow_line", str(listening.fileno()), str(folder)]
        server = Popen(command, pass_fds=[listening.fileno()])
    try:
        for _ in range(rounds):
            for subject in site.mains:
                settle_disk()
                with figures.timing("pull of a large layer", subject.name):
                    subject.cri.pull(NAME)
                subject.cri.call("RemoveImage", image={"image": NAME})
    finally:
        server.kill()
        server.wait()


def _write_image(folder: Path, mebibytes: int) -> None:
    layer = Layer(Packing.PLAIN)
    for number in range(max(1, (mebibytes << 20) // FILE_BYTES)):
        layer.add(f"data/{number}", os.urandom(FILE_BYTES))
    image = Image((layer,), cmd=("/none",))
    for blob in image.blobs():
        (folder / digest_of(blob)).write_bytes(blob)
    (folder / digest_of(image.manifest())).write_bytes(image.manifest())
    (folder / "manifest").write_bytes(image.manifest())


# -------------------------------------------------------------------------------- the registry


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    folder: Path

    def get_request(self) -> tuple[socket.socket, object]:
        connection, peer = super().get_request()
        connection.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, RATE)
        return connection, peer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        time.sleep(DELAY_S)
        kind, _, name = self.path.partition("?")[0].rstrip("/").rpartition("/")
        file = self.server.folder / ("manifest" if kind.endswith("manifests") and ":" not in name else name)
        if not file.is_file():
            self.send_response(200 if self.path == "/v2/" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = file.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin, end = (int(wanted[1]), int(wanted[2] or size - 1) + 1) if wanted else (0, size)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        if kind.endswith("manifests"):
            self.send_header("Content-Type", Form.OCI.manifest)
            self.send_header("Docker-Content-Digest", digest_of(file.read_bytes()))
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if body:
            with file.open("rb") as opened:
                self.connection.sendfile(opened, begin, end - begin)


def serve(descriptor: int, folder: Path) -> None:
    """Serve until the process is killed."""
    server = _Server(("127.0.0.1", 0), _Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=descriptor)
    server.folder = folder
    server.serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
