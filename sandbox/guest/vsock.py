"""Transport over vsock: `vsock:CID:PORT`, where the host has /dev/vhost-vsock.

The agent listens in the guest. Until it does, the kernel refuses or resets connections, and there is no event
to wait for: the connect is retried until the deadline.
"""

from __future__ import annotations

import errno
import socket
import time

from sandbox.errors import GuestUnreachable
from sandbox.guest import Transport
from sandbox.host import threads

_RETRY_S = 0.02
# Errors while the VM is still booting; for any other one a retry is useless.
_NOT_YET = {errno.ECONNRESET, errno.ECONNREFUSED, errno.ETIMEDOUT, errno.ENODEV}


def parse_address(address: str) -> tuple[int, int]:
    """Parse CID:PORT, each 32 bits. Raises GuestUnreachable."""
    try:
        cid, port = (int(part) for part in address.split(":"))
    except ValueError as cause:
        raise GuestUnreachable(f"vsock address {address!r} is not CID:PORT") from cause
    if not (0 <= cid < 1 << 32 and 0 <= port < 1 << 32):
        raise GuestUnreachable(f"vsock address {address!r} is out of range")
    return cid, port


def dial(cid: int, port: int, timeout_s: float) -> socket.socket:
    """Connect, with retries; blocks for at most `timeout_s`. Raises GuestUnreachable."""
    deadline = time.monotonic() + timeout_s
    while True:
        left_s = deadline - time.monotonic()
        try:
            sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                sock.settimeout(max(left_s, 0.001))
                sock.connect((cid, port))
                return sock
            except BaseException:
                sock.close()
                raise
        except OSError as cause:
            if left_s <= _RETRY_S or cause.errno not in _NOT_YET:
                raise GuestUnreachable(f"connecting to vsock {cid}:{port}: {cause}") from cause
        time.sleep(_RETRY_S)


def rewrap(sock: socket.socket) -> socket.socket:
    """Return the same descriptor as an AF_UNIX socket, the only family that the event loop accepts.

    Reads and writes of a stream socket do not depend on the family.
    """
    again = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=sock.detach())
    again.setblocking(False)
    return again


class VsockTransport:
    """Connects to an agent that listens on vsock."""

    async def connect(self, address: str, timeout_s: float) -> socket.socket:
        cid, port = parse_address(address)
        # connect(2) on vsock blocks in the kernel also for a non-blocking socket, hence the thread.
        # A cancelled caller does not wait: the thread ends at its own deadline, and then closes the socket.
        return rewrap(
            await threads.run(
                lambda: dial(cid, port, timeout_s), "husk-vsock", discard=socket.socket.close, linger_s=0
            )
        )


transport: Transport = VsockTransport()
