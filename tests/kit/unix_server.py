"""A server on a Unix socket of the host, and whom its clients are said to be."""

from __future__ import annotations

import socket
from pathlib import Path


class UnixServer:
    """A Unix socket of the host that the test serves by hand.

    `seen` has the peer of each connection, (uid, gid, groups), when it came.
    """

    def __init__(self, path: Path, kind: int = socket.SOCK_STREAM, mode: int = 0o666) -> None:
        self.path, self.kind, self.mode = path, kind, mode
        self.seen: list[tuple[int, int, set[int]]] = []
        self.open: list[socket.socket] = []
        self.start()

    def start(self) -> None:
        """Replace what is at the path, and listen."""
        self.path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX, self.kind)
        self.listener.bind(str(self.path))
        self.path.chmod(self.mode)
        if self.kind != socket.SOCK_DGRAM:
            self.listener.listen(1024)

    def accept(self) -> socket.socket:
        """Return the next connection; the server closes it with `stop`."""
        self.listener.settimeout(10)
        peer, _ = self.listener.accept()
        peer.settimeout(10)
        ids = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        groups = peer.getsockopt(socket.SOL_SOCKET, 59, 4 * 64)  # SO_PEERGROUPS
        _, uid, gid = (int.from_bytes(ids[at : at + 4], "little") for at in (0, 4, 8))
        members = {int.from_bytes(groups[at : at + 4], "little") for at in range(0, len(groups), 4)}
        self.seen.append((uid, gid, members))
        self.open.append(peer)
        return peer

    def stop(self) -> None:
        """End, and leave the file behind as a server that was killed does."""
        self.listener.close()
        for each in self.open:
            each.close()
