"""Daemons that are killed at any moment: the joined files of a log equal the guest's stream."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.logs.relay import WINDOW, LogRelay
from tests.fakes.guest import FakeAgent
from tests.fakes.logs import LogGuest, LogHost, finish, lines, settle

TOKEN = b"token of the vm."


@pytest.fixture
def host(tmp_path: Path) -> LogHost:
    return LogHost(tmp_path)


class Killed(BaseException):
    """Nothing may run after this, as after SIGKILL."""


class Killer:
    """Kills at the n-th system call, before or after its effect, or half-way through a write."""

    CALLS = ("open", "write", "unlink", "ftruncate", "close")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, host: LogHost) -> None:
        self.left: float = 0
        self.dead = False
        self._open: set[int] = set()
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
            if function is os_open:
                self._open.add(result)
            elif function is os_close:
                self._open.discard(args[0])
            self._step()
            return result

        return wrapper

    def close_descriptors(self) -> None:
        """As the kernel does for a process that was killed."""
        for descriptor in self._open:
            os_close(descriptor)
        self._open.clear()

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


os_open, os_write, os_close = os.open, os.write, os.close


async def life(host: LogHost, guest: LogGuest, rotation: int) -> bool:
    """Live as a daemon: recover, write some, rotate, write some. False when it was killed."""
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
        if relay is not None and relay._file is not None:
            with suppress(Killed):
                relay._file.close()
    return True


async def write_some(relay: LogRelay, guest: LogGuest) -> None:
    for _ in range(6):
        guest.pump()
        await asyncio.sleep(0)
        assert relay._pump is not None
        if relay._pump.done():
            relay._pump.result()


@pytest.mark.parametrize("kubelet", ["renames back", "leaves it"])
async def test_kill_at_every_step_loses_no_line(
    kubelet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill at each step of a daemon's life with one rotation; the next one continues exactly."""
    for number in itertools.count(1):
        (tmp_path / str(number)).mkdir()
        host = LogHost(tmp_path / str(number))
        guest = LogGuest(lines(300), piece=777)
        with monkeypatch.context() as patch:
            killer = Killer(patch, host)
            killer.arm(number / 2)
            survived = await life(host, guest, rotation=1)
            killer.dead = False
            killer.left = 0
            killer.close_descriptors()
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


async def test_repeated_kills_lose_no_line(host: LogHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many daemons, each killed at a random step, with a rename in most of their lives."""
    guest = LogGuest(lines(4000), piece=1501)
    chance = random.Random(7)
    with monkeypatch.context() as patch:
        killer = Killer(patch, host)
        for rotation in range(1, 120):
            killer.arm(chance.randrange(1, 80) / 2)
            await life(host, guest, rotation if chance.random() < 0.7 else 0)
            killer.close_descriptors()
        killer.dead, killer.left = False, 0
        relay = await host.open(guest, inline=True)
        await settle(guest)
        await finish(relay)
    assert host.joined() == guest.stream
    assert len(host.files()) > 10


async def test_file_renamed_between_daemons_is_found(host: LogHost) -> None:
    guest = LogGuest(lines(100))
    relay = await host.open(guest)
    await settle(guest)
    await finish(relay)
    host.rotate("20260101-000000")
    guest.stream += lines(20, 100)
    relay = await host.open(guest)
    await settle(guest)
    assert not host.path.exists()  # the kubelet finds the file missing, and requests a new one
    await relay.reopen()
    guest.stream += lines(20, 120)
    await settle(guest)
    assert host.joined() == guest.stream
    assert host.path.read_bytes() == lines(20, 120)
    await finish(relay)


async def test_reused_inode_of_another_log_is_not_opened(host: LogHost) -> None:
    """Only names that a rotation of this log can have are considered."""
    guest = LogGuest(lines(100))
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


async def test_removed_file_loses_only_its_own_lines(host: LogHost) -> None:
    guest = LogGuest(lines(100))
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


async def test_truncated_file_is_continued(host: LogHost) -> None:
    """As `logrotate` with copytruncate does it, to a running daemon and between two daemons."""
    guest = LogGuest(lines(100))
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


async def test_new_connection_continues_where_the_file_ends(host: LogHost) -> None:
    guest = LogGuest(lines(1000), piece=3001)
    relay = await host.open(guest, inline=True)
    while relay.offset < 20_000:
        guest.pump()
        await asyncio.sleep(0)
    assert guest.pump()  # received, not written: is requested again
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


async def test_stream_of_a_guest_client_reaches_the_file(
    agent: FakeAgent, host: LogHost, tmp_path: Path
) -> None:
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
    await acknowledged(agent, len(text))
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
    from sandbox.host.files import write_json
    from sandbox.guest import guest_pb2 as pb
    from sandbox.guest.client import GuestClient
    from sandbox.logs.relay import WINDOW, LogRelay
    from sandbox.records import LogPosition

    socket, path, record, epoch = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])

    def save(position):
        write_json(record, position)

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


async def acknowledged(agent: FakeAgent, goal: int) -> None:
    """Wait until byte `goal` of the log is acknowledged."""
    reached = asyncio.Event()
    agent.on_acknowledged = lambda log_start: reached.set() if log_start >= goal else None
    if agent.containers["c1"].log_start < goal:
        await asyncio.wait_for(reached.wait(), 30)


async def test_daemon_killed_by_sigkill_loses_no_line(
    agent: FakeAgent, host: LogHost, tmp_path: Path
) -> None:
    """SIGKILL during writing and rotation, several times; a last daemon reads the rest."""
    text = lines(100_000)
    agent.print_log("c1", text)
    log = agent.containers["c1"]
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
            await acknowledged(agent, min(log.log_start + chance.randrange(1_500_000, 2_500_000), len(text)))
        finally:
            daemon.send_signal(signal.SIGKILL)
            await asyncio.to_thread(daemon.wait, 10)
        if log.log_start == len(text):
            break
    assert epoch >= 3
    assert host.joined() == text
