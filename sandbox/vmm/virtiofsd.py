"""virtiofsd: finding it, planning its command line, and the directory that it exports.

Two implementations take different flags: the one in C that came with QEMU until 7.2, and its successor
in Rust. Both run as root, because files in a container have any owner, but in private namespaces that
hold only the share, with a seccomp filter and without the capabilities that reach beyond files.

A share must be a mount point with shared propagation: what is mounted below it on the host later then
propagates to the namespace of a running virtiofsd. The step that owns the directories makes it so. Where
the host may change files (cache "auto"), such a mount appears in the guest as a separate mount
(announce-submounts). Root filesystems do without: their overlays take inode numbers from one disk, and
unmounting such a mount is delicate in the guest's kernel (see `exports_settle` in agent/exports.c).

Crash story: it leaves no name behind, and exits when the VMM closes the connection.
"""

from __future__ import annotations

import asyncio
import os
import resource
import select
import socket
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from sandbox.errors import MissingProgram, VmmError
from sandbox.host import process, unix_sockets
from sandbox.host.process import ProcessIdentity

PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd")
PACKAGE = "apt-get install virtiofsd (Debian 13, Ubuntu 24.04) or qemu-system-common (Debian 12)"


MOST_DESCRIPTORS = 1 << 20
ACCEPT_TIMEOUT_S = 10.0
ACCEPT_POLL_S = 0.002
CAP_SYS_RESOURCE = 24  # capabilities(7), linux/capability.h
# "trusted.x" of the guest is "user.virtiofs.trusted.x" on the host, whose own "trusted.x" the guest does not
# see, nor "user.virtiofs.x" under that name (virtiofsd(1), "xattrmap", type "map").
XATTR_MAP = ":map:trusted.:user.virtiofs.:"


class Implementation(StrEnum):
    """Which of the two implementations a program is."""

    RUST = "rust"
    C = "c"


class Virtiofsd(msgspec.Struct, frozen=True, kw_only=True):
    """An installed virtiofsd."""

    path: str
    implementation: Implementation
    version: str


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What one virtiofsd exports. `cache` is "always", "auto" or "none" (see ShareSpec)."""

    source: str
    cache: str


class Prober:
    """Finds virtiofsd. Runs `--version` once for each program and modification time."""

    def __init__(self, places: Sequence[str] = PLACES) -> None:
        self._places = places
        self._known: dict[tuple[str, int], Virtiofsd] = {}

    async def find(self) -> Virtiofsd:
        """Return the first program that prints its version. Raises MissingProgram."""
        for place in self._places:
            if (changed := _changed_at(place)) is None:
                continue
            key = (place, changed)
            if key not in self._known:
                completed = await process.run([place, "--version"], timeout_s=10)
                lines = (completed.stdout + completed.stderr).decode(errors="replace").splitlines()
                if completed.status != 0 or not lines:
                    continue
                self._known[key] = Virtiofsd(
                    path=place, implementation=detect_implementation(lines[0]), version=lines[0]
                )
            return self._known[key]
        raise MissingProgram("virtiofsd", PACKAGE)


def _changed_at(program: str) -> int | None:
    path = Path(program)
    return path.stat().st_mtime_ns if os.access(path, os.X_OK) else None


def detect_implementation(version: str) -> Implementation:
    """Detect it by the first line of `--version`: "virtiofsd version 7.2.1 (Debian ...)" is the one in C,
    "virtiofsd 1.13.2" the one in Rust."""
    return Implementation.C if version.startswith("virtiofsd version ") else Implementation.RUST


def plan_virtiofsd(program: Virtiofsd, share: Share, listen_fd: int) -> list[str]:
    """Return the command line for one share, with a listening socket as descriptor `listen_fd`.

    Capabilities: both keep only those needed to change files of any owner (chown, dac_override,
    fowner, fsetid, setuid, setgid, mknod, setfcap); dac_read_search is never added, as with it a file
    handle could be opened outside of the share. Extended attributes are passed through for file
    capabilities and POSIX ACLs; `trusted.*`, which would need sys_admin, is kept under another name, so that
    a guest can mount overlays on a share. Locks stay inside the guest, where all processes of the pod run.

    Who may do what is decided by the guest's kernel alone (virtiofs mounts with default_permissions), which
    knows supplementary groups and ACLs. Both change to the caller's user and group to create a file, so that
    it belongs to them, and know none of its other groups: they keep their capabilities meanwhile (see
    `start_virtiofsd`), or creating by right of such a group would fail.

    Descriptors: each holds one for each inode that the guest's kernel knows. File handles in their place
    (--inode-file-handles) need dac_read_search, and are therefore not used.
    """
    limit = f"--rlimit-nofile={descriptor_limit()}"
    in_c, in_rust = source_arguments(share.source)
    if program.implementation is Implementation.C:
        options = [
            in_c,
            f"cache={share.cache}",
            "sandbox=namespace",
            *(["announce_submounts"] if share.cache == "auto" else []),
            "xattr",
            f"xattrmap={XATTR_MAP}",
            "posix_acl",
            "log_level=err",
        ]
        flags = [flag for option in options for flag in ("-o", option)]
        return [program.path, "-f", f"--fd={listen_fd}", limit, "--thread-pool-size=0", *flags]
    return [
        program.path,
        f"--fd={listen_fd}",
        limit,
        in_rust,
        f"--cache={'never' if share.cache == 'none' else share.cache}",
        "--sandbox=namespace",
        "--seccomp=kill",
        "--announce-submounts" if share.cache == "auto" else "--no-announce-submounts",
        "--xattr",
        f"--xattrmap={XATTR_MAP}",
        "--posix-acl",
        "--inode-file-handles=never",
        "--thread-pool-size=0",
        "--log-level=error",
    ]


def descriptor_limit() -> int:
    """Return the highest limit of open descriptors that this host allows a virtiofsd: our hard limit, or with
    CAP_SYS_RESOURCE over the host up to 1,048,576 (proc(5), /proc/sys/fs/nr_open)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = int(Path("/proc/sys/fs/nr_open").read_text())
    if hard == resource.RLIM_INFINITY:
        return allowed
    return max(hard, min(allowed, MOST_DESCRIPTORS)) if _may_raise_limits() else hard


def _may_raise_limits() -> bool:
    """Whether we have CAP_SYS_RESOURCE in the initial user namespace, as setrlimit(2) asks for."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    return bool(effective >> CAP_SYS_RESOURCE & 1) and Path("/proc/self/uid_map").read_text().split() == [
        "0",
        "0",
        str(2**32 - 1),
    ]


def source_arguments(source: str) -> tuple[str, str]:
    """Return the arguments, of the one in C and the one in Rust, by which a virtiofsd of this directory is
    known."""
    return f"source={source}", f"--shared-dir={source}"


async def start_virtiofsd(
    program: Virtiofsd, share: Share, *, at: Path, cgroups: Sequence[str], log_fd: int, accepted: bool = False
) -> tuple[ProcessIdentity, socket.socket]:
    """Start it on a socket that is already listening, so that the VMM need not poll for it.

    Returns the connection for the VMM, which the caller owns. The name `at` is removed as soon as we are
    connected, so nothing else can use the one connection that virtiofsd accepts. With `accepted`, waits until
    it has done so: what is wrong with the share is known then. Raises VmmError.
    """
    try:
        listener, connection = _open(at)
    except OSError as error:
        raise VmmError(f"virtiofsd for {share.source}: {at}: {error}") from error
    with listener:
        try:
            identity = await process.start(
                plan_virtiofsd(program, share, listener.fileno()),
                cgroups=cgroups,
                pass_fds=(listener.fileno(),),
                stdout=log_fd,
                stderr=log_fd,
                umask=0,
                keep_capabilities=True,
            )
        except OSError as error:
            connection.close()
            raise VmmError(f"virtiofsd for {share.source} could not be started: {error}") from error
        except BaseException:
            connection.close()
            raise
        if accepted:
            try:
                await _await_accept(listener, identity)
            except BaseException:
                connection.close()
                await process.kill(identity)
                raise
    return identity, connection


async def _await_accept(listener: socket.socket, identity: ProcessIdentity) -> None:
    """Wait until it has accepted the connection. Raises VmmError when it exits or takes longer than 10 s.

    A QEMU whose vhost-user connection ends while it waits for the first answer may hang for ever (7.2).
    """
    pending = select.poll()
    pending.register(listener, select.POLLIN)
    try:
        async with asyncio.timeout(ACCEPT_TIMEOUT_S):
            while pending.poll(0):
                if not process.alive(identity):
                    raise VmmError("virtiofsd exited while starting")
                await asyncio.sleep(ACCEPT_POLL_S)
    except TimeoutError as error:
        raise VmmError(f"virtiofsd did not start within {ACCEPT_TIMEOUT_S:g} s") from error


def _open(at: Path) -> tuple[socket.socket, socket.socket]:
    listener = unix_sockets.listen(at)
    try:
        return listener, unix_sockets.connect(at)
    except BaseException:
        listener.close()
        raise
    finally:
        at.unlink()
