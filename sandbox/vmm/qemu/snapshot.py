"""Saving a VM as a template, and restoring copies of it.

    DIRECTORY/ram     the guest's memory, sparse: what is all zeroes is a hole
    DIRECTORY/state   the devices' state (some 200 kB), as QEMU's migration writes it

The memory is not part of the migration (`x-ignore-shared`): it is a file already, and copying that
file is faster than a stream. Each restored VM gets a private copy, in a memfd that is freed with it, so
it can be shared with virtiofsd as in any other VM.

Crash story: a crash leaves only parts of DIRECTORY, which belongs to the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from sandbox.errors import DeadlineExceeded, VmmError
from sandbox.vmm.qemu.qmp import Monitor

RAM, STATE = "ram", "state"
SAVE_TIMEOUT_S = 60.0
RESTORE_TIMEOUT_S = 30.0
MAX_STATE = 64 << 20
_POLL_S = 0.002
_UNIT = 64 << 10  # granularity of the search for zeroes: smaller units make too many extents to copy
_CAPABILITIES = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}


# ------------------------------------------------------------------------------------------ save


async def save(monitor: Monitor, ram: Path, directory: Path) -> None:
    """Stop the VM, whose RAM is the file `ram`, and write both parts to the new `directory`.

    Raises VmmError, DeadlineExceeded, OSError.
    """
    await monitor.execute("migrate-set-capabilities", _CAPABILITIES)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    reading = asyncio.create_task(asyncio.to_thread(_read_all, read_end))
    try:
        try:
            await monitor.pass_descriptor("state", write_end)
        finally:
            os.close(write_end)  # QEMU has a duplicate: end of file comes when it closes that one
        await monitor.execute("migrate", {"uri": "fd:state"})
        await _until_migrated(monitor, SAVE_TIMEOUT_S)
        state = await reading
    except BaseException:
        with contextlib.suppress(VmmError, DeadlineExceeded):
            await monitor.execute("closefd", {"fdname": "state"})
        raise
    await asyncio.to_thread(_write, directory, ram, state)


def _write(directory: Path, ram: Path, state: bytes) -> None:
    """Write the state, and the RAM with a hole for each unit of zeroes: more than half of the memory that a
    guest touches while it boots is zero afterwards."""
    directory.mkdir(mode=0o700)
    (directory / STATE).write_bytes(state)
    with ram.open("rb", buffering=0) as source, (directory / RAM).open("xb", buffering=0) as target:
        target.truncate(os.fstat(source.fileno()).st_size)
        zeroes = bytes(_UNIT)
        for begin, end in _data(source.fileno()):
            for offset in range(begin - begin % _UNIT, end, _UNIT):
                unit = os.pread(source.fileno(), _UNIT, offset)
                if unit != zeroes:
                    os.pwrite(target.fileno(), unit, offset)


def _read_all(fd: int) -> bytes:
    """Read a pipe to its end; QEMU closes its end at the latest when it exits. Blocks. Raises VmmError beyond
    MAX_STATE."""
    content = bytearray()
    with os.fdopen(fd, "rb", buffering=0) as pipe:
        while chunk := pipe.read(1 << 20):
            content += chunk
            if len(content) > MAX_STATE:
                raise VmmError(f"QEMU's device state is larger than {MAX_STATE >> 20} MiB")
    return bytes(content)


async def _until_migrated(monitor: Monitor, timeout_s: float) -> None:
    """Poll until the migration has completed. Raises VmmError with QEMU's reason, DeadlineExceeded."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = await monitor.execute("query-migrate")
        facts = answer if isinstance(answer, dict) else {}
        match facts.get("status"):
            case "completed":
                return
            case "failed" | "cancelled" as status:
                raise VmmError(f"QEMU's migration {status}: {facts.get('error-desc', 'no reason was given')}")
        if time.monotonic() > deadline:
            raise DeadlineExceeded("QEMU's migration", timeout_s)
        await asyncio.sleep(_POLL_S)


# --------------------------------------------------------------------------------------- restore


def copy_ram(directory: Path) -> int:
    """Copy the RAM of a saved VM to a new memfd, which the caller owns. Blocks. Raises OSError."""
    with (directory / RAM).open("rb") as saved:
        copy = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
        try:
            os.ftruncate(copy, os.fstat(saved.fileno()).st_size)
            for begin, end in _data(saved.fileno()):
                _copy(saved.fileno(), copy, begin, end)
        except BaseException:
            os.close(copy)
            raise
    return copy


def _copy(source: int, target: int, begin: int, end: int) -> None:
    os.lseek(target, begin, os.SEEK_SET)
    while begin < end:
        copied = os.sendfile(target, source, begin, end - begin)
        if copied == 0:
            raise OSError(errno.EIO, "the file of the saved RAM was truncated")
        begin += copied


def _data(file: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each extent that is not a hole (lseek(2), SEEK_DATA)."""
    end = 0
    while True:
        try:
            begin = os.lseek(file, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            raise
        end = os.lseek(file, begin, os.SEEK_HOLE)
        yield begin, end


def _open_state(directory: Path) -> int:
    """Return the read end of a pipe that holds the whole state. The caller owns it. Raises OSError."""
    state = (directory / STATE).read_bytes()
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # root may exceed pipe-max-size (pipe(7))
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, len(state))
        if os.write(write_end, state) < len(state):
            raise OSError(errno.ENOSPC, "the device state does not fit into a pipe")
        os.set_blocking(read_end, True)
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    return read_end


async def restore(monitor: Monitor, directory: Path) -> None:
    """Load the saved state into a QEMU that was started with `-incoming defer` and a copy of the RAM.

    Raises VmmError, VmmGone (QEMU exits when it rejects the state), DeadlineExceeded, OSError.
    """
    await monitor.execute("migrate-set-capabilities", _CAPABILITIES)
    # no gratuitous ARP: all copies of a template have the same address until they are configured
    await monitor.execute("migrate-set-parameters", {"announce-rounds": 0})
    state = _open_state(directory)
    try:
        await monitor.pass_descriptor("state", state)
    finally:
        os.close(state)
    await monitor.execute("migrate-incoming", {"uri": "fd:state"})
    await _until_migrated(monitor, RESTORE_TIMEOUT_S)
