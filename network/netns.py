"""Named network namespaces: made, entered, removed.

A namespace lives as long as something refers to it. Ours is a bind mount of its nsfs file over an
empty file named by the pod id, as ip-netns(8) does, so it needs no process to hold it.

Whoever enters a namespace is a thread that ends there; no thread of the daemon ever has to come
back, so none can be lost in a pod's network.

Crash story: between making the empty file and the mount there is only the file; `remove` takes
either. All paths under /proc are the thread's, not the process's: tests give a thread a mount
namespace of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from network.errors import NetnsError
from sandbox.host import syscalls, threads

T = TypeVar("T")

OWN = Path("/proc/thread-self/ns/net")
_SIOCGIFFLAGS = 0x8913  # netdevice(7)
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1

# Set before any interface exists, so that each takes them over (kernel: ip-sysctl). The addresses
# come from an IPAM and belong to the guest: the namespace itself must neither probe for duplicates
# (ptp and macvlan wait for that: 1.2 to 2 s of each ADD; and with hairpin a probe meets itself) nor
# ask routers for more.
SYSCTLS = (
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv6/conf/default/router_solicitations", "0"),
)


def make(path: Path) -> None:
    """A new namespace at `path`, its loopback up. Raises NetnsError; then nothing is left."""
    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    except OSError as error:
        raise NetnsError(str(path), "make", str(error)) from error
    try:
        threads.call(lambda: _unshare_and_pin(path), "husk-netns")
    except OSError as error:
        remove(path)
        raise NetnsError(str(path), "make", str(error)) from error


def _unshare_and_pin(path: Path) -> None:
    syscalls.unshare(syscalls.CLONE_NEWNET)
    _bring_up_loopback()
    for name, value in SYSCTLS:
        with contextlib.suppress(OSError):  # no IPv6, or a read-only /proc/sys: slower, no worse
            Path("/proc/sys", name).write_text(value)
    syscalls.mount(OWN, path, flags=syscalls.MS_BIND)


def remove(path: Path) -> None:
    """Let go of the namespace. Absent or half made is fine. Raises NetnsError."""
    try:
        while is_namespace(path):
            # detached, as a plug-in may be looking at it right now
            syscalls.umount2(path, syscalls.MNT_DETACH)
        # also detaches copies of the mount in other mount namespaces
        path.unlink(missing_ok=True)
    except OSError as error:
        raise NetnsError(str(path), "remove", str(error)) from error


def is_namespace(path: Path) -> bool:
    """Whether a namespace is mounted there: all nsfs files are on one device."""
    try:
        return path.stat().st_dev == OWN.stat().st_dev
    except FileNotFoundError:
        return False


def run_in(path: Path, function: Callable[[], T]) -> T:
    """Run `function` inside the namespace, in a thread that ends there; waits for it.

    Raises NetnsError when it cannot be entered, else what `function` raises.
    """

    def work() -> T:
        try:
            threads.enter_namespace(path, syscalls.CLONE_NEWNET)
        except OSError as error:
            raise NetnsError(str(path), "enter", str(error)) from error
        return function()

    return threads.call(work, "husk-in-netns")


def _bring_up_loopback() -> None:
    # struct ifreq: name[16], then a union of 24 bytes whose first two are the flags
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        request = struct.pack("16sH22x", b"lo", 0)
        _, flags = struct.unpack("16sH22x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))
