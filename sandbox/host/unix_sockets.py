"""Unix sockets that only root can connect to, under paths of any length.

sockaddr_un holds paths of up to 107 bytes (unix(7)), and a state directory may have a longer one. So the
directory is opened, and the name is reached through /proc/self/fd.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path


def listen(path: Path, *, backlog: int = 4) -> socket.socket:
    """Return a listening stream socket at `path`, mode 0600, which the caller owns.

    Replaces a socket that a crash left there. Raises OSError.
    """
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        # Before bind: the name appears with the mode that the socket has by then.
        os.fchmod(server.fileno(), 0o600)
        with _short(path) as name:
            server.bind(name)
        server.listen(backlog)
    except BaseException:
        server.close()
        raise
    return server


def connect(path: Path) -> socket.socket:
    """Return a connected, non-blocking stream socket, which the caller owns. Does not wait for accept(2).

    Raises OSError: ConnectionRefusedError where nothing listens, BlockingIOError while the queue is full.
    """
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.setblocking(False)
        with _short(path) as name:
            client.connect(name)
    except BaseException:
        client.close()
        raise
    return client


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
