"""The guest client against a fake agent: its contract, and its defence against a hostile guest."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop

from sandbox.errors import (
    DeadlineExceeded,
    GuestError,
    GuestUnreachable,
    ProtocolError,
    StreamReset,
    VersionMismatch,
)
from sandbox.guest import client as client_module
from sandbox.guest import connection, execs
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.guest.execs import run_exec
from sandbox.guest.frames import MIN_VERSION, VERSION, Kind, encode
from tests.fakes.guest import FakeAgent, FakeProgram
from tests.kit.eventually import eventually

TOKEN = b"token of the vm."
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy:DeprecationWarning")
PING = pb.Request(ping=pb.Ping())


@pytest.fixture(params=["uvloop", "asyncio"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    policy: asyncio.AbstractEventLoopPolicy
    policy = uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()
    return policy


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[FakeAgent]:
    agent = FakeAgent()
    async with agent.listen(tmp_path / "agent.sock"):
        yield agent


class Host:
    """Connects clients, and collects their events."""

    def __init__(self, path: Path) -> None:
        self.address = f"unix:{path}"
        self.epoch = 0
        self.events: list[pb.Event] = []
        self.clients: list[GuestClient] = []
        self.on_event: Callable[[pb.Event], None] = self.events.append

    async def connect(self, timeout_s: float = 5) -> GuestClient:
        self.epoch += 1
        client = await GuestClient.connect(
            self.address,
            token=TOKEN,
            epoch=self.epoch,
            on_event=lambda event: self.on_event(event),
            timeout_s=timeout_s,
        )
        self.clients.append(client)
        return client


@pytest.fixture
async def host(agent: FakeAgent, tmp_path: Path) -> AsyncIterator[Host]:
    host = Host(tmp_path / "agent.sock")
    yield host
    for client in host.clients:
        await client.close()


class Sink:
    """Collects a stream, and grants no credit."""

    def __init__(self) -> None:
        self.got = bytearray()
        self.end = asyncio.Event()

    def data(self, chunk: memoryview) -> None:
        self.got += chunk

    def closed(self) -> None:
        self.end.set()


async def until(done: Callable[[], bool]) -> None:
    await eventually(done, timeout_s=5)


# --------------------------------------------------------------------------- hello and welcome


async def test_connect_sends_hello_and_keeps_the_welcome(agent: FakeAgent, host: Host) -> None:
    agent.print_log("c1", b"line\n")
    client = await host.connect()
    assert client.welcome.agent == "fake"
    assert [(state.id, state.log_end) for state in client.welcome.containers] == [("c1", 5)]
    assert (agent.hellos[0].epoch, agent.hellos[0].version) == (1, 2)
    assert abs(agent.hellos[0].wall_ns - time.time_ns()) < 5e9


async def test_hello_has_the_time_at_which_the_guest_answered(agent: FakeAgent, host: Host) -> None:
    """A guest that is still booting gets the current time, not that of the connect."""
    agent.silent = True
    connecting = asyncio.create_task(host.connect())
    await until(lambda: agent.token is not None)
    answered_ns = time.time_ns()
    agent.silent = False
    agent._resync(agent_nonce(connecting))
    await connecting
    assert agent.hellos[0].wall_ns >= answered_ns


def agent_nonce(connecting: asyncio.Task[GuestClient]) -> bytes:
    """Return the nonce of a pending connect, as the guest read it from the wire."""
    frame = connecting.get_coro()
    while frame is not None:
        local = frame.cr_frame.f_locals  # type: ignore[union-attr]
        if "opening" in local:
            return bytes(local["opening"][16:])
        frame = frame.cr_await  # type: ignore[union-attr]
    raise AssertionError("no connect is pending")


async def test_bytes_queued_for_an_old_connection_are_dropped(agent: FakeAgent, host: Host) -> None:
    await host.connect()
    agent.stale = encode(Kind.REPLY, 77, b"") + b"\xff" * 200_000
    client = await host.connect()
    assert client.welcome.epoch == 2
    await client.call(PING, 5)


async def test_partial_frame_of_a_dead_daemon_does_no_harm(agent: FakeAgent, host: Host) -> None:
    first = await host.connect()
    first._connection.write(encode(Kind.REQUEST, 5, bytes(1000))[:500])
    await first.close()
    second = await host.connect()
    await second.call(PING, 5)


@pytest.mark.parametrize("versions", [(1, VERSION), (MIN_VERSION, 9), (1, 9)])
async def test_connect_to_an_agent_with_a_common_version_works(
    agent: FakeAgent, host: Host, versions: tuple[int, int]
) -> None:
    agent.versions = versions
    client = await host.connect()
    assert client.version == VERSION
    await client.call(PING, 5)


@pytest.mark.parametrize(
    ("versions", "text"),
    [((9, 12), "agent speaks protocol versions 9 to 12"), ((1, 1), "agent speaks protocol version 1,")],
)
async def test_connect_without_a_common_version_is_refused_with_both_ranges(
    agent: FakeAgent, host: Host, versions: tuple[int, int], text: str
) -> None:
    agent.versions = versions
    with pytest.raises(VersionMismatch, match=f"{text}.*Husk speaks version {VERSION};") as caught:
        await host.connect()
    assert (caught.value.agent, caught.value.husk) == (versions, (MIN_VERSION, VERSION))


async def test_connect_to_an_agent_of_protocol_1_is_refused(agent: FakeAgent, host: Host) -> None:
    """The bytes are such an agent's: its fields 1 to 6 still parse, and it names no range."""
    phase = b"\x0a\x05agent\x10\x80\xb4\xc4\xc3\x21"
    welcome = (
        b"\x08\x01\x10\x01\x1a\x020b\x22\x046.18\x32"
        + bytes([len(phase)])
        + phase
        + b"\xe0\x03\x80\xe8\x92\x26"
    )
    agent.welcome = welcome
    with pytest.raises(VersionMismatch, match="the agent speaks protocol version 1, Husk") as caught:
        await host.connect()
    assert caught.value.agent == (1, 1)


@pytest.mark.parametrize("version", [MIN_VERSION - 1, VERSION + 1, (1 << 32) - 1])
async def test_connect_to_an_agent_that_chooses_a_version_out_of_range_is_refused(
    agent: FakeAgent, host: Host, version: int
) -> None:
    agent.welcome = pb.Welcome(version=version, epoch=1, min_version=1, max_version=9).SerializeToString()
    with pytest.raises(VersionMismatch):
        await host.connect()


async def test_welcome_with_another_epoch_is_refused(agent: FakeAgent, host: Host) -> None:
    agent.wrong_epoch = True
    with pytest.raises(ProtocolError, match="epoch 2, not 1"):
        await host.connect()


async def test_connect_to_a_silent_agent_times_out(agent: FakeAgent, host: Host) -> None:
    agent.silent = True
    with pytest.raises(DeadlineExceeded, match="greeting the agent at unix:"):
        await host.connect(0.05)


async def test_connection_lost_before_the_welcome_raises(agent: FakeAgent, host: Host) -> None:
    agent.silent = True
    connecting = asyncio.create_task(host.connect())
    await until(lambda: agent.token is not None)
    agent.drop()
    with pytest.raises(GuestUnreachable, match="lost"):
        await connecting


# --------------------------------------------------------------------------------------- calls


async def test_calls_are_answered_in_any_order(agent: FakeAgent, host: Host) -> None:
    client = await host.connect()
    agent.answer = lambda request: None
    calls = [asyncio.create_task(client.call(PING, 5)) for _ in range(3)]
    await until(lambda: len(agent.requests) == 3)
    for id in (3, 1, 2):
        values = pb.Reply(values=pb.CgroupValues(values=[b"%d" % id]))
        agent.send(Kind.REPLY, id, values.SerializeToString())
    assert [(await call).values.values[0] for call in calls] == [b"1", b"2", b"3"]


async def test_failure_becomes_a_guest_error_with_bounded_text(agent: FakeAgent, host: Host) -> None:
    agent.answer = lambda request: pb.Reply(failure=pb.Failure(step="mount /x", errno=2, message="m" * 99999))
    client = await host.connect()
    with pytest.raises(GuestError) as caught:
        await client.call(PING, 5)
    assert (caught.value.step, caught.value.errno, len(caught.value.message)) == ("mount /x", 2, 1024)


async def test_reply_after_the_timeout_is_dropped(agent: FakeAgent, host: Host) -> None:
    client = await host.connect()
    agent.answer = lambda request: None
    with pytest.raises(DeadlineExceeded, match="ping"):
        await client.call(PING, 0.02)
    agent.send(Kind.REPLY, 1, pb.Reply().SerializeToString())
    agent.answer = lambda request: True
    await client.call(PING, 5)


async def test_every_waiter_wakes_when_the_connection_is_lost(agent: FakeAgent, host: Host) -> None:
    client = await host.connect()
    agent.answer = lambda request: None
    agent.programs["sleep"] = FakeProgram(until_killed=True)
    reasons: list[GuestUnreachable] = []
    client.on_lost(reasons.append)
    output = client.open_output()
    waiters = [
        asyncio.create_task(client.call(PING, 60)),
        asyncio.create_task(run_exec(client, "c1", pb.Process(argv=["sleep"]), None, 10)),
        asyncio.create_task(output.write(b"no credit for this")),
    ]
    closed = asyncio.create_task(client.wait_closed())
    await until(lambda: len(agent.requests) == 2)
    agent.drop()
    for waiter in waiters:
        with pytest.raises(GuestUnreachable):
            await waiter
    assert isinstance(await closed, GuestUnreachable)
    assert len(reasons) == 1
    with pytest.raises(GuestUnreachable):
        await client.call(PING, 5)
    with pytest.raises(GuestUnreachable):
        client.open_output()
    client.on_lost(reasons.append)
    await until(lambda: len(reasons) == 2)


async def test_close_is_idempotent(agent: FakeAgent, host: Host) -> None:
    client = await host.connect()
    await client.close()
    await client.close()
    assert "closed" in str(await client.wait_closed()) or "lost" in str(await client.wait_closed())


# ------------------------------------------------------------------------------------- streams


async def test_input_keeps_to_its_credit_and_goes_on_with_more(agent: FakeAgent, host: Host) -> None:
    client = await host.connect()
    agent.print_log("c1", b"0123456789")
    sink = Sink()
    stream = client.open_input(sink, 4)
    await client.call(pb.Request(open_log=pb.OpenLog(container_id="c1", stream=stream, window=4)), 5)
    await client.call(PING, 5)
    assert sink.got == b"0123"
    client.grant(stream, 3)
    client.grant(stream, 1)
    await until(lambda: len(sink.got) == 8)
    client.grant(stream, 4)
    agent.exit("c1")
    await asyncio.wait_for(sink.end.wait(), 5)
    assert sink.got == b"0123456789"


async def test_stopped_reader_blocks_only_its_stream(agent: FakeAgent, host: Host) -> None:
    client = await host.connect()
    agent.print_log("c1", bytes(1 << 20))
    sink = Sink()
    stream = client.open_input(sink, 1)
    await client.call(pb.Request(open_log=pb.OpenLog(container_id="c1", stream=stream, window=1)), 5)
    agent.programs["yes"] = FakeProgram(stdout=b"y" * 700_000)
    result = await run_exec(client, "c1", pb.Process(argv=["yes"]), 5, 1 << 20)
    assert len(result.stdout) == 700_000
    assert len(sink.got) == 1


async def test_data_that_crosses_a_reset_is_dropped(agent: FakeAgent, host: Host) -> None:
    client = await host.connect()
    sink = Sink()
    stream = client.open_input(sink, 8)
    client.reset_input(stream)
    client.reset_input(stream)
    client.grant(stream, 5)
    agent.send(Kind.DATA, stream, b"late")
    agent.send(Kind.CLOSE, stream)
    await client.call(PING, 5)
    assert sink.got == b""
    assert agent.resets == [stream]


async def test_output_keeps_to_its_credit(agent: FakeAgent, host: Host) -> None:
    client = await host.connect()
    agent.programs["cat"] = FakeProgram(reads_stdin=True)
    agent.stdin_window = 1000
    stdin, stdout = client.open_output(), Sink()
    out = client.open_input(stdout, 1 << 20)
    exited = client.expect_exit("e1")
    exec = pb.Exec(
        container_id="c1",
        exec_id="e1",
        process=pb.Process(argv=["cat"]),
        stdin_stream=stdin.id,
        stdout_stream=out,
        window=1 << 20,
    )
    await client.call(pb.Request(exec=exec), 5)
    await stdin.write(b"x" * 200_000)
    stdin.close()
    stdin.close()
    assert (await exited).exit_code == 0
    await asyncio.wait_for(stdout.end.wait(), 5)
    assert stdout.got == b"x" * 200_000
    with pytest.raises(StreamReset):
        await stdin.write(b"more")


async def test_reset_by_the_guest_stops_the_writer(agent: FakeAgent, host: Host) -> None:
    client = await host.connect()
    output = client.open_output()
    writing = asyncio.create_task(output.write(b"data"))
    await asyncio.sleep(0)
    agent.send(Kind.RESET, output.id)
    with pytest.raises(StreamReset):
        await writing


# --------------------------------------------------------------------------------------- execs


async def test_exec_returns_outputs_and_code(agent: FakeAgent, host: Host) -> None:
    agent.programs["sh"] = FakeProgram(stdout=b"out", stderr=b"err", exit_code=3)
    client = await host.connect()
    result = await run_exec(client, "c1", pb.Process(argv=["sh"]), 5, 100)
    assert (result.exit_code, result.stdout, result.stderr) == (3, b"out", b"err")
    assert host.events == []


async def test_exec_with_a_tty_has_one_output(agent: FakeAgent, host: Host) -> None:
    agent.programs["sh"] = FakeProgram(stdout=b"out")
    client = await host.connect()
    result = await run_exec(client, "c1", pb.Process(argv=["sh"], tty=True), 5, 100)
    assert (result.stdout, result.stderr) == (b"out", b"")
    assert agent.requests[-1].exec.stderr_stream == 0


async def test_exec_keeps_the_first_bytes_and_reads_on(agent: FakeAgent, host: Host) -> None:
    agent.programs["yes"] = FakeProgram(stdout=b"ab" * 1_000_000, stderr=b"e" * 50)
    client = await host.connect()
    result = await run_exec(client, "c1", pb.Process(argv=["yes"]), 5, 101)
    assert (result.stdout, result.stderr) == (b"ab" * 50 + b"a", b"e" * 50)


async def test_exec_of_a_missing_program_raises(agent: FakeAgent, host: Host) -> None:
    client = await host.connect()
    with pytest.raises(GuestError, match="no such program"):
        await run_exec(client, "c1", pb.Process(argv=["absent"]), 5, 100)
    assert client._exits == {}


async def test_exec_timeout_kills_all_its_processes(agent: FakeAgent, host: Host) -> None:
    agent.programs["sleep"] = FakeProgram(until_killed=True)
    client = await host.connect()
    with pytest.raises(DeadlineExceeded, match=r"exec: not done within 0\.05 s"):
        await run_exec(client, "c1", pb.Process(argv=["sleep"]), 0.05, 100)
    assert [(s.container_id, s.signal, s.all) for s in agent.signals] == [("c1", 9, True)]
    assert agent._execs == {}
    await client.call(PING, 5)


async def test_cancelled_exec_is_killed(agent: FakeAgent, host: Host) -> None:
    agent.programs["sleep"] = FakeProgram(until_killed=True)
    client = await host.connect()
    running = asyncio.create_task(run_exec(client, "c1", pb.Process(argv=["sleep"]), None, 100))
    await until(lambda: bool(agent._execs))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: agent._execs == {})
    await client.call(PING, 5)


async def test_background_child_does_not_delay_exec(
    agent: FakeAgent, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execs, "DRAIN_IDLE_S", 0.02)
    agent.programs["daemon"] = FakeProgram(stdout=b"started", keeps_outputs_open=True)
    client = await host.connect()
    result = await run_exec(client, "c1", pb.Process(argv=["daemon"]), 5, 100)
    assert (result.exit_code, result.stdout) == (0, b"started")
    await client.call(PING, 5)
    assert sorted(agent.resets) == [1, 2]


async def test_exec_that_cannot_be_killed_times_out(
    agent: FakeAgent, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execs, "KILL_S", 0.02)
    client = await host.connect()
    agent.answer = lambda request: None
    with pytest.raises(DeadlineExceeded, match="killing what exec started"):
        await run_exec(client, "c1", pb.Process(argv=["sleep"]), 0.02, 100)


async def test_exits_of_containers_are_events(agent: FakeAgent, host: Host) -> None:
    client = await host.connect()
    agent.exit("c1", 4)
    await client.call(PING, 5)
    assert [(e.exited.container_id, e.exited.exit_code) for e in host.events] == [("c1", 4)]


# ------------------------------------------------------------------------------ hostile guests

HOSTILE = {
    "a reply to nothing": encode(Kind.REPLY, 99, b""),
    "a request": encode(Kind.REQUEST, 1, b""),
    "a second welcome": encode(Kind.WELCOME, 0, b""),
    "data on no stream": encode(Kind.DATA, 50, b"x"),
    "close of no stream": encode(Kind.CLOSE, 50),
    "window of no stream": encode(Kind.WINDOW, 50, bytes(4)),
    "reset of no stream": encode(Kind.RESET, 0),
    "a broken event": encode(Kind.EVENT, 0, b"\xff\xff\xff"),
    "a huge length": struct.pack("<III", 0xFFFFFFFF, Kind.EVENT, 0),
    "too many events": encode(Kind.EVENT, 0, b"") * (2 * client_module.MAX_EVENTS_PER_S + 2),
    "data above its credit": encode(Kind.DATA, 1, b"123456"),
    "endless credit": encode(Kind.WINDOW, 2, b"\xff" * 4) * 2,
}


@pytest.mark.parametrize("attack", HOSTILE)
async def test_protocol_violation_ends_the_connection(attack: str, agent: FakeAgent, host: Host) -> None:
    client = await host.connect()
    sink = Sink()
    assert client.open_input(sink, 5) == 1
    assert client.open_output().id == 2
    agent.answer = lambda request: None
    call = asyncio.create_task(client.call(PING, 60))
    await until(lambda: bool(agent.requests))
    agent.send_raw(HOSTILE[attack])
    with pytest.raises(ProtocolError):
        await call
    assert isinstance(await client.wait_closed(), ProtocolError)
    assert sink.got == b""
    again = await host.connect()
    agent.answer = lambda request: True
    await again.call(PING, 5)


async def test_broken_reply_ends_the_connection_and_wakes_its_caller(agent: FakeAgent, host: Host) -> None:
    client = await host.connect()
    agent.answer = lambda request: None
    call = client.post(PING)
    agent.send(Kind.REPLY, 1, b"\xff\xff")
    with pytest.raises(ProtocolError, match="broken Reply"):
        await asyncio.wait_for(call, 5)
    assert isinstance(await client.wait_closed(), ProtocolError)


async def test_guest_that_answers_nothing_is_disconnected(
    agent: FakeAgent, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_CALLS", 5)
    client = await host.connect()
    agent.answer = lambda request: None
    for _ in range(5):
        client.post(PING).cancel()
    with pytest.raises(ProtocolError, match="5 requests unanswered"):
        client.post(PING)
    assert client.lost


async def test_guest_that_reads_nothing_is_disconnected(
    agent: FakeAgent, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_UNSENT", 4 << 20)
    client = await host.connect()
    agent.stop_reading()
    large = pb.Request(configure=pb.Configure(entropy=bytes(1 << 20)))
    with pytest.raises(ProtocolError, match="4 MiB unread"):
        for _ in range(10):
            client.post(large)


async def test_failing_event_handler_ends_the_connection(agent: FakeAgent, host: Host) -> None:
    client = await host.connect()

    def broken(event: pb.Event) -> None:
        raise RuntimeError("a bug in the handler")

    host.on_event = broken
    agent.exit("c1")
    reason = await client.wait_closed()
    assert isinstance(reason.__cause__, RuntimeError)


async def test_credit_accumulates_while_the_guest_does_not_read(agent: FakeAgent, host: Host) -> None:
    client = await host.connect()
    stream = client.open_input(Sink(), 10)
    client._connection.pause_writing()
    for _ in range(100):
        client.grant(stream, 1)
        await asyncio.sleep(0)
    assert client._inputs._owed == {stream: 100}
    client._connection.resume_writing()
    assert client._inputs._owed == {}


async def test_round_trip_takes_less_than_10_ms(agent: FakeAgent, host: Host) -> None:
    """The bound is many times what an idle machine needs."""
    client = await host.connect()
    begin = time.perf_counter()
    for _ in range(200):
        await client.call(PING, 5)
    assert (time.perf_counter() - begin) / 200 < 0.01
