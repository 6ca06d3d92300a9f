"""The virtiofsds of a VM's shares: those that it starts with, and those that are added while it runs.

QEMU has a connection to each, as the chardev `fs-TAG`, and a device, `share-TAG`.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from sandbox.errors import DeadlineExceeded, VmmError, VmmGone
from sandbox.host import process
from sandbox.host.process import ProcessIdentity
from sandbox.vmm import ShareSpec, VmHandle, VmSpec, virtiofsd
from sandbox.vmm.qemu import devices
from sandbox.vmm.qemu.argv import check
from sandbox.vmm.qemu.descriptors import LOG_FLAGS
from sandbox.vmm.qemu.qmp import Monitor
from sandbox.vmm.virtiofsd import Virtiofsd


async def start(
    program: Virtiofsd, spec: VmSpec, share: ShareSpec, log: int, *, accepted: bool = False
) -> tuple[ProcessIdentity, socket.socket]:
    """Start the virtiofsd of a share. Returns it with QEMU's connection, which the caller owns. Raises
    VmmError."""
    return await virtiofsd.start_virtiofsd(
        program,
        virtiofsd.Share(source=share.source, cache=share.cache),
        at=Path(spec.run_dir) / f"fs-{share.tag}.sock",
        cgroups=spec.cgroups,
        log_fd=log,
        accepted=accepted,
    )


def find(handle: VmHandle, tag: str) -> list[ProcessIdentity]:
    """Find the virtiofsd of a share by its command line. Blocking."""
    sources = [share.source for share in handle.spec.shares if share.tag == tag]
    return process.find_by_argument(
        *(argument for each in sources for argument in virtiofsd.source_arguments(each))
    )


async def add(monitor: Monitor, program: Virtiofsd, spec: VmSpec, share: ShareSpec) -> ProcessIdentity:
    """Start the virtiofsd of a share and plug it in. After a failure, nothing of it is left.

    `spec` has the share already. Raises InvalidSpec, VmmError, VmmGone, DeadlineExceeded.
    """
    check(spec)
    log = os.open(Path(spec.run_dir) / "qemu.log", LOG_FLAGS, 0o600)
    try:
        helper, connection = await start(program, spec, share, log, accepted=True)
    finally:
        os.close(log)
    try:
        with connection:
            await devices.connect_share(monitor, share.tag, connection.fileno())
        await devices.plug_share(monitor, share.tag)
    except BaseException:
        with contextlib.suppress(VmmError, DeadlineExceeded):
            await devices.disconnect_share(monitor, share.tag)
        # the one in C serves in a child, which ends with the connection
        await process.kill(helper)
        raise
    return helper


async def is_plugged(monitor: Monitor, tag: str) -> bool:
    """Return whether QEMU has the share's device. Raises VmmError, VmmGone."""
    return devices.share_id(tag) in await devices.plugged(monitor)


def find_added(handle: VmHandle, tag: str) -> ProcessIdentity:
    """Return the virtiofsd of a share that QEMU has. Raises VmmGone if it has ended. Blocking."""
    found = find(handle, tag)
    # the first is the one that was started; the one in C serves in a child
    if not found:
        raise VmmGone(f"virtiofsd for {tag} has ended")
    return min(found, key=lambda each: (each.start_time, each.pid))
