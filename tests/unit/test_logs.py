"""The log relay: the joined files equal the guest's stream, whatever happens in between."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sandbox.errors import ProtocolError
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.guest.streams import StreamSink
from sandbox.logs import relay as relays
from sandbox.logs.relay import MAX_LINE, WINDOW, LogRelay
from sandbox.records import LogPosition
from tests.fakes.guest import FakeAgent

TOKEN = b"token of the vm."


def lines(count: int, start: int = 0) -> bytes:
    return b"".join(
        b"2026-01-01T00:00:00.%09dZ stdout F line %d %s\n" % (n, n, b"x" * (n * 7 % 90))
        for n in range(start, start + count)
    )


class Guest:
    """The other end of one relay, in memory: replays from the offset that it is asked for, forgets
    what is acknowledged, and sees that credit and acknowledgement are kept."""

    def __init__(self, stream: bytes = b"", piece: int = 1000) -> None:
        self.stream = bytearray(stream)
        self.acknowledged = 0
        self.piece = piece
        self.sink: StreamSink | None = None
        self._sent = 0
        self._credit = 0

    # ---- as a GuestClient
    def open_input(self, sink: StreamSink, window: int) -> int:
        self.sink = sink
        self._credit = window
        return 1

    def grant(self, stream: int, count: int) -> None:
        self._credit += count
        self.acknowledged += count
        assert self.acknowledged <= self._sent

    def reset_input(self, stream: int) -> None:
        self.sink = None

    # ---- as a guest
    def open_log(self, offset: int) -> int:
        """The reply to OpenLog."""
        self.acknowledged = self._sent = min(max(offset, self.acknowledged), len(self.stream))
        return self._sent

    def pump(self) -> bool:
        """Send one piece, if credit and stream allow."""
        count = min(self.piece, self._credit, len(self.stream) - self._sent)
        if count <= 0 or self.sink is None:
            return False
        self._sent += count
        self._credit -= count
        self.sink.data(memoryview(self.stream[self._sent - count : self._sent]))
        return True

    @property
    def written(self) -> bool:
        return self.acknowledged == len(self.stream)


class Inline(ThreadPoolExecutor):
    """Runs work at once, in the event loop's thread: a test then knows at which call it is."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class Host:
    """What outlives the daemon: the record and the files."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "c" / "0.log"
        self.position = LogPosition()
        self.problems: list[Exception | None] = []

    def save(self, position: LogPosition) -> None:
        self.position = position

    async def open(self, guest: Guest, *, inline: bool = False) -> LogRelay:
        if inline:
            asyncio.get_running_loop().set_default_executor(Inline())
        relay = await LogRelay.open(self.path, self.position, self.save, on_problem=self.problems.append)
        await relay.attach(guest)
        await relay.begin(guest.open_log(relay.offset))
        return relay

    def rotate(self, name: str) -> None:
        """As the kubelet does it."""
        self.path.rename(self.path.with_name(f"{self.path.name}.{name}"))

    def files(self) -> list[Path]:
        """Oldest first."""
        rotated = sorted(path for path in self.path.parent.iterdir() if path != self.path)
        return [*rotated, self.path] if self.path.exists() else rotated

    def joined(self) -> bytes:
        return b"".join(path.read_bytes() for path in self.files())


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


async def settle(guest: Guest) -> None:
    async with asyncio.timeout(20):
        while not guest.written:
            guest.pump()
            await asyncio.sleep(0)


async def finish(relay: LogRelay) -> None:
    relay.close()
    await relay.wait_closed()


# ------------------------------------------------------------------------------------- writing


async def test_the_stream_is_written_and_only_then_acknowledged(host: Host) -> None:
    guest = Guest(lines(2000))
    relay = await host.open(guest)
    while not guest.written:
        guest.pump()
        await asyncio.sleep(0)
        assert guest.acknowledged <= host.path.stat().st_size
    assert host.joined() == guest.stream
    assert relay.offset == len(guest.stream)
    assert host.path.stat().st_mode & 0o777 == 0o640
    await finish(relay)


async def test_only_whole_lines_are_in_the_file(host: Host) -> None:
    guest = Guest(b"one\ntwo\nthr", piece=5)
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


async def test_a_line_without_an_end_is_refused(host: Host) -> None:
    guest = Guest(b"ok\n" + b"x" * (MAX_LINE + 10))
    relay = await host.open(guest)
    with pytest.raises(ProtocolError, match="log line"):
        while guest.pump():
            pass
    await finish(relay)
    assert host.joined() == b"ok\n"


async def test_complete_is_told_when_all_is_written(host: Host) -> None:
    guest = Guest(lines(500))
    relay = await host.open(guest)
    while guest.pump():
        pass
    assert guest.sink is not None
    guest.sink.closed()
    await asyncio.wait_for(relay.complete(), 5)
    assert host.joined() == guest.stream
    await finish(relay)


async def test_closing_writes_what_was_received(host: Host) -> None:
    guest = Guest(lines(100), piece=1 << 16)
    relay = await host.open(guest)
    guest.pump()
    relay.close()
    relay.close()
    await relay.wait_closed()
    assert host.joined() == guest.stream


async def test_no_path_discards(tmp_path: Path) -> None:
    guest = Guest(lines(100))
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


async def test_memory_is_bounded_by_the_window(host: Host) -> None:
    guest = Guest(b"x" * 99 + b"\n")
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


async def test_a_file_that_was_there_is_kept(host: Host) -> None:
    host.path.parent.mkdir()
    host.path.write_bytes(b"older\n")
    guest = Guest(lines(10))
    relay = await host.open(guest)
    assert relay.position.base == -6
    await settle(guest)
    await finish(relay)
    relay = await host.open(guest)
    assert relay.offset == len(guest.stream)
    assert host.joined() == b"older\n" + guest.stream
    await finish(relay)


@pytest.mark.parametrize("kind", ["link", "dangling link", "directory", "fifo"])
async def test_what_is_no_file_of_ours_is_refused(kind: str, host: Host, tmp_path: Path) -> None:
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
        await host.open(Guest(lines(1)))
    assert not victim.exists() or victim.read_bytes() == b"precious"
    assert host.position == LogPosition()


async def test_a_save_that_fails_at_open_leaves_no_file(host: Host) -> None:
    def broken(position: LogPosition) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(OSError, match="disk full"):
        await LogRelay.open(host.path, LogPosition(), broken)
    assert host.files() == []


# ------------------------------------------------------------------------------ write failures


async def test_a_full_disk_loses_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(lines(500), piece=5000)
    relay = await host.open(guest, inline=True)
    real_write = os.write
    room = 10_000

    def full(fd: int, data: memoryview) -> int:
        nonlocal room
        guest.pump()  # more lines come while these are written
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = real_write(fd, data[: min(len(data), room)])
        room -= count
        return count

    monkeypatch.setattr(os, "write", full)
    async with asyncio.timeout(10):
        while not host.problems:
            guest.pump()
            await asyncio.sleep(0)
        assert isinstance(host.problems[0], OSError)
        assert host.joined() == guest.stream[: guest.acknowledged]
        assert host.joined().endswith(b"\n")
        host.rotate("1")  # making room is what rotation is for
        await relay.reopen()
        room = 1 << 30
        await settle(guest)
    assert host.problems[1:] == [None]
    assert host.joined() == guest.stream
    assert all(path.read_bytes().endswith(b"\n") for path in host.files())
    await finish(relay)


@pytest.fixture
def small_disk(host: Host) -> Iterator[None]:
    host.path.parent.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(host.path.parent)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("may not mount")
    yield
    subprocess.run(["umount", "--lazy", str(host.path.parent)], check=True)


@pytest.mark.usefixtures("small_disk")
async def test_a_disk_that_is_really_full(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays, "_RETRY_S", 0.001)
    monkeypatch.setattr(relays, "_RETRY_MAX_S", 0.001)
    guest = Guest(lines(3000), piece=1 << 16)
    relay = await host.open(guest)
    kept = b""
    async with asyncio.timeout(20):
        while not guest.written:
            guest.pump()
            await asyncio.sleep(0.001)
            if host.problems:  # make room: rotate, and carry the old file away
                host.rotate("old")
                await relay.reopen()
                kept += host.files()[0].read_bytes()
                host.files()[0].unlink()
    problem = host.problems[0]
    assert isinstance(problem, OSError)
    assert problem.errno == errno.ENOSPC
    assert kept + host.joined() == guest.stream
    await finish(relay)


# ------------------------------------------------------------------------------------ rotation


async def test_rotation_is_exact(host: Host) -> None:
    """100,000 lines, renamed and reopened at random moments; contract item 36."""
    guest = Guest(lines(100_000), piece=20_011)
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


async def test_reopening_without_a_rename_changes_nothing(host: Host) -> None:
    guest = Guest(lines(100))
    relay = await host.open(guest)
    await settle(guest)
    before = host.position
    await relay.reopen()
    assert host.position == before
    assert len(host.files()) == 1
    await finish(relay)


async def test_reopening_after_the_file_was_removed_makes_one(host: Host) -> None:
    guest = Guest(lines(100))
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
async def test_a_failed_reopen_leaves_no_new_file(failing_save: int, restores: bool, host: Host) -> None:
    guest = Guest(lines(100))
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


async def test_a_save_that_failed_and_took_effect_is_taken_back(host: Host) -> None:
    """Before the old file grows, the record must name it again."""
    guest = Guest(lines(100))
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


async def test_killed_in_a_rotation_and_the_old_file_is_gone(host: Host) -> None:
    guest = Guest(lines(100))
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


async def test_a_missing_directory_fails_reopen_and_writing_goes_on(host: Host) -> None:
    guest = Guest(lines(100))
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


async def test_a_cancelled_reopen_leaves_no_new_file(host: Host) -> None:
    guest = Guest(lines(100))
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


# ------------------------------------------------------------------------------------ recovery


class Killed(BaseException):
    """Nothing may run after this, as after SIGKILL."""


class Killer:
    """Kills at the n-th touch of the world, before or after its effect, or half-way in a write."""

    CALLS = ("open", "write", "unlink", "ftruncate", "close")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
        self.left: float = 0
        self.dead = False
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name), name == "write"))
        save = host.save
        monkeypatch.setattr(host, "save", self._wrapped(save, False))

    def _wrapped(self, function: Callable[..., Any], cuts: bool) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._step()
            if cuts and self.left == 0.5:
                os_write(args[0], args[1][: len(args[1]) // 2])
            self._step()
            result = function(*args, **kwargs)
            self._step()
            return result

        return wrapper

    def _step(self) -> None:
        if self.dead:
            raise Killed
        if self.left:
            self.left -= 0.5
            if self.left == 0:
                self.dead = True
                raise Killed

    def arm(self, left: float) -> None:
        self.left, self.dead = left, False


os_write = os.write


async def life(host: Host, guest: Guest, rotation: int) -> bool:
    """One life of a daemon: adopt, write some, rotate, write some. False when it was killed."""
    relay = None
    try:
        relay = await host.open(guest, inline=True)
        await write_some(relay, guest)
        if host.path.exists() and rotation:
            host.rotate(f"{rotation:03}")
        await relay.reopen()
        await write_some(relay, guest)
    except Killed:
        return False
    finally:
        if relay is not None and relay._pump is not None:
            relay._pump.cancel()
            with suppress(asyncio.CancelledError, Killed):
                await relay._pump
    return True


async def write_some(relay: LogRelay, guest: Guest) -> None:
    for _ in range(6):
        guest.pump()
        await asyncio.sleep(0)
        assert relay._pump is not None
        if relay._pump.done():
            relay._pump.result()


@pytest.mark.parametrize("kubelet", ["renames back", "leaves it"])
async def test_killed_at_every_step(kubelet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill at each step of a life with one rotation; what the next life writes fits on exactly."""
    for number in itertools.count(1):
        (tmp_path / str(number)).mkdir()
        host = Host(tmp_path / str(number))
        guest = Guest(lines(300), piece=777)
        with monkeypatch.context() as patch:
            killer = Killer(patch, host)
            killer.arm(number / 2)
            survived = await life(host, guest, rotation=1)
            killer.dead = False
            killer.left = 0
        rotated = host.path.with_name("0.log.001")
        if not survived and kubelet == "renames back" and rotated.exists():
            rotated.rename(host.path)
        relay = await host.open(guest)
        # An empty new file would keep the kubelet from asking for one.
        assert not host.path.exists() or host.path.stat().st_ino == host.position.inode
        assert all(path.read_bytes()[-1:] in (b"\n", b"") for path in host.files())
        await finish(relay)
        assert await life(host, guest, rotation=0)
        relay = await host.open(guest)
        await settle(guest)
        assert host.joined() == guest.stream, f"killed at step {number}"
        assert all(path.read_bytes()[-1:] in (b"\n", b"") for path in host.files())
        await finish(relay)
        if survived:
            break
    assert number > 20


async def test_killed_again_and_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many lives, each cut short at a random step, with a rename in most of them."""
    guest = Guest(lines(4000), piece=1501)
    chance = random.Random(7)
    with monkeypatch.context() as patch:
        killer = Killer(patch, host)
        for rotation in range(1, 120):
            killer.arm(chance.randrange(1, 80) / 2)
            await life(host, guest, rotation if chance.random() < 0.7 else 0)
        killer.dead, killer.left = False, 0
        relay = await host.open(guest, inline=True)
        await settle(guest)
        await finish(relay)
    assert host.joined() == guest.stream
    assert len(host.files()) > 10


async def test_a_file_renamed_while_nobody_was_there_is_found(host: Host) -> None:
    guest = Guest(lines(100))
    relay = await host.open(guest)
    await settle(guest)
    await finish(relay)
    host.rotate("20260101-000000")
    guest.stream += lines(20, 100)
    relay = await host.open(guest)
    await settle(guest)
    assert not host.path.exists()  # the kubelet looks for a missing file, and asks for it
    await relay.reopen()
    guest.stream += lines(20, 120)
    await settle(guest)
    assert host.joined() == guest.stream
    assert host.path.read_bytes() == lines(20, 120)
    await finish(relay)


async def test_another_files_reused_number_is_not_trusted(host: Host) -> None:
    """Only names that a rotation of this log can have are looked at."""
    guest = Guest(lines(100))
    relay = await host.open(guest)
    await settle(guest)
    await finish(relay)
    stranger = host.path.with_name("1.log")
    host.path.rename(stranger)
    guest.stream += lines(5, 100)
    relay = await host.open(guest)
    await settle(guest)
    assert stranger.read_bytes() == lines(100)
    assert host.path.read_bytes() == lines(5, 100)
    await finish(relay)


async def test_a_file_that_is_gone_costs_only_its_own_lines(host: Host) -> None:
    guest = Guest(lines(100))
    relay = await host.open(guest)
    await settle(guest)
    await finish(relay)
    host.path.unlink()
    guest.stream += lines(20, 100)
    relay = await host.open(guest)
    await settle(guest)
    assert host.path.read_bytes() == lines(20, 100)
    await finish(relay)
    again = await host.open(guest)
    assert again.offset == len(guest.stream)
    await finish(again)


async def test_a_truncated_file_goes_on(host: Host) -> None:
    """As `logrotate` with copytruncate does it, to a living daemon and to a dead one."""
    guest = Guest(lines(100))
    relay = await host.open(guest)
    await settle(guest)
    os.truncate(host.path, 0)
    guest.stream += lines(20, 100)
    await settle(guest)
    await finish(relay)
    os.truncate(host.path, 0)
    guest.stream += lines(20, 120)
    relay = await host.open(guest)
    await settle(guest)
    assert host.path.read_bytes() == lines(20, 120)
    assert relay.offset == len(guest.stream)
    await finish(relay)


async def test_a_new_connection_goes_on_where_the_file_ends(host: Host) -> None:
    guest = Guest(lines(1000), piece=3001)
    relay = await host.open(guest, inline=True)
    while relay.offset < 20_000:
        guest.pump()
        await asyncio.sleep(0)
    assert guest.pump()  # received, not written: will be asked for again
    await relay.attach(guest)
    await relay.begin(guest.open_log(relay.offset))
    await settle(guest)
    assert host.joined() == guest.stream
    await finish(relay)


# ---------------------------------------------------------- the whole path, and a real SIGKILL


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[FakeAgent]:
    agent = FakeAgent()
    async with agent.listen(tmp_path / "agent.sock"):
        yield agent


async def test_from_agent_to_file(agent: FakeAgent, host: Host, tmp_path: Path) -> None:
    client = await GuestClient.connect(
        f"unix:{tmp_path}/agent.sock", token=TOKEN, epoch=1, on_event=lambda event: None, timeout_s=5
    )
    relay = await LogRelay.open(host.path, host.position, host.save)
    stream = await relay.attach(client)
    await client.call(pb.Request(start=pb.Start(id="c1", log_stream=stream, log_window=WINDOW)), 5)
    await relay.begin()
    text = lines(20_000)
    for at in range(0, len(text), 100_000):
        agent.print_log("c1", text[at : at + 100_000])
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        while agent.containers["c1"].log_start < len(text):
            await asyncio.sleep(0.001)
    assert host.joined() == text
    agent.print_log("c1", b"the last line\n")
    agent.exit("c1")
    await asyncio.wait_for(relay.complete(), 10)
    assert host.joined() == text + b"the last line\n"
    await finish(relay)
    await client.close()


DAEMON = textwrap.dedent("""
    import asyncio, os, sys, uvloop
    from pathlib import Path
    import msgspec
    from sandbox.guest import guest_pb2 as pb
    from sandbox.guest.client import GuestClient
    from sandbox.logs.relay import WINDOW, LogRelay
    from sandbox.records import LogPosition

    socket, path, record, epoch = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])

    def save(position):
        staged = record.with_suffix(".new")
        staged.write_bytes(msgspec.json.encode(position))
        os.replace(staged, record)

    async def main():
        position = LogPosition()
        if record.exists():
            position = msgspec.json.decode(record.read_bytes(), type=LogPosition)
        client = await GuestClient.connect("unix:" + socket, token=b"token of the vm.", epoch=epoch,
                                           on_event=lambda event: None, timeout_s=20)
        relay = await LogRelay.open(path, position, save)
        stream = await relay.attach(client)
        reply = await client.call(pb.Request(open_log=pb.OpenLog(
            container_id="c1", offset=relay.offset, stream=stream, window=WINDOW)), 20)
        await relay.begin(reply.log_opened.offset)
        rotation = 0
        while True:
            await asyncio.sleep(0.003)
            if path.exists() and path.stat().st_size > 200_000:
                rotation += 1
                path.rename(path.with_name(f"{path.name}.{epoch:03}-{rotation:04}"))
            await relay.reopen()

    uvloop.run(main())
""")


async def test_a_daemon_killed_for_real(agent: FakeAgent, host: Host, tmp_path: Path) -> None:
    """SIGKILL amid writing and rotating, several times; the rest is read by a last daemon."""
    text = lines(100_000)
    agent.print_log("c1", text)
    chance = random.Random(3)
    record = tmp_path / "position.json"
    for epoch in range(1, 100):
        agent.connected.clear()
        daemon = await asyncio.to_thread(
            subprocess.Popen,
            [sys.executable, "-c", DAEMON, f"{tmp_path}/agent.sock", str(host.path), str(record), str(epoch)],
            cwd=Path(__file__).parents[2],
        )
        try:
            await asyncio.wait_for(agent.connected.wait(), 30)
            goal = agent.containers["c1"].log_start + chance.randrange(1_500_000, 2_500_000)
            async with asyncio.timeout(30):
                while agent.containers["c1"].log_start < min(goal, len(text)):
                    await asyncio.sleep(0.001)
        finally:
            daemon.send_signal(signal.SIGKILL)
            await asyncio.to_thread(daemon.wait, 10)
        if agent.containers["c1"].log_start == len(text):
            break
    assert epoch >= 3
    assert host.joined() == text
