"""Transport over a unix socket: `unix:/path`. An agent run as an ordinary process listens there."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

from sandbox.errors import GuestUnreachable
from sandbox.guest import Transport

_RETRY_S = 0.01
_SUN_PATH_BYTES = 107  # of struct sockaddr_un, less the closing zero (unix(7))


async def connect_unix(path: str, timeout_s: float) -> socket.socket:
    """Connect to a unix socket, also one whose path is longer than sun_path.

    Raises GuestUnreachable: there is no such socket, no process listens, or its queue stays full for
    `timeout_s`.
    """
    deadline = asyncio.get_running_loop().time() + timeout_s
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        while True:
            try:
                _connect_now(sock, path)
                return sock
            except BlockingIOError:
                # The listener's queue is full. A unix socket has no event for that, and the loop's
                # sock_connect takes EAGAIN for success; hence the retries.
                if asyncio.get_running_loop().time() >= deadline:
                    raise
            await asyncio.sleep(_RETRY_S)
    except OSError as cause:
        sock.close()
        raise GuestUnreachable(f"connecting to {path}: {cause.strerror}") from cause
    except BaseException:
        sock.close()
        raise


def _connect_now(sock: socket.socket, path: str) -> None:
    if len(os.fsencode(path)) <= _SUN_PATH_BYTES:
        sock.connect(path)
        return
    # A deep state directory: reach the socket through its directory's descriptor instead.
    directory = os.open(Path(path).parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{directory}/{Path(path).name}")
    finally:
        os.close(directory)


class UnixTransport:
    """Connects to an agent that listens on a unix socket."""

    async def connect(self, address: str, timeout_s: float) -> socket.socket:
        return await connect_unix(address, timeout_s)


transport: Transport = UnixTransport()
