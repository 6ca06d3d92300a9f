"""The log relay writes the guest's stream to the file, on any disk and to no other kind of file."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.errors import ProtocolError
from sandbox.logs import relay as relays
from sandbox.logs.relay import MAX_LINE, WINDOW, LogRelay
from sandbox.records import LogPosition
from tests.fakes.logs import LogGuest, LogHost, finish, lines, settle


@pytest.fixture
def host(tmp_path: Path) -> LogHost:
    return LogHost(tmp_path)


# ------------------------------------------------------------------------------------- writing


@pytest.fixture
def umask() -> Iterator[None]:
    """The usual umask of a service, whatever the one of the tests is."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
async def test_stream_is_written_and_only_then_acknowledged(host: LogHost) -> None:
    guest = LogGuest(lines(2000))
    relay = await host.open(guest)
    while not guest.written:
        guest.pump()
        await asyncio.sleep(0)
        assert guest.acknowledged <= host.path.stat().st_size
    assert host.joined() == guest.stream
    assert relay.offset == len(guest.stream)
    assert host.path.stat().st_mode & 0o777 == 0o640
    await finish(relay)


async def test_only_whole_lines_are_written(host: LogHost) -> None:
    guest = LogGuest(b"one\ntwo\nthr", piece=5)
    relay = await host.open(guest)
    while guest.pump():
        pass
    while guest.acknowledged < 8:
        await asyncio.sleep(0)
    assert host.joined() == b"one\ntwo\n"
    guest.stream += b"ee\n"
    await settle(guest)
    assert host.joined() == b"one\ntwo\nthree\n"
    await finish(relay)


async def test_line_without_end_is_a_protocol_error(host: LogHost) -> None:
    guest = LogGuest(b"ok\n" + b"x" * (MAX_LINE + 10))
    relay = await host.open(guest)
    with pytest.raises(ProtocolError, match="log line"):
        while guest.pump():
            pass
    await finish(relay)
    assert host.joined() == b"ok\n"


async def test_complete_returns_when_all_is_written(host: LogHost) -> None:
    guest = LogGuest(lines(500))
    relay = await host.open(guest)
    while guest.pump():
        pass
    assert guest.sink is not None
    guest.sink.closed()
    await asyncio.wait_for(relay.complete(), 5)
    assert host.joined() == guest.stream
    await finish(relay)


async def test_close_writes_what_was_received(host: LogHost) -> None:
    guest = LogGuest(lines(100), piece=1 << 16)
    relay = await host.open(guest)
    guest.pump()
    relay.close()
    relay.close()
    await relay.wait_closed()
    assert host.joined() == guest.stream


async def test_log_without_path_is_discarded(tmp_path: Path) -> None:
    guest = LogGuest(lines(100))
    relay = await LogRelay.open("", LogPosition(), lambda position: None)
    await relay.attach(guest)
    await relay.begin(0)
    while guest.pump():
        pass
    assert guest.written
    await relay.reopen()
    relay.closed()
    await relay.complete()
    await finish(relay)
    assert not any(os.scandir(tmp_path))


async def test_memory_is_bounded_by_the_window(host: LogHost) -> None:
    guest = LogGuest(b"x" * 99 + b"\n")
    guest.stream *= 2 * WINDOW // 100
    relay = await LogRelay.open(host.path, host.position, host.save)
    await relay.attach(guest)  # and nothing is written before `begin`
    while guest.pump():
        pass
    assert sum(map(len, relay._lines)) + len(relay._rest) == WINDOW
    await relay.begin(0)
    await settle(guest)
    assert host.joined() == guest.stream
    await finish(relay)


# --------------------------------------------------------------------------- files in the way


async def test_existing_file_is_appended_to(host: LogHost) -> None:
    host.path.parent.mkdir()
    host.path.write_bytes(b"older\n")
    guest = LogGuest(lines(10))
    relay = await host.open(guest)
    assert relay.position.base == -6
    await settle(guest)
    await finish(relay)
    relay = await host.open(guest)
    assert relay.offset == len(guest.stream)
    assert host.joined() == b"older\n" + guest.stream
    await finish(relay)


@pytest.mark.parametrize("kind", ["link", "dangling link", "directory", "fifo"])
async def test_path_that_is_not_a_regular_file_is_refused(kind: str, host: LogHost, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    host.path.parent.mkdir()
    match kind:
        case "link":
            victim.write_bytes(b"precious")
            host.path.symlink_to(victim)
        case "dangling link":
            host.path.symlink_to(victim)
        case "directory":
            host.path.mkdir()
        case "fifo":
            os.mkfifo(host.path)
    with pytest.raises(OSError):
        await host.open(LogGuest(lines(1)))
    assert not victim.exists() or victim.read_bytes() == b"precious"
    assert host.position == LogPosition()


async def test_failed_save_at_open_leaves_no_file(host: LogHost) -> None:
    def broken(position: LogPosition) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(OSError, match="disk full"):
        await LogRelay.open(host.path, LogPosition(), broken)
    assert host.files() == []


# ------------------------------------------------------------------------------ write failures


async def test_full_disk_loses_no_line(host: LogHost, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = LogGuest(lines(500), piece=5000)
    relay = await host.open(guest, inline=True)
    real_write = os.write
    free = 10_000

    def full(fd: int, data: memoryview) -> int:
        nonlocal free
        guest.pump()  # more lines come while these are written
        if free == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = real_write(fd, data[: min(len(data), free)])
        free -= count
        return count

    monkeypatch.setattr(os, "write", full)
    async with asyncio.timeout(10):
        while not host.problems:
            guest.pump()
            await asyncio.sleep(0)
        assert isinstance(host.problems[0], OSError)
        assert host.joined() == guest.stream[: guest.acknowledged]
        assert host.joined().endswith(b"\n")
        host.rotate("1")  # as the kubelet does to free space
        await relay.reopen()
        free = 1 << 30
        await settle(guest)
    assert host.problems[1:] == [None]
    assert host.joined() == guest.stream
    assert all(path.read_bytes().endswith(b"\n") for path in host.files())
    await finish(relay)


@pytest.fixture
def small_disk(host: LogHost) -> Iterator[None]:
    host.path.parent.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(host.path.parent)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("mount(2) is not permitted")
    yield
    subprocess.run(["umount", "--lazy", str(host.path.parent)], check=True)


@pytest.mark.usefixtures("small_disk")
async def test_full_tmpfs_loses_no_line(host: LogHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays, "_RETRY_S", 0.001)
    monkeypatch.setattr(relays, "_RETRY_MAX_S", 0.001)
    guest = LogGuest(lines(3000), piece=1 << 16)
    relay = await host.open(guest)
    kept = b""
    async with asyncio.timeout(20):
        while not guest.written:
            guest.pump()
            await asyncio.sleep(0.001)
            if host.problems:  # free space: rotate, and move the old file elsewhere
                host.rotate("old")
                await relay.reopen()
                kept += host.files()[0].read_bytes()
                host.files()[0].unlink()
    problem = host.problems[0]
    assert isinstance(problem, OSError)
    assert problem.errno == errno.ENOSPC
    assert kept + host.joined() == guest.stream
    await finish(relay)
