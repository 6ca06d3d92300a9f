"""Named network namespaces: created, entered and removed.

A namespace exists as long as something refers to it. Here that is a bind mount of its nsfs file over an empty
file named by the pod id, as ip-netns(8) does it, so no process has to hold it.

A namespace is entered only by a thread that ends there, so no thread of the daemon can stay in a pod's
network.

Crash story: between the creation of the empty file and the mount there is only the file; `remove` handles
both. All paths under /proc are the thread's, not the process's, as tests give a thread its own mount
namespace.
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
from sandbox.host import mount_flags, syscalls, threads

T = TypeVar("T")

OWN = Path("/proc/thread-self/ns/net")
_SIOCGIFFLAGS = 0x8913  # netdevice(7)
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1

# Set before any interface exists, so that each inherits them (kernel: networking/ip-sysctl.rst). The
# addresses come from an IPAM plug-in and belong to the guest: the namespace itself must neither probe for
# duplicates (ptp and macvlan wait for that, 1.2 to 2 s of each ADD; and with hairpin a probe receives itself)
# nor solicit routers for more.
SYSCTLS = (
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv6/conf/default/router_solicitations", "0"),
)


def make(path: Path) -> None:
    """Create a namespace at `path` with its loopback up. Raises NetnsError; then nothing is left."""
    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    except OSError as error:
        raise NetnsError(str(path), "create", str(error)) from error
    try:
        threads.call(lambda: _unshare_and_pin(path), "husk-netns")
    except OSError as error:
        remove(path)
        raise NetnsError(str(path), "create", str(error)) from error


def _unshare_and_pin(path: Path) -> None:
    syscalls.unshare(syscalls.CLONE_NEWNET)
    _bring_up_loopback()
    for name, value in SYSCTLS:
        with contextlib.suppress(OSError):  # no IPv6, or a read-only /proc/sys: only slower
            Path("/proc/sys", name).write_text(value)
    syscalls.mount(OWN, path, flags=mount_flags.MS_BIND)


def remove(path: Path) -> None:
    """Unmount and remove the namespace's file. Idempotent; also removes a half-created one. Raises
    NetnsError.

    The namespace itself ends with the last process and descriptor in it.
    """
    try:
        while is_namespace(path):
            # lazily, as a plug-in may have it open
            syscalls.umount2(path, syscalls.MNT_DETACH)
        # unlink(2) also detaches copies of the mount in other mount namespaces
        path.unlink(missing_ok=True)
    except OSError as error:
        raise NetnsError(str(path), "remove", str(error)) from error


def is_namespace(path: Path) -> bool:
    """Whether a namespace is mounted at `path`: all files of nsfs are on one device."""
    try:
        return path.stat().st_dev == OWN.stat().st_dev
    except FileNotFoundError:
        return False


def run_in(path: Path, function: Callable[[], T]) -> T:
    """Run `function` in the namespace, in a thread that ends there, and return its result. Blocking.

    Raises NetnsError when the namespace cannot be entered, and what `function` raises.
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
