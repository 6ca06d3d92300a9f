"""The agent's container logs: their format, and that no disconnect loses or doubles a byte."""

from __future__ import annotations

import asyncio
import random
import re
from datetime import UTC, datetime

import pytest

from sandbox.errors import GuestError
from sandbox.guest import guest_pb2 as pb
from tests.kit.agent import Guest, RawHost, Sink, frame, process, start
from tests.kit.eventually import eventually

LINE = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z) (stdout|stderr) ([FP]) (.*)", re.DOTALL)
CUT = 16 * 1024


def parse(log: bytes) -> list[tuple[str, str, bytes]]:
    """Return stream, tag and text of each line. Every line must be whole."""
    assert log == b"" or log.endswith(b"\n")
    parsed = []
    for line in log.split(b"\n")[:-1]:
        match = LINE.fullmatch(line)
        assert match is not None, line[:80]
        parsed.append((match[2].decode(), match[3].decode(), match[4]))
    return parsed


async def log_of(guest: Guest, script: str, **more: object) -> list[tuple[str, str, bytes]]:
    sink = Sink(guest.client)
    id = await guest.start(["sh", "-c", script], log_stream=sink.stream, log_window=sink.window, **more)
    await guest.exited(id)
    await asyncio.wait_for(sink.ended.wait(), 20)
    await guest.remove(id)
    return parse(bytes(sink.seen))


async def test_log_lines_have_stream_and_tag(guest: Guest) -> None:
    lines = await log_of(guest, "echo one; echo; echo two >&2; sleep 0.05; printf 'a\\tb\\n'")
    assert sorted(lines[:3]) == [("stderr", "F", b"two"), ("stdout", "F", b""), ("stdout", "F", b"one")]
    assert lines[3] == ("stdout", "F", b"a\tb")


async def test_log_line_has_the_time_of_writing(guest: Guest) -> None:
    sink = Sink(guest.client)
    before = datetime.now(UTC)
    id = await guest.start(["echo", "now"], log_stream=sink.stream, log_window=sink.window)
    await asyncio.wait_for(sink.ended.wait(), 20)
    match = LINE.match(bytes(sink.seen))
    assert match is not None
    written = datetime.fromisoformat(match[1].decode())
    assert before <= written <= datetime.now(UTC)
    await guest.remove(id)


async def test_last_line_without_a_newline_is_partial(guest: Guest) -> None:
    assert await log_of(guest, "echo whole; printf unended") == [
        ("stdout", "F", b"whole"),
        ("stdout", "P", b"unended"),
    ]


async def test_line_written_in_pieces_is_one_line(guest: Guest) -> None:
    assert await log_of(guest, "for i in 1 2 3; do printf $i; sleep 0.02; done; echo") == [
        ("stdout", "F", b"123")
    ]


async def test_lines_longer_than_16_kib_are_cut(guest: Guest) -> None:
    for length in (CUT - 1, CUT, CUT + 1, 3 * CUT + 5):
        lines = await log_of(guest, f"head -c {length} /dev/zero; echo; echo after")
        assert lines[-1] == ("stdout", "F", b"after")
        texts = [len(text) for _, _, text in lines[:-1]]
        assert all(each == CUT for each in texts[:-1])
        assert 0 < texts[-1] <= CUT
        assert sum(texts) == length
        assert [tag for _, tag, _ in lines[:-1]] == ["P"] * (len(texts) - 1) + ["F"]


async def test_line_of_exactly_16_kib_without_a_newline_is_partial(guest: Guest) -> None:
    lines = await log_of(guest, f"head -c {CUT} /dev/zero")
    assert lines == [("stdout", "P", bytes(CUT))]


async def test_log_of_a_terminal_is_stdout_with_carriage_returns(guest: Guest) -> None:
    wanted = process(["sh", "-c", "echo out; echo err >&2; stty size; tty; printf end"], tty=True, rows=7)
    lines = await log_of(guest, "", process=wanted)
    assert [(stream, tag) for stream, tag, _ in lines] == [("stdout", "F")] * 4 + [("stdout", "P")]
    assert [text for *_, text in lines] == [b"out\r", b"err\r", b"7 80\r", b"/dev/pts/0\r", b"end"]


async def test_output_to_the_console_is_logged(guest: Guest) -> None:
    wanted = process(["sh", "-c", "echo over there >/dev/console"], tty=True)
    assert await log_of(guest, "", process=wanted) == [("stdout", "F", b"over there\r")]


async def test_user_other_than_root_can_open_its_output_again(guest: Guest) -> None:
    script = "echo one >/dev/stdout; echo two >/proc/self/fd/2"
    plain, terminal = (process(["sh", "-c", script], uid=1000, tty=tty) for tty in (False, True))
    assert {text for *_, text in await log_of(guest, "", process=plain)} == {b"one", b"two"}
    assert {text for *_, text in await log_of(guest, "", process=terminal)} == {b"one\r", b"two\r"}


async def test_log_of_100000_lines_is_complete(guest: Guest) -> None:
    lines = await log_of(guest, "seq 1 100000")
    assert [int(text) for *_, text in lines] == list(range(1, 100001))


async def test_log_keeps_to_its_window_and_credit_acknowledges(guest: Guest) -> None:
    sink = Sink(guest.client, 1000, hold=True)
    id = await guest.start(["seq", "1", "1000"], log_stream=sink.stream, log_window=1000)
    await guest.exited(id)
    assert len(await sink.read(lambda seen: len(seen) >= 1000)) == 1000
    guest.client.grant(sink.stream, 300)
    assert len(await sink.read(lambda seen: len(seen) >= 1300)) == 1300
    await guest.connect()
    state = next(each for each in guest.client.welcome.containers if each.id == id)
    assert state.log_start == 300
    assert state.state == pb.ContainerState.EXITED
    assert state.exited.exit_code == 0


async def test_log_resumed_at_any_byte_is_complete(guest: Guest) -> None:
    """What a killed daemon has written is some prefix of the stream."""
    dice = random.Random(4711)
    sink = Sink(guest.client, 3000, hold=True)
    id = await guest.start(["sh", "-c", "seq 1 5000; printf last"], log_stream=sink.stream, log_window=3000)
    written = bytearray()
    rounds = 0
    while not sink.ended.is_set():
        rounds += 1
        await asyncio.sleep(0.005)
        written += sink.seen[: dice.randrange(len(sink.seen) + 1)]
        await guest.connect()
        sink = Sink(guest.client, 20000, hold=True)
        request = pb.OpenLog(container_id=id, offset=len(written), stream=sink.stream, window=20000)
        reply = await guest.call(open_log=request)
        assert reply.log_opened.offset == len(written)
        await asyncio.sleep(0.005)
    written += sink.seen
    assert rounds > 3
    lines = parse(bytes(written))
    assert [int(text) for *_, text in lines[:-1]] == list(range(1, 5001))
    assert lines[-1] == ("stdout", "P", b"last")


async def test_writer_blocks_while_the_daemon_is_away(guest: Guest) -> None:
    sink = Sink(guest.client, 0)
    script = "seq 1 400000; echo done >&2"
    id = await guest.start(["sh", "-c", script], log_stream=sink.stream)
    await guest.client.close()

    async def state_of() -> pb.ContainerState:
        welcome = await guest.connect()
        return next(each for each in welcome.containers if each.id == id)

    await eventually(state_of, until=lambda state: state.log_end - state.log_start >= 1 << 20)
    await asyncio.sleep(0.1)
    state = await state_of()
    assert state.state == pb.ContainerState.RUNNING
    kept = state.log_end - state.log_start
    assert (1 << 20) <= kept < (1 << 20) + (1 << 19), "the buffer is bounded"
    sink = Sink(guest.client, 1 << 20)
    await guest.call(open_log=pb.OpenLog(container_id=id, stream=sink.stream, window=sink.window))
    await asyncio.wait_for(sink.ended.wait(), 20)
    lines = parse(bytes(sink.seen))
    assert [int(text) for stream, _, text in lines if stream == "stdout"] == list(range(1, 400001))
    assert [text for stream, _, text in lines if stream == "stderr"] == [b"done"]


async def test_log_that_was_never_opened_drops_its_oldest_lines(guest: Guest) -> None:
    id = await guest.start(["seq", "1", "400000"])
    assert (await guest.exited(id)).exit_code == 0
    sink = Sink(guest.client, 1 << 22)
    reply = await guest.call(open_log=pb.OpenLog(container_id=id, stream=sink.stream, window=sink.window))
    assert reply.log_opened.offset > 0, "the oldest lines were dropped"
    await asyncio.wait_for(sink.ended.wait(), 20)
    lines = parse(bytes(sink.seen))
    numbers = [int(text) for *_, text in lines]
    assert numbers == list(range(numbers[0], 400001))


async def test_log_opened_again_moves_to_the_new_stream(guest: Guest) -> None:
    first = Sink(guest.client)
    id = await guest.start(["sh", "-c", "echo one; sleep 0.2; echo two"], log_stream=first.stream)
    second = Sink(guest.client)
    await guest.call(open_log=pb.OpenLog(container_id=id, stream=second.stream, window=second.window))
    await asyncio.wait_for(second.ended.wait(), 20)
    assert [text for *_, text in parse(bytes(second.seen))] == [b"one", b"two"]
    assert not first.seen


async def test_log_opened_beyond_its_end_starts_at_its_end(guest: Guest) -> None:
    id = await guest.start(["echo", "x"])
    await guest.exited(id)
    sink = Sink(guest.client)
    request = pb.OpenLog(container_id=id, offset=1 << 60, stream=sink.stream, window=100)
    reply = await guest.call(open_log=request)
    assert reply.log_opened.offset == len("2016-10-06T00:17:09.669794202Z stdout F x\n")
    await asyncio.wait_for(sink.ended.wait(), 20)
    with pytest.raises(GuestError) as caught:
        await guest.call(open_log=pb.OpenLog(container_id="unknown", stream=9))
    assert caught.value.errno == 3


async def test_stopped_log_reader_blocks_only_its_stream(guest: Guest) -> None:
    stopped = Sink(guest.client, 1000, hold=True)
    flood = await guest.start(["yes"], log_stream=stopped.stream, log_window=1000)
    assert await guest.run(["seq", "1", "50000"]) == (0, [str(number) for number in range(1, 50001)])
    assert (await guest.exec(flood, ["echo", "quick"], timeout_s=5))[1] == "quick\n"
    assert len(stopped.seen) == 1000


async def test_exit_event_comes_after_all_output(guest: Guest) -> None:
    """Read frame by frame, as the client does not show the order."""
    await guest.client.close()
    host = RawHost(guest.agent.socket)
    host.greet()
    id = guest.name()
    request = pb.Request(start=start(id, guest.agent.rootfs(), ["echo", "x"], log_stream=5, log_window=4096))
    host.send(frame(3, 1, request.SerializeToString()))
    kinds = []
    while 8 not in kinds or 5 not in kinds:
        kind, stream, payload = host.frame()
        kinds.append(kind)
        assert kind != 6 or (stream, payload[-2:]) == (5, b"x\n")
    assert kinds[0] == 4
    state = host.call(2, pb.Request(ping=pb.Ping()))
    assert not state.HasField("failure")
    host.close()
