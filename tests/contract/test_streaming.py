"""The streaming server over real sockets, on both event loops, against a stand-in for pods and containers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from cri.streaming import server as streaming
from cri.streaming.server import Settings, StreamingNotServed, StreamingServer
from cri.streaming.session import AttachOptions, ExecOptions, PortForwardOptions
from cri.streaming.tokens import LIFETIME_S, MOST, Tokens, TooManyTokens
from sandbox.errors import GuestError, SandboxError, StreamReset
from tests.fakes.streaming import FakeBackend, FakeConnection, FakeSession
from tests.kit.streams import (
    NotUpgraded,
    SpdyClient,
    Tunnelled,
    WebSocketClient,
    connect,
    request,
    spdy_headers,
)

V4 = "v4.channel.k8s.io"
V5 = "v5.channel.k8s.io"
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy.")
TUNNEL = "SPDY/3.1+portforward.k8s.io"
EXEC = ExecOptions("c1", ("sh",), tty=False, stdin=True, stdout=True, stderr=True)
TTY = replace(EXEC, tty=True, stderr=False)
PONG = b"\x80\x03\x00\x06\x00\x00\x00\x04\x00\x00\x00\x05"
SUCCESS = {"metadata": {}, "status": "Success"}


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> Any:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


@dataclass
class Site:
    server: StreamingServer
    backend: FakeBackend
    now: list[float] = field(default_factory=lambda: [0.0])

    async def idle(self, timeout_s: float = 10) -> None:
        """Until no session is left."""
        async with asyncio.timeout(timeout_s):
            while len(self.server):
                await asyncio.sleep(0.005)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    now = [0.0]
    backend = FakeBackend()
    server = StreamingServer(backend, Settings("127.0.0.1", 0, 3600), Tokens(lambda: now[0]))
    await server.start()
    yield Site(server, backend, now)
    await server.stop()
    for task in backend.tasks:
        task.cancel()
    await asyncio.gather(*backend.tasks, return_exceptions=True)


async def echo(session: FakeSession) -> None:
    """What comes in goes out, and its size to stderr; then exit code 3."""
    assert session.stdin is not None
    assert session.stdout is not None
    total = 0
    while chunk := await session.stdin.read():
        total += len(chunk)
        await session.stdout.write(chunk)
    if session.stderr is not None:
        await session.stderr.write(b"%d bytes" % total)
    session.finish(3)


async def echo_service(connection: FakeConnection) -> None:
    while chunk := await connection.writer.read():
        await connection.reader.write(chunk)
    connection.reader.close()


# --------------------------------------------------------------------------- tokens and HTTP


async def test_urls(site: Site) -> None:
    base = site.server.url(EXEC).rsplit("/", 2)[0]
    assert base.startswith("http://127.0.0.1:")
    assert site.server.url(AttachOptions("c", tty=False, stdin=True, stdout=True, stderr=True)).startswith(
        f"{base}/attach/"
    )
    assert site.server.url(PortForwardOptions("p", (80,))).startswith(f"{base}/portforward/")
    assert site.server.url(EXEC) != site.server.url(EXEC)


async def test_a_token_is_good_once(site: Site) -> None:
    site.backend.program = echo
    url = site.server.url(EXEC)
    client = await SpdyClient.dial(url, V4)
    with pytest.raises(NotUpgraded) as caught:
        await SpdyClient.dial(url, V4)
    assert caught.value.answer.code == 404
    await client.close()


async def test_a_token_expires(site: Site) -> None:
    url = site.server.url(EXEC)
    site.now[0] += LIFETIME_S
    assert (await request(url, spdy_headers(V4))).code == 404


async def test_too_many_tokens(site: Site) -> None:
    for _ in range(MOST):
        site.server.url(EXEC)
    with pytest.raises(TooManyTokens):
        site.server.url(EXEC)
    site.now[0] += LIFETIME_S
    assert site.server.url(EXEC)


@pytest.mark.parametrize(
    "path", ["/", "/exec", "/exec/", "/exec/nonesuch", "/attach/{}", "/x/{}", "/exec/{}/x"]
)
async def test_nothing_there(site: Site, path: str) -> None:
    base, _, token = site.server.url(EXEC).rsplit("/", 2)
    assert (await request(base + path.format(token), spdy_headers(V4))).code == 404


@pytest.mark.parametrize(
    ("headers", "method", "code"),
    [
        ([], "GET", 400),
        ([("Connection", "Upgrade"), ("Upgrade", "h2c")], "GET", 400),
        (spdy_headers(), "POST", 400),
        (spdy_headers("v5.channel.k8s.io"), "POST", 403),
        (spdy_headers("v9.channel.k8s.io", "portforward.k8s.io"), "GET", 403),
        (spdy_headers(V4), "PUT", 405),
        ([("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")], "GET", 400),
    ],
)
async def test_refusals(site: Site, headers: list[tuple[str, str]], method: str, code: int) -> None:
    answer = await request(site.server.url(EXEC), headers, method)
    assert answer.code == code
    assert answer.rest
    if code == 403:
        assert V4 in answer.headers["x-accepted-stream-protocol-versions"]
    await site.idle()
    assert not site.backend.sessions


@pytest.mark.parametrize("bytes", [b"\0\1\2\3\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"x" * 200000])
async def test_no_http(site: Site, bytes: bytes) -> None:
    reader, writer = await connect(site.server.url(EXEC))
    writer.write(bytes)
    assert (await asyncio.wait_for(reader.read(), 20)).startswith(b"HTTP/1.1 4")
    writer.close()


async def test_a_silent_client_is_hung_up_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "HANDSHAKE_TIMEOUT_S", 0.1)
    reader, writer = await connect(site.server.url(EXEC))
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    await site.idle()


async def test_a_port_that_is_taken(site: Site) -> None:
    port = int(site.server.url(EXEC).split(":")[2].split("/")[0])
    with pytest.raises(StreamingNotServed, match="cannot be had"):
        await StreamingServer(site.backend, Settings("127.0.0.1", port, 3600)).start()


async def test_ipv6(site: Site) -> None:
    server = StreamingServer(site.backend, Settings("::1", 0, 3600))
    await server.start()
    site.backend.program = echo
    assert server.url(EXEC).startswith("http://[::1]:")
    client = await SpdyClient.dial(server.url(EXEC), V4)
    await client.close()
    await server.stop()


async def test_tls(site: Site, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=node"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    await asyncio.to_thread(subprocess.run, [*openssl, *names], check=True, capture_output=True)
    server = StreamingServer(
        site.backend, Settings("127.0.0.1", 0, 3600, tls_cert=str(cert), tls_key=str(key))
    )
    await server.start()
    site.backend.program = echo
    assert server.url(EXEC).startswith("https://127.0.0.1:")
    client = await SpdyClient.dial(server.url(EXEC), V4, tls=ssl.create_default_context(cafile=str(cert)))
    streams = await client.open_command("error", "stdin", "stdout", "stderr")
    data = bytes(300_000)
    sending = asyncio.ensure_future(client.send(streams["stdin"], data))
    await client.until(streams["stdout"], lambda seen: len(seen) == len(data))
    await sending
    await client.end(streams["stdin"])
    assert exit_code(await client.all(streams["error"])) == 3
    await client.wait_closed()
    await client.close()
    await server.stop()
    with pytest.raises(StreamingNotServed, match="cannot be used"):
        await StreamingServer(
            site.backend, Settings("127.0.0.1", 0, 1, tls_cert=str(key), tls_key=str(key))
        ).start()


# ------------------------------------------------------------------------------ SPDY: commands


def exit_code(status: bytes) -> int:
    told = json.loads(status)
    if told == SUCCESS:
        return 0
    assert (told["status"], told["reason"]) == ("Failure", "NonZeroExitCode")
    (cause,) = told["details"]["causes"]
    assert cause["reason"] == "ExitCode"
    return int(cause["message"])


@pytest.mark.parametrize("counts", [True, False])
async def test_spdy_exec(site: Site, counts: bool) -> None:
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
    assert site.backend.wishes == [EXEC]
    await client.close()
    await site.idle()


async def test_streams_in_any_order_and_what_is_odd(site: Site) -> None:
    site.backend.program = echo
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    odd = await client.open(streamtype="resize")  # not with this wish
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
async def test_old_protocols_end_with_plain_text(site: Site, protocol: str, code: int) -> None:
    async def program(session: FakeSession) -> None:
        session.finish(code)

    site.backend.program = program
    client = await SpdyClient.dial(site.server.url(TTY), protocol)
    names = ["error", "stdin", "stdout"] + (["resize"] if protocol.startswith("v3") else [])
    streams = await client.open_command(*names)
    told = await client.all(streams["error"])
    assert told == (b"command terminated with exit code 7" if code else b"")
    await client.close()


async def test_a_command_that_cannot_begin(site: Site) -> None:
    site.backend.failure = GuestError("exec", 2, "no-such: No such file or directory")
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    streams = await client.open_command("error", "stdin", "stdout", "stderr")
    told = json.loads(await client.all(streams["error"]))
    assert (told["status"], told["reason"], told["code"]) == ("Failure", "InternalError", 500)
    assert "no-such: No such file or directory" in told["message"]
    await client.wait_closed()
    await client.close()


async def test_a_session_that_breaks(site: Site) -> None:
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


async def test_resize(site: Site) -> None:
    site.backend.program = echo
    client = await SpdyClient.dial(site.server.url(TTY), V4)
    streams = await client.open_command("error", "stdin", "stdout", "resize")
    await client.send(streams["resize"], b'{"Width":80,"Height":24}\n{"Width":132,')
    await client.send(streams["resize"], b'"Height":50}[1]{"Width":-1,"Height":0}"x" {"Width":7,"Height":8}')
    async with asyncio.timeout(10):
        while not site.backend.sessions or len(site.backend.sessions[0].sizes) < 3:
            await asyncio.sleep(0.002)
    assert site.backend.sessions[0].sizes == [(24, 80), (50, 132), (8, 7)]
    await client.send(streams["resize"], b"nonsense" * 10000)
    await client.end(streams["stdin"])
    assert exit_code(await client.all(streams["error"])) == 3
    await client.close()


async def test_attach(site: Site) -> None:
    site.backend.program = echo
    wish = AttachOptions("c1", tty=False, stdin=True, stdout=True, stderr=False)
    client = await SpdyClient.dial(site.server.url(wish), V4)
    streams = await client.open_command("error", "stdin", "stdout")
    await client.send(streams["stdin"], b"word")
    await client.until(streams["stdout"], lambda seen: seen == b"word")
    site.backend.sessions[0].exit.set_result(0)
    assert site.backend.sessions[0].stdin is not None
    await client.end(streams["stdin"])
    assert await client.all(streams["stdout"]) == b"word"
    assert json.loads(await client.all(streams["error"])) == SUCCESS
    assert site.backend.wishes == [wish]
    await client.close()


async def test_pings_are_answered(site: Site) -> None:
    site.backend.program = echo
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    await client.open_command("error")
    client.spdy.ping(5)
    await client.flush()
    async with asyncio.timeout(10):
        while not client.received.endswith(PONG):
            await asyncio.sleep(0.002)
    await client.close()


async def test_a_reader_that_stops_one_stream(site: Site) -> None:
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


async def test_a_process_that_does_not_read(site: Site) -> None:
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
    assert site.backend.sessions[0].stdin is not None
    assert site.backend.sessions[0].stdin.most <= 512 << 10
    flood.cancel()
    await client.close()
    await site.idle()


async def test_a_process_that_does_not_read_and_a_client_without_windows(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its whole connection waits, output goes on, and its leaving is noticed all the same."""
    monkeypatch.setattr("cri.streaming.wire.PATIENCE_S", 0.1)

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
    assert site.backend.sessions[0].stdin is not None
    assert site.backend.sessions[0].stdin.most <= 512 << 10
    flood.cancel()
    await client.close(abort=True)
    await site.idle()
    assert site.backend.sessions[0].closed.is_set()


async def test_input_that_the_process_wants_no_more(site: Site) -> None:
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


async def test_a_client_that_resets_stdout(site: Site) -> None:
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
async def test_a_client_that_vanishes(site: Site, abort: bool) -> None:
    """The process says nothing, and the session is hung up."""

    async def program(session: FakeSession) -> None:
        await asyncio.sleep(3600)

    site.backend.program = program
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    await client.open_command("error", "stdin", "stdout", "stderr")
    async with asyncio.timeout(10):
        while not site.backend.sessions:
            await asyncio.sleep(0.002)
    await client.close(abort=abort)
    await asyncio.wait_for(site.backend.sessions[0].closed.wait(), 10)
    await site.idle()


async def test_a_client_that_reads_nothing_at_all(site: Site) -> None:
    """TCP is what stops it, and its end is noticed."""

    async def program(session: FakeSession) -> None:
        assert session.stdout is not None
        await session.stdout.write(bytes(64 << 20))

    site.backend.program = program
    client = await SpdyClient.dial(site.server.url(EXEC), V4, counts=False)
    client.paused = True
    await client.open_command("error", "stdin", "stdout", "stderr")
    await asyncio.sleep(0.3)
    assert site.backend.sessions[0].stdout is not None
    await client.close(abort=True)
    await site.idle()


async def test_not_all_streams_come(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "STREAMS_TIMEOUT_S", 0.1)
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    await client.open_command("error", "stdin")
    await client.wait_closed()
    assert not site.backend.sessions
    await client.close()


async def test_no_spdy(site: Site) -> None:
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    client.writer.write(b"GET / HTTP/1.1\r\n" + b"\xff" * 100)
    await client.wait_closed()
    await client.close()
    await site.idle()


async def test_idle(site: Site) -> None:
    """Nothing said for the time: hung up. Pings do not count, data do."""
    server = StreamingServer(site.backend, Settings("127.0.0.1", 0, 0.5))
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


async def test_the_daemon_ends(site: Site) -> None:
    site.backend.program = echo
    client = await SpdyClient.dial(site.server.url(EXEC), V4)
    await client.open_command("error", "stdin", "stdout", "stderr")
    async with asyncio.timeout(10):
        while not site.backend.sessions:
            await asyncio.sleep(0.002)
    await site.server.stop()
    await client.wait_closed()
    assert site.backend.sessions[0].closed.is_set()
    assert len(site.server) == 0
    await client.close()


# ------------------------------------------------------------------------- SPDY: port-forward


async def forward(site: Site) -> SpdyClient:
    return await SpdyClient.dial(site.server.url(PortForwardOptions("p1", ())), "portforward.k8s.io")


async def open_pair(client: SpdyClient, port: int, request: str, *, hold: bool = False) -> tuple[int, int]:
    """An old client names no request."""
    error = await client.open(streamtype="error", port=str(port), requestid=request)
    await client.end(error)
    data = await client.open(streamtype="data", port=str(port), requestid=request, hold=hold)
    return data, error


async def test_port_forward(site: Site) -> None:
    site.backend.service = echo_service
    client = await forward(site)
    for number, named in enumerate(("0", "1", "")):
        data, error = await open_pair(client, 8000 + number, named)
        body = b"%d" % number * 100_000
        sending = asyncio.ensure_future(client.send(data, body))
        await client.until(data, lambda seen, body=body: seen == body)  # type: ignore[misc]
        await sending
        await client.end(data)
        assert await client.all(data) == body
        assert await client.all(error) == b""
    assert site.backend.dialled == [("p1", 8000), ("p1", 8001), ("p1", 8002)]
    for connection in site.backend.connections:
        await asyncio.wait_for(connection.closed.wait(), 10)
    assert not client.spdy._streams, "all were ended, on both sides"
    await client.close()
    await site.idle()


async def test_a_refused_port_fails_alone(site: Site) -> None:
    site.backend.service = echo_service
    site.backend.refused = frozenset({81})
    client = await forward(site)
    good, _ = await open_pair(client, 80, "0")
    bad, error = await open_pair(client, 81, "1")
    assert b"81" in await client.all(error)
    assert b"refused" in bytes(client.streams[error].seen)
    await client.all(bad)
    await client.send(good, b"alive")
    await client.until(good, lambda seen: seen == b"alive")
    await client.close()


async def test_a_stopped_connection_stops_only_itself(site: Site) -> None:
    async def service(connection: FakeConnection) -> None:
        await connection.reader.write(bytes(4 << 20))

    site.backend.service = service
    client = await forward(site)
    stopped, _ = await open_pair(client, 80, "0", hold=True)
    await client.until(stopped, lambda seen: len(seen) == 64 << 10)
    site.backend.service = echo_service
    other, _ = await open_pair(client, 80, "1")
    await client.send(other, b"alive" * 100_000)
    await client.until(other, lambda seen: len(seen) == 500_000)
    site.backend.service = None
    unread, _ = await open_pair(client, 80, "2")
    flood = asyncio.ensure_future(client.send(unread, bytes(4 << 20)))
    await client.send(other, b"still")
    await client.until(other, lambda seen: seen.endswith(b"still"))
    assert not flood.done()
    flood.cancel()
    await client.close()
    await site.idle()


async def test_the_pod_half_closes_first(site: Site) -> None:
    got: list[bytes] = []

    async def service(connection: FakeConnection) -> None:
        await connection.reader.write(b"bye")
        connection.reader.close()
        got.append(await connection.writer.read_all())

    site.backend.service = service
    client = await forward(site)
    data, error = await open_pair(client, 80, "0")
    await client.all(data)
    assert client.streams[data].seen == b"bye"
    await client.send(data, b"heard all the same")
    await client.end(data)
    assert await client.all(error) == b""
    assert got == [b"heard all the same"]
    await client.close()


async def test_a_connection_that_the_client_resets(site: Site) -> None:
    site.backend.service = echo_service
    client = await forward(site)
    data, error = await open_pair(client, 80, "0")
    await client.send(data, b"x")
    await client.until(data, lambda seen: seen == b"x")
    client.spdy.reset(data)
    await client.flush()
    await asyncio.wait_for(site.backend.connections[0].closed.wait(), 10)
    await client.all(error)
    await client.close()


@pytest.mark.parametrize("port", ["", "0", "65536", "x", "-1", "\u0663"])
async def test_no_port(site: Site, port: str) -> None:
    client = await forward(site)
    id = await client.open(streamtype="data", port=port, requestid="0")
    await client.all(id)
    assert client.streams[id].broken
    await client.close()


async def test_half_a_pair(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cri.streaming.port_forward.PAIR_TIMEOUT_S", 0.1)
    client = await forward(site)
    id = await client.open(streamtype="data", port="80", requestid="0")
    await client.all(id)
    assert client.streams[id].broken
    assert not site.backend.dialled
    await client.close()


async def test_vanishing_while_connections_are_open(site: Site) -> None:
    site.backend.service = echo_service
    client = await forward(site)
    for number in range(5):
        data, _ = await open_pair(client, 80, str(number))
        await client.send(data, b"x")
        await client.until(data, lambda seen: seen == b"x")
    await client.close()
    for connection in site.backend.connections:
        await asyncio.wait_for(connection.closed.wait(), 10)
    await site.idle()


# --------------------------------------------------------------------------------- WebSocket


async def test_websocket_v5(site: Site) -> None:
    site.backend.program = echo
    client = await WebSocketClient.dial(site.server.url(EXEC), V5, V4)
    assert client.subprotocol == V5
    await client.until(lambda: client.messages == [b"\1"])
    data = bytes(range(256)) * 4000
    sending = asyncio.ensure_future(_send_all(client, data))
    await client.until(lambda: len(client.channel(1)) == len(data))
    await sending
    assert client.channel(1) == data
    await client.send(b"\xff\x00")
    await client.read_all()
    assert client.channel(2) == b"1024000 bytes"
    assert exit_code(client.channel(3)) == 3
    assert client.closed is not None
    assert client.closed.code == 1000
    await client.close()
    await site.idle()


async def _send_all(client: WebSocketClient, data: bytes) -> None:
    for start in range(0, len(data), 32 << 10):
        await client.send(b"\0" + data[start : start + (32 << 10)])


@pytest.mark.parametrize(
    ("subprotocols", "status"),
    [
        ([V4], True),
        (["channel.k8s.io"], False),
        (["v4.base64.channel.k8s.io"], True),
        (["base64.channel.k8s.io"], False),
        ([], False),
    ],
)
async def test_websocket_forms(site: Site, subprotocols: list[str], status: bool) -> None:
    async def program(session: FakeSession) -> None:
        assert session.stdin is not None
        assert session.stdout is not None
        await session.stdout.write(b"<" + await session.stdin.read() + b">")
        session.finish(5)

    site.backend.program = program
    client = await WebSocketClient.dial(site.server.url(EXEC), *subprotocols)
    assert (client.subprotocol or "") == "".join(subprotocols)
    base64 = "base64" in (client.subprotocol or "")
    await client.send("0d29yZA==" if base64 else b"\0word")
    await client.read_all()
    told = b'{"metadata"' if status else b"command terminated with exit code 5"
    if base64:
        assert "1PHdvcmQ+" in client.messages
        assert any(each[0] == "3" for each in client.messages if isinstance(each, str))
    else:
        assert client.channel(1) == b"<word>"
        assert client.channel(3).startswith(told)
    await client.close()


async def test_websocket_first_message_is_on_what_is_written(site: Site) -> None:
    site.backend.program = echo
    for wish, first in (
        (replace(EXEC, stdout=True, stderr=True), b"\1"),
        (replace(EXEC, stdout=False), b"\2"),
        (replace(EXEC, stdout=False, stderr=False), b"\3"),
    ):
        client = await WebSocketClient.dial(site.server.url(wish), V5)
        await client.until(lambda: bool(client.messages))  # noqa: B023
        assert client.messages[0] == first
        await client.close()


async def test_websocket_resize_and_pings(site: Site) -> None:
    site.backend.program = echo
    client = await WebSocketClient.dial(site.server.url(TTY), V5)
    await client.send(b'\4{"Width":80,"Height":24}')
    await client.ping()
    await client.until(lambda: client.pongs == 1)
    await client.send(b"\0x")
    await client.until(lambda: client.channel(1) == b"x")
    assert site.backend.sessions[0].sizes == [(24, 80)]
    await client.send(b"\x09unknown")
    await client.send(b"\xff\x00")
    await client.read_all()
    assert exit_code(client.channel(3)) == 3
    await client.close()


async def test_websocket_offers_nothing_known(site: Site) -> None:
    with pytest.raises(NotUpgraded) as caught:
        await WebSocketClient.dial(site.server.url(EXEC), "v6.channel.k8s.io")
    assert caught.value.answer.code == 403
    with pytest.raises(NotUpgraded) as caught:
        await WebSocketClient.dial(site.server.url(PortForwardOptions("p", (80,))), V5)
    assert caught.value.answer.code == 403


@pytest.mark.parametrize("message", ["text where bytes belong", b"\x05" * 10])
async def test_websocket_nonsense(site: Site, message: bytes | str) -> None:
    """Text ends it, an unknown channel is passed over."""
    site.backend.program = echo
    client = await WebSocketClient.dial(site.server.url(EXEC), V5)
    await client.send(message)
    if isinstance(message, bytes):
        await client.send(b"\xff\x00")
    await client.read_all()
    assert bool(client.channel(3)) == isinstance(message, bytes)
    await client.close()
    await site.idle()


async def test_websocket_client_closes(site: Site) -> None:
    site.backend.program = echo
    client = await WebSocketClient.dial(site.server.url(EXEC), V4)
    await client.until(lambda: bool(client.messages))
    from wsproto.events import CloseConnection

    await client.send_event(CloseConnection(code=1000))
    await client.read_all()
    await asyncio.wait_for(site.backend.sessions[0].closed.wait(), 10)
    await client.close()
    await site.idle()


async def test_websocket_process_that_does_not_read(site: Site) -> None:
    async def program(session: FakeSession) -> None:
        assert session.stdout is not None
        while True:
            await session.stdout.write(b"tick")
            await asyncio.sleep(0.01)

    site.backend.program = program
    client = await WebSocketClient.dial(site.server.url(EXEC), V5)
    flood = asyncio.ensure_future(_send_all(client, bytes(64 << 20)))
    await client.until(lambda: len(client.channel(1)) > 200)
    assert not flood.done()
    assert site.backend.sessions[0].stdin is not None
    assert site.backend.sessions[0].stdin.most <= 512 << 10
    flood.cancel()
    await client.close()


async def test_websocket_port_forward(site: Site) -> None:
    site.backend.service = echo_service
    site.backend.refused = frozenset({81})
    client = await WebSocketClient.dial(site.server.url(PortForwardOptions("p1", (80, 81))), V4)
    await client.until(lambda: len(client.messages) >= 5)
    assert client.messages[:4] == [b"\0\x50\0", b"\1\x50\0", b"\2\x51\0", b"\3\x51\0"]
    assert b"refused" in client.channel(3)
    await client.send(b"\0question")
    await client.until(lambda: client.channel(0) == b"\x50\0question")
    await client.close()
    await asyncio.wait_for(site.backend.connections[0].closed.wait(), 10)
    await site.idle()


@pytest.mark.parametrize(("ports", "subprotocol"), [((), V4), ((80,) * 6, "v4.base64.channel.k8s.io")])
async def test_websocket_port_forward_needs_ports(
    site: Site, ports: tuple[int, ...], subprotocol: str
) -> None:
    with pytest.raises(NotUpgraded) as caught:
        await WebSocketClient.dial(site.server.url(PortForwardOptions("p1", ports)), subprotocol)
    assert caught.value.answer.code == 400


async def test_tunnel(site: Site) -> None:
    """SPDY in the messages of a WebSocket, as client-go and critest forward ports."""
    site.backend.service = echo_service
    socket = await WebSocketClient.dial(site.server.url(PortForwardOptions("p1", (80,))), TUNNEL)
    assert socket.subprotocol == TUNNEL
    pipe = Tunnelled(socket)
    client = SpdyClient(pipe, pipe)  # type: ignore[arg-type]
    client.begin()
    data, error = await open_pair(client, 80, "0")
    body = bytes(range(256)) * 2000
    sending = asyncio.ensure_future(client.send(data, body))
    await client.until(data, lambda seen: len(seen) == len(body))
    await sending
    await client.end(data)
    assert await client.all(data) == body
    assert await client.all(error) == b""
    await client.close()
    await site.idle()


# ------------------------------------------------------------------------------------ volume


@pytest.mark.parametrize("kind", ["spdy", "websocket"])
async def test_volume_with_flat_memory(site: Site, kind: str) -> None:
    size = 48 << 20

    async def program(session: FakeSession) -> None:
        assert session.stdout is not None
        piece = bytes(64 << 10)
        for _ in range(size // len(piece)):
            await session.stdout.write(piece)
        session.finish(0)

    site.backend.program = program
    wish = replace(EXEC, stdin=False, stderr=False)
    total = 0
    if kind == "spdy":
        spdy = await SpdyClient.dial(site.server.url(wish), V4)
        streams = await spdy.open_command("error", "stdout")
        stream = spdy.streams[streams["stdout"]]
        while not stream.ended.is_set():
            await asyncio.sleep(0.001)
            total += len(stream.seen)
            stream.seen.clear()
        total += len(stream.seen)
        assert exit_code(await spdy.all(streams["error"])) == 0
        await spdy.close()
    else:
        client = await WebSocketClient.dial(site.server.url(wish), V5)
        last = b""
        while client.closed is None:
            await client.receive()
            total += len(client.channel(1))
            last += client.channel(3)
            client.messages.clear()
        assert exit_code(last) == 0
        await client.close()
    assert total == size
    assert site.backend.sessions[-1].stdout is not None
    assert site.backend.sessions[-1].stdout.most <= 512 << 10
