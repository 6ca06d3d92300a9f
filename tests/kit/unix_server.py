"""A server on a Unix socket of the host, and whom its clients are said to be."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

_SO_PEERGROUPS = 59


class UnixServer:
    """Listens on a socket file. `serve` gets each connection in a thread; without it the test calls `accept`.

    `seen` has the peer of each connection, (uid, gid, groups), when it came; `closed` counts those that
    `serve` is done with.
    """

    def __init__(
        self,
        path: Path,
        kind: int = socket.SOCK_STREAM,
        mode: int = 0o666,
        serve: Callable[[socket.socket], None] | None = None,
    ) -> None:
        self.path, self.kind, self.mode, self.serve = path, kind, mode, serve
        self.seen: list[tuple[int, int, set[int]]] = []
        self.open: list[socket.socket] = []
        self.closed = 0
        self.start()

    def start(self) -> None:
        """Replace what is at the path, and listen."""
        self.path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX, self.kind)
        self.listener.bind(str(self.path))
        self.path.chmod(self.mode)
        if self.kind != socket.SOCK_DGRAM:
            self.listener.listen(1024)
            if self.serve is not None:
                threading.Thread(target=self._run, args=(self.listener, self.serve), daemon=True).start()

    def accept(self) -> socket.socket:
        """Return the next connection; the server closes it with `stop`."""
        self.listener.settimeout(10)
        return self._accept(self.listener)

    def stop(self) -> None:
        """End, and leave the file behind as a server that was killed does."""
        if self.kind != socket.SOCK_DGRAM and self.listener.fileno() >= 0:
            self.listener.shutdown(socket.SHUT_RDWR)  # ends accept(2) in the thread
        self.listener.close()
        for each in self.open:
            each.close()

    def _accept(self, listener: socket.socket) -> socket.socket:
        peer, _ = listener.accept()
        peer.settimeout(10)
        ids = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        groups = peer.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * 64)
        _, uid, gid = _numbers(ids)
        self.seen.append((uid, gid, set(_numbers(groups))))
        self.open.append(peer)
        return peer

    def _run(self, listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        def work(peer: socket.socket) -> None:
            with peer:
                try:
                    serve(peer)
                finally:
                    self.closed += 1

        while True:
            try:
                peer = self._accept(listener)
            except OSError:
                return
            peer.settimeout(None)
            threading.Thread(target=work, args=(peer,), daemon=True).start()


def _numbers(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
