"""Exec, attach and port-forward through the kubelet's port, as kubectl reaches them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from urllib.parse import urlencode

import pytest

from tests.kit.kubelet import NODE, PORT, is_ready
from tests.kit.streams import SpdyClient, Tunnelled, WebSocketClient
from tests.node.kubelet.conftest import WEB, Node

pytestmark = [pytest.mark.node, pytest.mark.timeout(300)]

POD = f"default/talker-{NODE}"
V5 = "v5.channel.k8s.io"
TUNNEL = "SPDY/3.1+portforward.k8s.io"
STDIN, STDOUT, STDERR, STATUS = range(4)


@pytest.fixture(scope="module")
def talker(node: Node) -> Iterator[Node]:
    """A pod with a web server that echoes its standard input."""
    command = ["sh", "-c", "httpd -p 80 -h /www; exec cat"]
    node.kubelet.add(
        "talker", {"containers": [{"name": "talker", "image": WEB, "command": command, "stdin": True}]}
    )
    node.kubelet.wait_for("talker", is_ready, 120)
    yield node
    node.kubelet.remove("talker")


async def dial(node: Node, verb: str, *protocols: str, **query: object) -> WebSocketClient:
    url = f"http://127.0.0.1:{PORT}/{verb}?{urlencode(query, doseq=True)}"
    return await WebSocketClient.dial(url, *protocols, dialer=node.kubelet.dial_plain)


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("echo out; echo err >&2", {"status": "Success"}),
        ("echo out; echo err >&2; exit 42", {"status": "Failure", "reason": "NonZeroExitCode"}),
    ],
)
async def test_exec_output_and_status_arrive(talker: Node, script: str, status: dict[str, str]) -> None:
    command = ["sh", "-c", script]
    client = await dial(talker, f"exec/{POD}/talker", V5, command=command, output=1, error=1)
    await client.read_all()
    assert (client.channel(STDOUT), client.channel(STDERR)) == (b"out\n", b"err\n")
    received = json.loads(client.channel(STATUS))
    assert {name: received.get(name) for name in status} == status
    await client.close()


async def test_exec_with_stdin_is_echoed(talker: Node) -> None:
    client = await dial(talker, f"exec/{POD}/talker", V5, command="cat", input=1, output=1)
    await client.send(bytes([STDIN]) + b"said\n")
    await client.send(bytes([255, STDIN]))  # the end of stdin
    await client.read_all()
    assert client.channel(STDOUT) == b"said\n"
    await client.close()


async def test_attach_with_stdin_reaches_the_first_process(talker: Node) -> None:
    client = await dial(talker, f"attach/{POD}/talker", V5, input=1, output=1)
    await client.send(bytes([STDIN]) + b"to the first process\n")
    await client.until(lambda: b"to the first process\n" in client.channel(STDOUT))
    await client.close()


async def test_port_forward_over_websocket_tunnel_reaches_the_pod(talker: Node) -> None:
    """The kubelet unwraps SPDY from the WebSocket's messages for the runtime."""
    pipe = Tunnelled(await dial(talker, f"portForward/{POD}", TUNNEL))
    client = SpdyClient(pipe, pipe, counts=False)  # type: ignore[arg-type]
    client.begin()
    error = await client.open(streamtype="error", port="80", requestid="0")
    data = await client.open(streamtype="data", port="80", requestid="0")
    await client.end(error)
    await client.send(data, b"GET / HTTP/1.0\r\n\r\n")
    await client.until(data, lambda seen: b"hello from the pod" in seen)
    await client.close()
