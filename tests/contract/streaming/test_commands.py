"""Exec and attach over SPDY."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from cri.streaming import upgrade
from cri.streaming.server import StreamingOptions, StreamingServer
from cri.streaming.session import AttachOptions
from sandbox.errors import GuestError, SandboxError, StreamReset
from tests.contract.streaming.site import (
    EXEC,
    PIPE_MAX,
    SUCCESS,
    TTY,
    V4,
    Site,
    echo,
    exit_code,
    stdin_of,
)
from tests.fakes.streaming import FakeSession, Pipe
from tests.kit.eventually import eventually
from tests.kit.streams import SpdyClient

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy.")
PONG = b"\x80\x03\x00\x06\x00\x00\x00\x04\x00\x00\x00\x05"


async def _stalled(pipe: Pipe) -> None:
    """Wait until nothing has been read from the pipe for 0.1 s."""
    waiting = -1
    while waiting != len(pipe):
        waiting = len(pipe)
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("counts", [True, False])
async def test_exec_copies_streams_and_reports_exit_code(site: Site, counts: bool) -> None:
    """A library that minds windows, and one like Kubernetes's own."""
    site.backend.program = echo
    client = await SpdyClient.dial(site.server.url(EXEC), "v9.channel.k8s.io", V4, counts=counts)
    assert client.protocol == V4
    streams = await client.open_command("error", "stdin", "stdout", "stderr")
    data = bytes(range(256)) * 4000
    sending = asyncio.ensure_future(client.send(streams["stdin"], data))
    assert await client.until(streams["stdout"], lambda seen: len(seen) >= len(data)) == data
    await sending
    assert not client.streams[streams["stdout"]].ended.is_set()
    await client.end(streams["stdin"])
    assert await client.all(streams["stderr"]) == b"1024000 bytes"
    assert exit_code(await client.all(streams["error"])) == 3
    assert await client.all(streams["stdout"]) == data
    await client.wait_closed()
    assert client.gone_away
    assert site.backend.sessions[0].closed.is_set()
    assert site.backend.requests == [EXEC]
    await client.close()
    await site.idle()


async def test_streams_open_in_any_order_and_unexpected_ones_are_reset(site: Site) -> None:
    site.backend.program = echo
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    odd = await client.open(streamtype="resize")  # not with this options
    streams = await client.open_command("stderr", "stdout", "stdin")
    again = await client.open(streamtype="stdin")
    none = await client.open()
    assert not site.backend.sessions
    streams |= await client.open_command("error")
    for id in (odd, again, none):
        await client.all(id)
        assert client.streams[id].broken
    await client.end(streams["stdin"])
    assert exit_code(await client.all(streams["error"])) == 3
    await client.close()


@pytest.mark.parametrize("protocol", ["v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"])
@pytest.mark.parametrize("code", [0, 7])
async def test_protocols_before_v4_report_plain_text(site: Site, protocol: str, code: int) -> None:
    async def program(session: FakeSession) -> None:
        session.finish(code)

    site.backend.program = program
    client = await SpdyClient.dial(site.server.url(TTY), protocol)
    names = ["error", "stdin", "stdout"] + (["resize"] if protocol.startswith("v3") else [])
    streams = await client.open_command(*names)
    status = await client.all(streams["error"])
    assert status == (b"command terminated with exit code 7" if code else b"")
    await client.close()


async def test_command_that_does_not_start_is_reported_as_internal_error(site: Site) -> None:
    site.backend.failure = GuestError("exec", 2, "no-such: No such file or directory")
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    streams = await client.open_command("error", "stdin", "stdout", "stderr")
    status = json.loads(await client.all(streams["error"]))
    assert (status["status"], status["reason"], status["code"]) == ("Failure", "InternalError", 500)
    assert "no-such: No such file or directory" in status["message"]
    await client.wait_closed()
    await client.close()


async def test_session_that_breaks_is_reported_after_its_output(site: Site) -> None:
    async def program(session: FakeSession) -> None:
        assert session.stdout is not None
        await session.stdout.write(b"last words")
        session.finish(error=SandboxError("the VM is gone"))

    site.backend.program = program
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    streams = await client.open_command("error", "stdin", "stdout", "stderr")
    assert await client.all(streams["stdout"]) == b"last words"
    assert "the VM is gone" in json.loads(await client.all(streams["error"]))["message"]
    await client.close()


async def test_resize_applies_valid_sizes_and_ignores_others(site: Site) -> None:
    site.backend.program = echo
    client = await SpdyClient.dial(site.server.url(TTY), V4)
    streams = await client.open_command("error", "stdin", "stdout", "resize")
    await client.send(streams["resize"], b'{"Width":80,"Height":24}\n{"Width":132,')
    await client.send(streams["resize"], b'"Height":50}[1]{"Width":-1,"Height":0}"x" {"Width":7,"Height":8}')
    session = await site.session()
    await eventually(lambda: session.sizes, until=lambda sizes: len(sizes) >= 3)
    assert session.sizes == [(24, 80), (50, 132), (8, 7)]
    await client.send(streams["resize"], b"nonsense" * 10000)
    await client.end(streams["stdin"])
    assert exit_code(await client.all(streams["error"])) == 3
    await client.close()


async def test_attach_copies_streams_and_reports_success(site: Site) -> None:
    site.backend.program = echo
    options = AttachOptions("c1", tty=False, stdin=True, stdout=True, stderr=False)
    client = await SpdyClient.dial(site.server.url(options), V4)
    streams = await client.open_command("error", "stdin", "stdout")
    await client.send(streams["stdin"], b"word")
    await client.until(streams["stdout"], lambda seen: seen == b"word")
    site.backend.sessions[0].exit.set_result(0)
    assert site.backend.sessions[0].stdin is not None
    await client.end(streams["stdin"])
    assert await client.all(streams["stdout"]) == b"word"
    assert json.loads(await client.all(streams["error"])) == SUCCESS
    assert site.backend.requests == [options]
    await client.close()


async def test_ping_is_answered(site: Site) -> None:
    site.backend.program = echo
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    await client.open_command("error")
    client.spdy.ping(5)
    await client.flush()
    await eventually(lambda: client.received.endswith(PONG), describe="the reply to a PING arrived")
    await client.close()


async def test_client_that_stops_reading_stdout_keeps_its_other_streams(site: Site) -> None:
    """stdout has no credit left: stderr and stdin go on, memory stays flat."""

    async def program(session: FakeSession) -> None:
        assert session.stdin is not None
        assert session.stdout is not None
        assert session.stderr is not None
        flood = asyncio.ensure_future(session.stdout.write(bytes(8 << 20)))
        while chunk := await session.stdin.read():
            await session.stderr.write(chunk)
        session.stdout.stop()
        await asyncio.gather(flood, return_exceptions=True)
        session.finish(0)

    site.backend.program = program
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    streams = await client.open_command("error", "stdin", "stderr")
    streams["stdout"] = await client.open(hold=True, streamtype="stdout")
    await client.until(streams["stdout"], lambda seen: len(seen) == 64 << 10)
    for number in range(200):
        await client.send(streams["stdin"], b"%04d" % number * 250)
        await client.until(streams["stderr"], lambda seen, number=number: len(seen) == 1000 * (number + 1))  # type: ignore[misc]
    assert len(client.streams[streams["stdout"]].seen) == 64 << 10
    await client.close()
    await site.idle()
    assert site.backend.sessions[0].closed.is_set()


async def test_stdin_that_is_not_read_stops_at_the_window(site: Site) -> None:
    """A client that minds windows is stopped by its own; its other streams are alive."""

    async def program(session: FakeSession) -> None:
        assert session.stdout is not None
        while True:
            await session.stdout.write(b"tick")
            await asyncio.sleep(0.01)

    site.backend.program = program
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    streams = await client.open_command("error", "stdin", "stdout", "stderr")
    flood = asyncio.ensure_future(client.send(streams["stdin"], bytes(4 << 20)))
    await client.until(streams["stdout"], lambda seen: len(seen) > 200)
    assert not flood.done()
    assert stdin_of(site.backend.sessions[0]).most <= PIPE_MAX
    flood.cancel()
    await client.close()
    await site.idle()


async def test_stdin_that_is_not_read_stops_a_client_without_flow_control(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its whole connection waits, output goes on, and its leaving is noticed all the same."""
    monkeypatch.setattr("cri.streaming.transport.DISCONNECT_POLL_S", 0.1)

    async def program(session: FakeSession) -> None:
        assert session.stdout is not None
        while True:
            await session.stdout.write(b"tick")
            await asyncio.sleep(0.01)

    site.backend.program = program
    client = await SpdyClient.dial(site.server.url(EXEC), V4, counts=False)
    streams = await client.open_command("error", "stdin", "stdout", "stderr")
    flood = asyncio.ensure_future(client.send(streams["stdin"], bytes(64 << 20)))
    before = len(await client.until(streams["stdout"], lambda seen: len(seen) > 200))
    await client.until(streams["stdout"], lambda seen: len(seen) > before + 100)
    assert not flood.done()
    assert stdin_of(site.backend.sessions[0]).most <= PIPE_MAX
    flood.cancel()
    await client.close(abort=True)
    await site.idle()
    assert site.backend.sessions[0].closed.is_set()


async def test_stdin_after_the_process_closed_it_is_dropped(site: Site) -> None:
    """As `yes | exec -i head -1`: the client is not stopped, and gets the exit code."""

    async def program(session: FakeSession) -> None:
        assert session.stdin is not None
        await session.stdin.read()
        session.stdin.stop()
        await asyncio.sleep(0.1)
        session.finish(0)

    site.backend.program = program
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    streams = await client.open_command("error", "stdin", "stdout", "stderr")
    flood = asyncio.ensure_future(client.send(streams["stdin"], bytes(1 << 20)))
    assert exit_code(await client.all(streams["error"])) == 0
    flood.cancel()
    await client.close()


async def test_reset_of_stdout_breaks_the_pipe_of_the_process(site: Site) -> None:
    broken = asyncio.Event()

    async def program(session: FakeSession) -> None:
        assert session.stdout is not None
        try:
            while True:
                await session.stdout.write(b"more")
                await asyncio.sleep(0)
        except StreamReset:
            broken.set()
        session.finish(141)

    site.backend.program = program
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    streams = await client.open_command("error", "stdin", "stdout", "stderr")
    await client.until(streams["stdout"], lambda seen: len(seen) > 100)
    client.spdy.reset(streams["stdout"])
    await client.flush()
    await asyncio.wait_for(broken.wait(), 10)
    assert exit_code(await client.all(streams["error"])) == 141
    await client.close()


@pytest.mark.parametrize("abort", [False, True])
async def test_client_that_disconnects_closes_the_session(site: Site, abort: bool) -> None:
    """The process says nothing, and the session is hung up."""

    async def program(session: FakeSession) -> None:
        await asyncio.sleep(3600)

    site.backend.program = program
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    await client.open_command("error", "stdin", "stdout", "stderr")
    await site.session()
    await client.close(abort=abort)
    await asyncio.wait_for(site.backend.sessions[0].closed.wait(), 10)
    await site.idle()


async def test_client_that_reads_nothing_is_noticed_when_it_disconnects(site: Site) -> None:
    """TCP is what stops it, and its end is noticed."""

    async def program(session: FakeSession) -> None:
        assert session.stdout is not None
        await session.stdout.write(bytes(64 << 20))

    site.backend.program = program
    client = await SpdyClient.dial(site.server.url(EXEC), V4, counts=False)
    client.pause()
    await client.open_command("error", "stdin", "stdout", "stderr")
    stdout = (await site.session()).stdout
    assert stdout is not None
    await _stalled(stdout)
    await client.close(abort=True)
    await site.idle()


async def test_client_that_opens_too_few_streams_is_disconnected(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrade, "STREAMS_TIMEOUT_S", 0.1)
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    await client.open_command("error", "stdin")
    await client.wait_closed()
    assert not site.backend.sessions
    await client.close()


async def test_bytes_that_are_not_spdy_end_the_session(site: Site) -> None:
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    client.writer.write(b"GET / HTTP/1.1\r\n" + b"\xff" * 100)
    await client.wait_closed()
    await client.close()
    await site.idle()


async def test_idle_session_ends_and_pings_do_not_keep_it(site: Site) -> None:
    """Nothing said for the time: hung up. Pings do not count, data do."""
    server = StreamingServer(site.backend, StreamingOptions("127.0.0.1", 0, 0.5))
    await server.start()
    site.backend.program = echo
    client = await SpdyClient.dial(server.url(EXEC), V4)
    streams = await client.open_command("error", "stdin", "stdout", "stderr")
    for _ in range(10):
        await client.send(streams["stdin"], b"x")
        await asyncio.sleep(0.1)
    assert not client.streams[streams["error"]].ended.is_set()
    with contextlib.suppress(ConnectionError):
        for number in range(20):
            client.spdy.ping(2 * number + 1)
            await client.flush()
            await asyncio.sleep(0.1)
    await client.wait_closed()
    assert site.backend.sessions[0].closed.is_set()
    await client.close()
    await server.stop()


async def test_stop_closes_running_sessions(site: Site) -> None:
    site.backend.program = echo
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    await client.open_command("error", "stdin", "stdout", "stderr")
    await site.session()
    await site.server.stop()
    await client.wait_closed()
    assert site.backend.sessions[0].closed.is_set()
    assert len(site.server) == 0
    await client.close()
