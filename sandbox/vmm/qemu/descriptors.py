"""What a QEMU inherits: files, listening sockets and the memory of its guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from sandbox.errors import MissingProgram, VmmError
from sandbox.host import unix_sockets
from sandbox.host.process import Credentials
from sandbox.vmm import VmSpec
from sandbox.vmm.qemu import snapshot
from sandbox.vmm.qemu.argv import Fds, NicFds

VHOST_NET = "/dev/vhost-net"
LOG_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC


def keep(held: contextlib.ExitStack, fd: int) -> int:
    """Let `held` close a descriptor; returns it."""
    held.callback(os.close, fd)
    return fd


def open_files(spec: VmSpec, taps: tuple[int, ...], held: contextlib.ExitStack) -> Fds:
    """Open everything but memory and shares; `held` closes it. Raises MissingProgram, VmmError, OSError."""
    run_dir = Path(spec.run_dir)

    def listening(name: str) -> int:
        return held.enter_context(unix_sockets.listen(run_dir / name)).fileno()

    kernel, initramfs = (-1, -1) if spec.template else _open_guest(spec, held)
    return Fds(
        monitor=listening("qmp.sock"),
        console=listening("console.sock"),
        channel=listening("agent.sock"),
        kernel=kernel,
        initramfs=initramfs,
        nics=tuple(NicFds(tap=tap, vhost=_open_vhost(held)) for tap in taps),
    )


def _open_guest(spec: VmSpec, held: contextlib.ExitStack) -> tuple[int, int]:
    def readable(path: str, what: str) -> int:
        try:
            return keep(held, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise MissingProgram(f"{what} ({path or 'none is configured'})", "husk guest build") from error

    kernel = readable(spec.kernel, "guest kernel")
    if os.pread(kernel, 4, 0) != b"\x7fELF":
        # QEMU would run anything else as a boot sector
        raise VmmError(f"{spec.kernel} is not an ELF kernel (vmlinux); husk guest build makes one")
    return kernel, readable(spec.initramfs, "guest initramfs")


async def open_ram(spec: VmSpec, user: Credentials, held: contextlib.ExitStack) -> int:
    """Open the RAM if it is a file: a copy of a template's, or the file that a template will be made of.

    Returns -1 for a VM that is neither. `held` closes it. Raises VmmError.
    """
    try:
        if spec.template:
            return keep(held, await asyncio.to_thread(snapshot.copy_ram, Path(spec.template)))
        if spec.savable:
            ram = Path(spec.run_dir) / snapshot.RAM
            fd = keep(held, os.open(ram, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            os.ftruncate(fd, spec.memory_mib << 20)
            os.fchown(fd, user.uid, user.gid)
            return fd
    except OSError as error:
        raise VmmError(f"the guest's memory: {error}") from error
    return -1


def has_vhost() -> bool:
    """Return whether packets can bypass QEMU (vhost-net)."""
    return os.access(VHOST_NET, os.R_OK | os.W_OK)


def identify(path: str) -> tuple[str, int, int, int]:
    """Return what identifies a file and its content without reading it. Raises MissingProgram."""
    try:
        found = Path(path).stat()
    except OSError as error:
        raise MissingProgram(path or "the guest's kernel or initramfs", "husk guest build") from error
    return str(path), found.st_ino, found.st_size, found.st_mtime_ns


def _open_vhost(held: contextlib.ExitStack) -> int:
    try:
        return keep(held, os.open(VHOST_NET, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return -1
