"""virtiofsd: finding it, planning its command line, and the directory that it exports.

Two programs do the same job with different flags: the one that came with QEMU until 7.2, in C, and
its successor in Rust. Both run as root, because files in a container belong to anybody, but in
namespaces of their own that hold nothing except the share, with a seccomp filter and without the
capabilities that reach beyond files.

A share is a directory bound to itself and made shared: what is mounted below it on the host later
is passed on into the namespace of a virtiofsd that already runs, and appears in the guest as a
mount of its own (announce-submounts).

Crash story: `make_share` and `remove_share` are idempotent and need the path only.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from sandbox import mounts, process, sockets
from sandbox.errors import MissingProgram, VmmError
from sandbox.process import ProcessIdentity

PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd")
PACKAGE = "apt-get install virtiofsd (Debian 13, Ubuntu 24.04) or qemu-system-common (Debian 12)"


class Flavour(StrEnum):
    RUST = "rust"
    C = "c"


class Virtiofsd(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    flavour: Flavour
    version: str


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What one virtiofsd exports. `cache` is "always" or "auto" (see ShareSpec)."""

    source: str
    cache: str


async def find_virtiofsd(places: Sequence[str] = PLACES) -> Virtiofsd:
    """The first that can be asked for its version. Raises MissingProgram."""
    for place in places:
        if not os.access(place, os.X_OK):
            continue
        said = await process.run([place, "--version"], timeout_s=10)
        version = (said.stdout + said.stderr).decode(errors="replace").splitlines()
        if said.status == 0 and version:
            return Virtiofsd(path=place, flavour=tell_flavour(version[0]), version=version[0])
    raise MissingProgram("virtiofsd", PACKAGE)


def tell_flavour(version: str) -> Flavour:
    """The one in C says "virtiofsd version 7.2.1 (Debian ...)", the one in Rust "virtiofsd 1.13.2"."""
    return Flavour.C if version.startswith("virtiofsd version ") else Flavour.RUST


def plan_virtiofsd(program: Virtiofsd, share: Share, listen_fd: int) -> list[str]:
    """The command line for one share, with a listening socket as descriptor `listen_fd`.

    Capabilities: both keep only what changing files of any owner takes (chown, dac_override,
    fowner, fsetid, setuid, setgid, mknod, setfcap); dac_read_search is never added, as with it a
    handle could be opened outside of the share. Extended attributes are passed through for file
    capabilities; `trusted.*` would take sys_admin and stays with the host's overlay. Locks stay
    inside the guest, where all processes of the pod are.
    """
    if program.flavour is Flavour.C:
        options = [
            f"source={share.source}",
            f"cache={share.cache}",
            "sandbox=namespace",
            "announce_submounts",
            "xattr",
            "log_level=err",
        ]
        flags = [flag for option in options for flag in ("-o", option)]
        return [program.path, "-f", f"--fd={listen_fd}", "--thread-pool-size=0", *flags]
    return [
        program.path,
        f"--fd={listen_fd}",
        f"--shared-dir={share.source}",
        f"--cache={share.cache}",
        "--sandbox=namespace",
        "--seccomp=kill",
        "--announce-submounts",
        "--xattr",
        "--inode-file-handles=never",
        "--thread-pool-size=0",
        "--log-level=error",
    ]


async def start_virtiofsd(
    program: Virtiofsd, share: Share, *, at: Path, cgroups: Sequence[str], log_fd: int, oom_score_adj: int = 0
) -> tuple[ProcessIdentity, socket.socket]:
    """Start it on a socket that is listening already: nobody ever has to wait for one to appear.

    Returns the connection for the VMM. The name `at` exists only until we are connected, so nothing
    else can take the one connection that virtiofsd accepts. Raises VmmError.
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
                oom_score_adj=oom_score_adj,
                umask=0,
            )
        except OSError as error:
            connection.close()
            raise VmmError(f"virtiofsd for {share.source} could not be started: {error}") from error
        except BaseException:
            connection.close()
            raise
    return identity, connection


def _open(at: Path) -> tuple[socket.socket, socket.socket]:
    listener = sockets.listen(at)
    try:
        return listener, sockets.connect(at)
    except BaseException:
        listener.close()
        raise
    finally:
        at.unlink()


# --------------------------------------------------------------------------------------- shares


def make_share(path: Path) -> None:
    """Make a directory to which mounts can be added while a virtiofsd exports it. Idempotent.

    First private, then shared: a bind joins the peer group of what it binds, and in the same group
    as the host's root the containers' mounts would show up a second time beneath the share.
    Raises OSError.
    """
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    if path in mounts.mounts_below(path):
        return  # setting it again would cut off a virtiofsd that already listens to it
    mounts.bind(path, path, recursive=False)
    mounts.set_propagation(path, mounts.MS_PRIVATE)
    mounts.set_propagation(path, mounts.MS_SHARED)


def remove_share(path: Path) -> None:
    """Unmount the share with whatever is mounted in it, and remove the directory. Idempotent.

    Only empty directories and files that served as mount points are removed with it: nothing is
    deleted through a mount. Raises OSError.
    """
    mounts.unmount_tree(path)
    if not path.exists():
        return
    for current, directories, files in os.walk(path, topdown=False):
        for name in files:
            target = Path(current, name)
            if target.stat().st_size == 0:
                target.unlink()
        for name in directories:
            Path(current, name).rmdir()
    path.rmdir()
