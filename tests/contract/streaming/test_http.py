"""The streaming server before a session begins: addresses, URLs, tokens, HTTP and TLS."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from pathlib import Path

import pytest

from cri.streaming import server as streaming
from cri.streaming.server import StreamingNotServed, StreamingOptions, StreamingServer
from cri.streaming.session import AttachOptions, PortForwardOptions
from cri.streaming.tokens import LIFETIME_S, PENDING_MAX, TooManyTokens
from tests.contract.streaming.site import EXEC, V4, Site, echo, exit_code
from tests.kit.eventually import eventually
from tests.kit.streams import NotUpgraded, SpdyClient, connect, request, spdy_headers

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy.")


async def test_url_names_the_kind_of_session_and_a_fresh_token(site: Site) -> None:
    base = site.server.url(EXEC).rsplit("/", 2)[0]
    assert base.startswith("http://127.0.0.1:")
    assert site.server.url(AttachOptions("c", tty=False, stdin=True, stdout=True, stderr=True)).startswith(
        f"{base}/attach/"
    )
    assert site.server.url(PortForwardOptions("p", (80,))).startswith(f"{base}/portforward/")
    assert site.server.url(EXEC) != site.server.url(EXEC)


async def test_token_used_twice_is_rejected(site: Site) -> None:
    site.backend.program = echo
    url = site.server.url(EXEC)
    client = await SpdyClient.dial(url, V4)
    with pytest.raises(NotUpgraded) as caught:
        await SpdyClient.dial(url, V4)
    assert caught.value.answer.code == 404
    await client.close()


async def test_expired_token_is_rejected(site: Site) -> None:
    url = site.server.url(EXEC)
    site.now[0] += LIFETIME_S
    assert (await request(url, spdy_headers(V4))).code == 404


async def test_tokens_are_limited_until_they_expire(site: Site) -> None:
    for _ in range(PENDING_MAX):
        site.server.url(EXEC)
    with pytest.raises(TooManyTokens):
        site.server.url(EXEC)
    site.now[0] += LIFETIME_S
    assert site.server.url(EXEC)


@pytest.mark.parametrize(
    "path", ["/", "/exec", "/exec/", "/exec/nonesuch", "/attach/{}", "/x/{}", "/exec/{}/x"]
)
async def test_unknown_path_is_not_found(site: Site, path: str) -> None:
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
async def test_request_that_cannot_be_upgraded_is_rejected(
    site: Site, headers: list[tuple[str, str]], method: str, code: int
) -> None:
    answer = await request(site.server.url(EXEC), headers, method)
    assert answer.code == code
    assert answer.rest
    if code == 403:
        assert V4 in answer.headers["x-accepted-stream-protocol-versions"]
    await site.idle()
    assert not site.backend.sessions


@pytest.mark.parametrize("bytes", [b"\0\1\2\3\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"x" * 200000])
async def test_malformed_http_is_answered_with_a_client_error(site: Site, bytes: bytes) -> None:
    reader, writer = await connect(site.server.url(EXEC))
    writer.write(bytes)
    assert (await asyncio.wait_for(reader.read(), 20)).startswith(b"HTTP/1.1 4")
    writer.close()


async def test_client_that_sends_no_request_is_disconnected(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "HANDSHAKE_TIMEOUT_S", 0.1)
    reader, writer = await connect(site.server.url(EXEC))
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    await site.idle()


async def test_start_on_a_port_in_use_fails(site: Site) -> None:
    port = int(site.server.url(EXEC).split(":")[2].split("/")[0])
    with pytest.raises(StreamingNotServed, match="cannot bind"):
        await StreamingServer(site.backend, StreamingOptions("127.0.0.1", port, 3600)).start()


async def test_ipv6_address_is_served_and_bracketed_in_urls(site: Site) -> None:
    server = StreamingServer(site.backend, StreamingOptions("::1", 0, 3600))
    await server.start()
    site.backend.program = echo
    assert server.url(EXEC).startswith("http://[::1]:")
    client = await SpdyClient.dial(server.url(EXEC), V4)
    await client.close()
    await server.stop()


async def test_tls_session_and_unusable_certificate(site: Site, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=node"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    await asyncio.to_thread(subprocess.run, [*openssl, *names], check=True, capture_output=True)
    server = StreamingServer(
        site.backend, StreamingOptions("127.0.0.1", 0, 3600, tls_cert=str(cert), tls_key=str(key))
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
    with pytest.raises(StreamingNotServed, match="cannot load"):
        await StreamingServer(
            site.backend, StreamingOptions("127.0.0.1", 0, 1, tls_cert=str(key), tls_key=str(key))
        ).start()


async def test_connections_without_a_request_are_limited(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "HANDSHAKES_MAX", 3)
    site.backend.program = echo
    url = site.server.url(EXEC)
    client = await SpdyClient.dial(url, V4)  # a session: it does not count any more
    silent = [await connect(url) for _ in range(3)]
    await eventually(lambda: len(site.server), until=lambda count: count == 4)
    reader, writer = await connect(url)
    assert await _read_to_end(reader) == b"", "closed at once"
    writer.close()
    assert (await client.open_command("error"))["error"], "the session goes on"
    for _, other in silent:
        other.close()
    await eventually(lambda: len(site.server), until=lambda count: count == 1)
    assert (await request(site.server.url(EXEC), spdy_headers("v9"))).code == 403, "served again"
    await client.close()


async def _read_to_end(reader: asyncio.StreamReader) -> bytes:
    try:
        return await asyncio.wait_for(reader.read(), 20)
    except ConnectionResetError:
        return b""
