"""Transport over vsock: `vsock:CID:PORT`, where the host has /dev/vhost-vsock.

The agent listens in the guest. Until it does, the kernel refuses or resets, and there is no event
to wait for: the dial is tried again until the deadline.
"""

from __future__ import annotations

import errno
import socket
import time

from sandbox.errors import GuestUnreachable
from sandbox.guest import Transport
from sandbox.host import threads

_RETRY_S = 0.02
# What a VM answers that is not up yet; anything else will not get better by waiting.
_NOT_YET = {errno.ECONNRESET, errno.ECONNREFUSED, errno.ETIMEDOUT, errno.ENODEV}


def parse_address(address: str) -> tuple[int, int]:
    """Raises GuestUnreachable when `address` is not CID:PORT."""
    try:
        cid, port = (int(part) for part in address.split(":"))
    except ValueError as cause:
        raise GuestUnreachable(f"vsock address {address!r} is not CID:PORT") from cause
    if not (0 <= cid < 1 << 32 and 0 <= port < 1 << 32):
        raise GuestUnreachable(f"vsock address {address!r} is out of range")
    return cid, port


def dial(cid: int, port: int, timeout_s: float) -> socket.socket:
    """Blocks for at most `timeout_s`. Raises GuestUnreachable."""
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
    """The same descriptor under the one family that the event loop accepts; reads and writes of a
    stream do not look at the family."""
    again = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=sock.detach())
    again.setblocking(False)
    return again


class VsockTransport:
    async def connect(self, address: str, timeout_s: float) -> socket.socket:
        cid, port = parse_address(address)
        # connect(2) on vsock blocks in the kernel even where epoll is used, hence the thread.
        # A cancelled caller does not wait: the thread ends at its own deadline, and then closes the socket.
        return rewrap(
            await threads.run(
                lambda: dial(cid, port, timeout_s), "husk-vsock", discard=socket.socket.close, linger_s=0
            )
        )


transport: Transport = VsockTransport()
