"""Attachments to the agent's containers: what they carry, who waits for whom, how they end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from sandbox.errors import GuestError, StreamReset
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.sessions import GuestAttachment, GuestExec, Reader
from sandbox.session import AttachmentStalled
from tests.kit.agent import Agent, Guest, Sink, process
from tests.kit.eventually import eventually

ECHO = "while read line; do echo out $line; echo err $line >&2; done; echo end of stdin; sleep 1000"
FLOOD = "read x; while :; do echo 0123456789012345678901234567890123456789; done"


class Collected:
    """Reads a stream to its end, and keeps what it brings."""

    def __init__(self, reader: Reader | None) -> None:
        assert reader is not None
        self.reader = reader
        self.seen = bytearray()
        self.task = asyncio.ensure_future(self._read())
        # retrieved here: if the garbage collector reports it during a parse, Python 3.11's parser fails
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _read(self) -> None:
        while chunk := await self.reader.read():
            self.seen += chunk

    async def until(self, enough: Callable[[bytes], bool], timeout_s: float = 20) -> bytes:
        """Return what was read once it is `enough`."""
        return await eventually(lambda: bytes(self.seen), until=enough, timeout_s=timeout_s)

    async def all(self, timeout_s: float = 20) -> bytes:
        """Return everything, at the end of the stream."""
        await asyncio.wait_for(self.task, timeout_s)
        return bytes(self.seen)


async def attach(guest: Guest, id: str, **more: Any) -> GuestAttachment:
    """Attach to all streams, unless `more` excludes some."""
    options = {"stdin": True, "stdout": True, "stderr": True} | more
    return await GuestAttachment.start(guest.client, id, **options)


async def logged(guest: Guest, script: str, **more: Any) -> tuple[str, Sink]:
    """Start a container with stdin; return its id and its log."""
    sink = Sink(guest.client)
    argv = ["sh", "-c", script]
    id = await guest.start(argv, stdin=True, log_stream=sink.stream, log_window=sink.window, **more)
    return id, sink


async def test_attachment_carries_stdin_and_both_outputs_beside_the_log(guest: Guest) -> None:
    id, log = await logged(guest, ECHO)
    session = await attach(guest, id)
    out, err = Collected(session.stdout), Collected(session.stderr)
    assert session.stdin is not None
    await session.stdin.write(b"word\n")
    assert await out.until(lambda seen: b"\n" in seen) == b"out word\n"
    assert await err.until(lambda seen: b"\n" in seen) == b"err word\n"
    await log.read(lambda seen: b"stdout F out word\n" in seen and b"stderr F err word\n" in seen)
    session.close()


async def test_attachment_gets_only_output_from_then_on(guest: Guest) -> None:
    id, log = await logged(guest, "echo before; read x; echo after; read x")
    await log.read(lambda seen: b"before" in seen)
    session = await attach(guest, id)
    out = Collected(session.stdout)
    assert session.stdin is not None
    await session.stdin.write(b"\n")
    assert await out.until(lambda seen: b"\n" in seen) == b"after\n"
    session.close()


async def test_output_without_a_newline_comes_at_once(guest: Guest) -> None:
    id, _ = await logged(guest, "read x; printf prompt; read x")
    session = await attach(guest, id)
    out = Collected(session.stdout)
    assert session.stdin is not None
    await session.stdin.write(b"\n")
    assert await out.until(lambda seen: seen == b"prompt") == b"prompt"
    session.close()


async def test_several_attachments_get_the_same_output(guest: Guest) -> None:
    id, _ = await logged(guest, ECHO)
    sessions = [await attach(guest, id) for _ in range(3)]
    collected = [Collected(session.stdout) for session in sessions]
    for number, session in enumerate(sessions):
        assert session.stdin is not None
        await session.stdin.write(b"from %d\n" % number)
        for each in collected:
            await each.until(lambda seen, number=number: b"out from %d\n" % number in seen)  # type: ignore[misc]
    sessions[0].close()
    assert sessions[1].stdin is not None
    await sessions[1].stdin.write(b"still\n")
    for each in collected[1:]:
        assert (await each.until(lambda seen: b"still" in seen)).count(b"\n") == 4
    for session in sessions[1:]:
        session.close()


async def test_attachment_ends_after_the_containers_last_output(guest: Guest) -> None:
    id, _ = await logged(guest, "read x; seq 1 20000; exit 3")
    session = await attach(guest, id)
    assert session.stdin is not None
    await session.stdin.write(b"\n")
    out = await Collected(session.stdout).all()
    assert out.endswith(b"\n20000\n")
    assert out.count(b"\n") == 20000
    assert await asyncio.wait_for(session.wait(), 10) == 0
    assert (await guest.exited(id)).exit_code == 3
    session.close()


async def test_queued_output_is_sent_after_the_container_was_removed(guest: Guest) -> None:
    """A slow reader gets the rest after the container is gone, and removal does not wait for it."""
    id, _ = await logged(guest, "read x; seq 1 100000")
    session = await attach(guest, id, stderr=False)
    assert session.stdin is not None
    await session.stdin.write(b"\n")
    assert session.stdout is not None
    seen = await session.stdout.read()
    await asyncio.wait_for(guest.exited(id), 20)
    await asyncio.wait_for(guest.remove(id), 10)
    seen += await Collected(session.stdout).all()
    assert seen.endswith(b"\n100000\n")
    assert await session.wait() == 0


async def test_stdin_once_closes_stdin_for_all_attachments(guest: Guest) -> None:
    id, log = await logged(guest, ECHO)
    session = await attach(guest, id, stdin_once=True)
    other = await attach(guest, id)
    out = Collected(session.stdout)
    assert session.stdin is not None
    await session.stdin.write(b"last\n")
    session.stdin.close()
    assert (await out.until(lambda seen: b"end of stdin\n" in seen)).startswith(b"out last\n")
    await log.read(lambda seen: b"end of stdin" in seen)
    late = await attach(guest, id)
    for each in (other, late):
        assert each.stdin is not None
        with pytest.raises(StreamReset):
            for _ in range(100):
                await each.stdin.write(b"too late\n")
                await asyncio.sleep(0.002)
    for each in (session, other, late):
        each.close()


async def test_stdin_once_closes_stdin_when_the_attachment_is_closed(guest: Guest) -> None:
    id, log = await logged(guest, ECHO)
    session = await attach(guest, id, stdin_once=True)
    session.close()
    await log.read(lambda seen: b"end of stdin" in seen)


async def test_stdin_once_closes_stdin_when_the_connection_is_lost(guest: Guest) -> None:
    id, _ = await logged(guest, ECHO)
    await attach(guest, id, stdin_once=True)
    await guest.connect()
    log = Sink(guest.client)
    await guest.call(open_log=pb.OpenLog(container_id=id, offset=0, stream=log.stream, window=log.window))
    await log.read(lambda seen: b"end of stdin" in seen)


async def test_stdin_stays_open_for_the_next_attachment(guest: Guest) -> None:
    id, log = await logged(guest, ECHO)
    for word in (b"one", b"two"):
        session = await attach(guest, id, stdout=False, stderr=False)
        assert session.stdin is not None
        await session.stdin.write(word + b"\n")
        session.stdin.close()
        assert await asyncio.wait_for(session.wait(), 10) == 0, "all its streams have ended"
        session.close()
    seen = await log.read(lambda seen: b"out two" in seen)
    assert b"end of stdin" not in seen


async def test_attach_to_a_container_without_stdin_resets_it(guest: Guest) -> None:
    id = await guest.start(["sleep", "1000"])
    session = await attach(guest, id)
    assert session.stdin is not None
    with pytest.raises(StreamReset):
        await asyncio.wait_for(session.stdin.write(b"without a reader\n"), 10)
    session.close()


async def test_attachment_to_a_terminal_can_resize_it(guest: Guest) -> None:
    script = "stty -echo; read x; stty size; read x; stty size; tty"
    argv = ["sh", "-c", script]
    id = await guest.start(argv, stdin=True, process=process(argv, tty=True, rows=9, columns=33))
    session = await attach(guest, id)
    out = Collected(session.stdout)
    assert session.stdin is not None
    await session.stdin.write(b"\n")
    await out.until(lambda seen: b"9 33\r\n" in seen)
    await session.resize(50, 132)
    await session.stdin.write(b"\n")
    assert b"50 132\r\n/dev/" in await out.all()
    assert await session.wait() == 0


async def test_resize_of_an_execs_terminal_sends_sigwinch(guest: Guest) -> None:
    id = await guest.start(["sleep", "1000"])
    argv = ["sh", "-c", "trap 'stty size; exit 5' WINCH; echo ready; while :; do sleep 0.01; done"]
    session = await GuestExec.start(
        guest.client, id, process(argv, tty=True), stdin=True, stdout=True, stderr=False
    )
    out = Collected(session.stdout)
    await out.until(lambda seen: b"ready" in seen)
    await session.resize(7, 21)
    await out.until(lambda seen: b"7 21\r\n" in seen)
    assert await session.wait() == 5
    with pytest.raises(GuestError):
        await session.resize(1, 1)
    session.close()


@pytest.mark.parametrize("tty", [False, True])
async def test_closed_exec_gets_a_hangup_or_broken_pipe(guest: Guest, tty: bool) -> None:
    """It is not killed, but gets EPIPE or SIGHUP, which end most programs."""
    id = await guest.start(["sleep", "1000"])
    argv = ["sh", "-c", "while :; do echo on and on; sleep 0.01; done"]
    session = await GuestExec.start(
        guest.client, id, process(argv, tty=tty), stdin=True, stdout=True, stderr=not tty
    )
    await Collected(session.stdout).until(lambda seen: b"on and on" in seen)
    ended = guest.client.expect_exit(session._id)
    session._streams.close()
    assert (await asyncio.wait_for(ended, 10)).exit_code in (129, 141)


async def test_attach_after_container_exit_fails(guest: Guest) -> None:
    gone = await guest.start(["true"])
    await guest.exited(gone)
    for id in (gone, "unknown"):
        with pytest.raises(GuestError) as caught:
            await attach(guest, id)
        assert (caught.value.step, caught.value.errno) == ("container", 3)
        with pytest.raises(GuestError):
            await guest.call(resize=pb.Resize(container_id=id, rows=1, columns=1))


async def test_slow_reader_gets_every_byte(guest: Guest) -> None:
    """The container's writer blocks until the reader goes on."""
    id, log = await logged(guest, "read x; seq 1 150000")
    session = await attach(guest, id, stall_timeout_ms=60000)
    assert session.stdin is not None
    assert session.stdout is not None
    await session.stdin.write(b"\n")
    await log.read(lambda seen: len(seen) > 1 << 20)
    await asyncio.sleep(0.1)
    assert b" 150000\n" not in log.seen, "the buffers before the reader hold less than a megabyte"
    assert (await Collected(session.stdout).all()).count(b"\n") == 150000
    await log.read(lambda seen: b" 150000\n" in seen)


async def test_stalled_attachment_is_detached_and_others_go_on(guest: Guest) -> None:
    """Container, log and the other attachments go on."""
    id, log = await logged(guest, FLOOD)
    stopped = await attach(guest, id, stall_timeout_ms=300)
    other = await attach(guest, id, stdin=False)
    collected = Collected(other.stdout)
    assert stopped.stdin is not None
    await stopped.stdin.write(b"\n")
    with pytest.raises(AttachmentStalled):
        await asyncio.wait_for(stopped.wait(), 20)
    before = len(collected.seen), len(log.seen)
    await collected.until(lambda seen: len(seen) > before[0] + (1 << 20))
    await log.read(lambda seen: len(seen) > before[1] + (1 << 20))
    with pytest.raises(StreamReset):
        for _ in range(100):
            await stopped.stdin.write(b"x")
            await asyncio.sleep(0.002)
    stopped.close()
    other.close()


async def test_container_goes_on_after_the_host_of_a_stalled_attachment_has_gone(
    agent: Agent, guest: Guest
) -> None:
    """No host connects again, and the container still goes on after the stall timeout."""
    id = await guest.start(["sh", "-c", f"{FLOOD} & sleep 1; exec sleep 1000"], stdin=True)
    await attach(guest, id, stall_timeout_ms=100)
    await guest.client.close()
    await asyncio.sleep(0.2)
    await guest.connect()
    assert (await guest.exec(id, ["echo", "alive"]))[1] == "alive\n"


async def test_attachments_closed_during_output_do_no_harm(guest: Guest) -> None:
    id, log = await logged(guest, FLOOD)
    first = await attach(guest, id)
    assert first.stdin is not None
    await first.stdin.write(b"\n")
    for _ in range(20):
        session = await attach(guest, id, stdin=False)
        assert session.stdout is not None
        await session.stdout.read()
        session.close()
        session.close()
        with pytest.raises(StreamReset):
            await session.stdout.read()
    first.close()
    await log.read(lambda seen: len(seen) > 100)
