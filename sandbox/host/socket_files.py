"""Socket files that programs of the host listen on: their kind, and connecting to them as another user.

A socket is opened without following a link, and the descriptor is what is examined and connected to: no other
file can take its place in between.

The server sees who connected (SO_PEERCRED, SO_PEERGROUPS, unix(7)) and the kernel checks the file's mode and
ACL for the same user, as the connecting thread has taken that user's ids. The pid that the server sees is the
daemon's.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum

from sandbox.host import syscalls, threads

MESSAGE_BYTES = 64 << 10  # of one message, as the agent has it


class SocketKind(StrEnum):
    """The types of Unix sockets."""

    STREAM = "stream"
    SEQPACKET = "seqpacket"
    DATAGRAM = "datagram"


_TYPES = {
    SocketKind.STREAM: socket.SOCK_STREAM,
    SocketKind.SEQPACKET: socket.SOCK_SEQPACKET,
    SocketKind.DATAGRAM: socket.SOCK_DGRAM,
}


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a server sees, and `capabilities` for the check of the file's permissions (a mask)."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    capabilities: int = 0


@contextmanager
def opened(path: str) -> Iterator[int]:
    """Give an O_PATH descriptor of the socket at an absolute path without links.

    Raises OSError: ENOENT for what does not exist, ENOTSOCK for another kind of file, ELOOP for a link.
    """
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    resolve = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
    file = syscalls.openat2(syscalls.AT_FDCWD, path, flags, resolve=resolve)
    try:
        if not stat.S_ISSOCK(os.fstat(file).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK), path)
        yield file
    finally:
        os.close(file)


def find_kind(file: int) -> SocketKind | None:
    """Return what kind of socket is bound to the file of a descriptor; None: none is.

    The kernel says EPROTOTYPE to a connect(2) of another type, before its server notices anything. A server
    of SEQPACKET sees one connection, which ends at once.
    """
    for kind in (SocketKind.DATAGRAM, SocketKind.SEQPACKET):
        try:
            with suppress(BlockingIOError):
                _connect(file, kind).close()
            return kind
        except ConnectionRefusedError:
            return None
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise
    return SocketKind.STREAM


def _connect(file: int, kind: SocketKind) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, _TYPES[kind])
    try:
        client.setblocking(False)
        client.connect(f"/proc/self/fd/{file}")
    except BaseException:
        client.close()
        raise
    return client


def has_access_list(file: int) -> bool:
    """Return whether the socket of a descriptor has a POSIX ACL (acl(5)). Raises OSError."""
    try:
        os.getxattr(f"/proc/self/fd/{file}", "system.posix_acl_access")
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return False
        raise
    return True


async def connect_as(
    path: str,
    kind: SocketKind,
    identity: Identity,
    may: Callable[[int], bool] = lambda file: True,
) -> socket.socket:
    """Return a non-blocking socket that is connected to what the path names now, as this user.

    `may` decides by a descriptor (O_PATH) of the very file that is connected to; it is called in a thread.
    The caller owns the socket. Raises OSError as `opened` does, and as connect(2): ECONNREFUSED where nothing
    listens, EACCES, EPROTOTYPE for a socket of another kind, EAGAIN (BlockingIOError) while its queue is
    full.
    """

    def work() -> socket.socket:
        with opened(path) as file:
            if not may(file):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            syscalls.set_thread_credentials(
                identity.uid, identity.gid, identity.groups, identity.capabilities
            )
            return _connect(file, kind)

    return await threads.run(work, "connect", discard=socket.socket.close)


def credentials_of(identity: Identity) -> Sequence[tuple[int, int, bytes]]:
    """Return the ancillary data that says the same with each message (SCM_CREDENTIALS).

    A server may ask for it with SO_PASSCRED, and the kernel would fill in the daemon's own user.
    """
    ids = (os.getpid(), identity.uid, identity.gid)
    data = b"".join(number.to_bytes(4, "little") for number in ids)  # struct ucred
    return ((socket.SOL_SOCKET, socket.SCM_CREDENTIALS, data),)
