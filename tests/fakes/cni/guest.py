"""A VM's network without the VM: a second namespace at the other end of the tap, configured as a guest is.

Frames are carried between the pod's tap and the guest's own NIC (a tap as well), with their
virtio-net headers, as a VMM has them that negotiates no offloads.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from network import netns
from network.spec import Attachment, Interface

T = TypeVar("T")
_TUNSETIFF, _TAP_NO_PI_VNET_HDR = 0x400454CA, 0x5002


class Guest:
    """The guest's end of an attachment. `close` it, or use it as a context manager."""

    def __init__(self, path: Path, attachment: Attachment, taps: Sequence[int]) -> None:
        self.path = path
        netns.make(path)
        self._nics = self.inside(lambda: [_make_nic(nic) for nic in attachment.interfaces])
        for nic in attachment.interfaces:
            self.ip(f"link set {nic.name} address {nic.mac} mtu {nic.mtu} up")
            for cidr in nic.addresses:
                self.ip(f"addr add {cidr} dev {nic.name}" + (" nodad" if ":" in cidr else ""))
        for route in attachment.routes:
            words = f"route add {route.destination} dev {route.interface}"
            words += f" via {route.gateway}" if route.gateway else ""
            words += f" metric {route.metric}" if route.metric else ""
            words += f" mtu {route.mtu}" if route.mtu else ""
            words += " onlink" if route.on_link else ""
            self.ip(words)
        self._wake, self._stop = os.pipe()
        self._pairs = dict(zip(self._nics, taps, strict=True)) | dict(zip(taps, self._nics, strict=True))
        self._pump = threading.Thread(target=self._carry, name="test-guest")
        self._pump.start()

    def ip(self, words: str) -> str:
        family = "-6 " if ":" in words.split("dev")[0] and not words.startswith("link") else ""
        done = subprocess.run(
            ["nsenter", f"--net={self.path}", "sh", "-c", f"ip {family}{words}"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"ip {words}: {done.stderr}"
        return done.stdout

    def inside(self, action: Callable[[], T]) -> T:
        return netns.run_in(self.path, action)

    @contextlib.contextmanager
    def serve(self, port: int, answer: bytes) -> Iterator[None]:
        """Reply to each TCP connection with the peer's address, a space and `answer`, then close it."""
        listener = self.inside(
            lambda: socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        )

        def work() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, peer = listener.accept()
                    with connection:
                        connection.sendall(peer[0].removeprefix("::ffff:").encode() + b" " + answer)

        thread = threading.Thread(target=work, name="test-guest-server")
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            listener.close()

    def _carry(self) -> None:
        while True:
            ready, _, _ = select.select([self._wake, *self._pairs], [], [])
            if self._wake in ready:
                return
            for fd in ready:
                with contextlib.suppress(BlockingIOError, OSError):
                    os.write(self._pairs[fd], os.read(fd, 1 << 17))

    def close(self) -> None:
        os.close(self._stop)
        self._pump.join()
        for fd in (*self._pairs, self._wake):
            os.close(fd)
        netns.remove(self.path)

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _make_nic(nic: Interface) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", nic.name.encode(), _TAP_NO_PI_VNET_HDR))
    return fd


def fetch(host: str, port: int, timeout_s: float = 5) -> bytes:
    """Return all that a server sends; called in the namespace that the connection comes from."""
    with socket.create_connection((host, port), timeout_s) as connection:
        connection.settimeout(timeout_s)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))
