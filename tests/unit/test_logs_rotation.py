"""Rotation of a container's log: the joined files equal the guest's stream, and failures are undone."""

from __future__ import annotations

import asyncio
import errno
import itertools
import random
from pathlib import Path

import pytest

from sandbox.logs.relay import LogRelay
from sandbox.records import LogPosition
from tests.fakes.logs import LogGuest, LogHost, finish, lines, settle


@pytest.fixture
def host(tmp_path: Path) -> LogHost:
    return LogHost(tmp_path)


async def test_rotation_loses_and_repeats_no_byte(host: LogHost) -> None:
    """100,000 lines, renamed and reopened at random moments."""
    guest = LogGuest(lines(100_000), piece=20_011)
    relay = await host.open(guest)
    moments = random.Random(1)
    for count in itertools.count():
        guest.pump()
        await asyncio.sleep(0)
        if guest.written:
            break
        if moments.random() < 0.03:
            host.rotate(f"{count:06}")
            old = host.files()[-1]
            await relay.reopen()
            size = old.stat().st_size
            assert host.path.exists()
            await asyncio.sleep(0.001)
            assert old.stat().st_size == size
    assert len(host.files()) > 3
    assert host.joined() == guest.stream
    assert all(path.read_bytes()[-1:] in (b"\n", b"") for path in host.files())
    await finish(relay)


async def test_reopen_without_rename_changes_nothing(host: LogHost) -> None:
    guest = LogGuest(lines(100))
    relay = await host.open(guest)
    await settle(guest)
    before = host.position
    await relay.reopen()
    assert host.position == before
    assert len(host.files()) == 1
    await finish(relay)


async def test_reopen_after_removal_creates_the_file(host: LogHost) -> None:
    guest = LogGuest(lines(100))
    relay = await host.open(guest)
    await settle(guest)
    host.path.unlink()
    await relay.reopen()
    guest.stream += b"more\n"
    await settle(guest)
    assert host.path.read_bytes() == b"more\n"
    await finish(relay)
    again = await host.open(guest)
    assert again.offset == len(guest.stream)
    await finish(again)


@pytest.mark.parametrize("failing_save", [1, 2])
@pytest.mark.parametrize("restores", [True, False])
async def test_failed_reopen_leaves_no_new_file(failing_save: int, restores: bool, host: LogHost) -> None:
    guest = LogGuest(lines(100))
    relay = await host.open(guest)
    await settle(guest)
    host.rotate("1")
    saves = itertools.count(1)

    def broken(position: LogPosition) -> None:
        if (count := next(saves)) >= failing_save and not (restores and count > failing_save):
            raise OSError(errno.EIO, "no record")
        host.save(position)

    with pytest.raises(OSError, match="no record"):
        await relay.reopen(broken)
    assert not host.path.exists()
    guest.stream += lines(50, 100)  # and the kubelet renames the file back
    (host.path.with_name("0.log.1")).rename(host.path)
    await settle(guest)
    assert host.joined() == guest.stream
    await finish(relay)
    again = await host.open(guest)
    assert again.offset == len(guest.stream)
    assert again.position.next_base is None
    await finish(again)


async def test_save_that_failed_but_took_effect_is_undone(host: LogHost) -> None:
    """The record must name the old file again before it grows."""
    guest = LogGuest(lines(100))
    relay = await host.open(guest)
    await settle(guest)
    host.rotate("1")
    saves = itertools.count(1)

    def doubtful(position: LogPosition) -> None:
        if (count := next(saves)) <= 2:
            host.save(position)
        if count >= 2:
            raise OSError(errno.EIO, "written, perhaps")

    with pytest.raises(OSError, match="perhaps"):
        await relay.reopen(doubtful)
    assert host.position != relay.position
    guest.stream += lines(50, 100)
    await settle(guest)
    assert host.position == relay.position
    await finish(relay)
    again = await host.open(guest)
    assert again.offset == len(guest.stream)
    await finish(again)


async def test_kill_during_rotation_whose_old_file_is_removed_loses_no_count(host: LogHost) -> None:
    guest = LogGuest(lines(100))
    relay = await host.open(guest)
    await settle(guest)
    host.rotate("1")
    positions: list[LogPosition] = []
    await relay.reopen(positions.append)
    await finish(relay)
    host.position = positions[0]  # the second save was never reached
    assert host.position.next_base == len(guest.stream)
    host.files()[0].unlink()
    relay = await LogRelay.open(host.path, host.position, host.save)
    assert relay.offset == len(guest.stream)
    await finish(relay)


async def test_reopen_without_directory_fails_and_writing_goes_on(host: LogHost) -> None:
    guest = LogGuest(lines(100))
    relay = await host.open(guest)
    await settle(guest)
    moved = host.path.parent.with_name("moved")
    host.path.parent.rename(moved)
    with pytest.raises(FileNotFoundError):
        await relay.reopen()
    guest.stream += b"more\n"
    await settle(guest)
    assert (moved / "0.log").read_bytes() == guest.stream
    await finish(relay)


async def test_cancelled_reopen_leaves_no_new_file(host: LogHost) -> None:
    guest = LogGuest(lines(100))
    relay = await host.open(guest)
    await settle(guest)
    host.rotate("1")
    saving = asyncio.Event()

    async def slow(position: LogPosition) -> None:
        if position.inode != relay.position.inode:
            saving.set()
            await asyncio.Event().wait()
        host.save(position)

    reopening = asyncio.create_task(relay.reopen(slow))
    await saving.wait()
    assert host.path.exists()
    reopening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reopening
    assert not host.path.exists()
    assert host.position == relay.position
    await relay.reopen()
    assert host.path.exists()
    await finish(relay)
