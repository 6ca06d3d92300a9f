"""Exec, attach and port-forward, from a client's socket to a process in the guest and back."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from sandbox.spec import Isolation
from tests.conftest import Site
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually, eventually_sync
from tests.kit.namespace import Namespace
from tests.kit.registry import HOST
from tests.kit.streams import SpdyClient, WebSocketClient

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
WEB = f"{HOST}/husk/web:1"
V4, V5 = "v4.channel.k8s.io", "v5.channel.k8s.io"
ECHO = "while read line; do echo out $line; echo err $line >&2; done; echo end of stdin; sleep 3600"
VOLUME_MIB = int(os.environ.get("HUSK_TEST_STREAM_MIB", "48"))
COPY_MIB = VOLUME_MIB if VOLUME_MIB > 48 else 16
SESSIONS = int(os.environ.get("HUSK_TEST_SESSIONS", "40"))
SESSIONS_S = 240.0
GROWTH_MIB = 24  # of the daemon, for any amount of data


class Clients:
    """Opens sessions of the module's daemon from its namespace, and closes them at the end of a test."""

    def __init__(self, cri: Cri, namespace: Namespace) -> None:
        self.cri = cri
        self._dialer = namespace.dial
        self._made: list[SpdyClient | WebSocketClient] = []

    async def spdy(self, url: str, protocol: str = V4, **more: Any) -> SpdyClient:
        client = await SpdyClient.dial(url, protocol, dialer=self._dialer, **more)
        self._made.append(client)
        return client

    async def websocket(self, url: str, *protocols: str) -> WebSocketClient:
        client = await WebSocketClient.dial(url, *protocols, dialer=self._dialer)
        self._made.append(client)
        return client

    def exec_url(self, container: str, *cmd: str, **more: Any) -> str:
        options = {"stdin": True, "stdout": True, "stderr": True} | more
        return str(self.cri.call("Exec", container_id=container, cmd=cmd, **options).url)

    async def exec(self, container: str, *cmd: str, tty: bool = False) -> tuple[SpdyClient, dict[str, int]]:
        client = await self.spdy(self.exec_url(container, *cmd, tty=tty, stderr=not tty))
        return client, await client.open_command("error", "stdin", "stdout", "resize" if tty else "stderr")

    async def attach(self, container: str, **more: Any) -> tuple[SpdyClient, dict[str, int]]:
        options = {"stdin": True, "stdout": True, "stderr": True} | more
        client = await self.spdy(str(self.cri.call("Attach", container_id=container, **options).url))
        names = [name for name in ("stdin", "stdout", "stderr") if options[name]]
        names += ["resize"] if options.get("tty") else []
        return client, await client.open_command("error", *names)

    async def forward(self, pod: Pod) -> SpdyClient:
        url = str(self.cri.call("PortForward", pod_sandbox_id=pod.id).url)
        return await self.spdy(url, "portforward.k8s.io")

    async def close(self) -> None:
        for client in self._made:
            await client.close()


@pytest.fixture
async def clients(cri: Cri, site: Site) -> AsyncIterator[Clients]:
    made = Clients(cri, site.namespace)
    yield made
    await made.close()


@pytest.fixture(scope="module", params=list(Isolation), ids=str)
def pod(cri: Cri, request: pytest.FixtureRequest) -> Pod:
    """One in a VM, and one of the node: whatever containers run in offers the same sessions."""
    ipc = api.NODE if request.param is Isolation.PROCESS else api.POD
    context = api.LinuxSandboxSecurityContext(namespace_options=api.NamespaceOption(ipc=ipc))
    linux = api.LinuxPodSandboxConfig(security_context=context, cgroup_parent=cri.cgroup_parent)
    return cri.run_pod(f"streaming-{request.param}", linux=linux)


@pytest.fixture
def box(cri: Cri, pod: Pod) -> str:
    return cri.run(pod, BUSYBOX, ("sleep", "3600"))


def exit_code(status: bytes) -> int:
    report = json.loads(status)
    return 0 if report["status"] == "Success" else int(report["details"]["causes"][0]["message"])


async def pair(client: SpdyClient, port: int, request: str) -> tuple[int, int]:
    error = await client.open(streamtype="error", port=str(port), requestid=request)
    await client.end(error)
    return await client.open(streamtype="data", port=str(port), requestid=request), error


# --------------------------------------------------------------------------------------- exec


async def test_exec_output_and_exit_code_arrive(clients: Clients, box: str) -> None:
    client, streams = await clients.exec(box, "sh", "-c", "echo heard >&2; cat; exit 42")
    await client.send(streams["stdin"], b"there and back")
    await client.until(streams["stdout"], lambda seen: seen == b"there and back")
    assert not client.streams[streams["error"]].ended.is_set()
    await client.end(streams["stdin"])
    assert exit_code(await client.all(streams["error"])) == 42
    assert await client.all(streams["stderr"]) == b"heard\n"
    await client.wait_closed()


async def test_exec_over_websocket_copies_streams_and_exit_code(clients: Clients, box: str) -> None:
    url = clients.exec_url(box, "sh", "-c", "cat; exit 3")
    client = await clients.websocket(url, V5)
    await client.send(b"\0there and back")
    await client.until(lambda: client.channel(1) == b"there and back")
    await client.send(b"\xff\0")
    await client.read_all()
    assert exit_code(client.channel(3)) == 3


async def test_exec_of_missing_program_is_reported(clients: Clients, box: str) -> None:
    client, streams = await clients.exec(box, "no-such-program")
    report = json.loads(await client.all(streams["error"]))
    assert report["reason"] == "InternalError"
    assert "no-such-program" in report["message"]


async def test_exec_with_terminal_has_its_size(clients: Clients, box: str) -> None:
    client, streams = await clients.exec(box, "sh", tty=True)
    await client.send(streams["resize"], b'{"Width":132,"Height":50}')
    await client.send(streams["stdin"], b"tty; sleep 0.3; stty size; echo $TERM\n")
    seen = await client.until(streams["stdout"], lambda seen: b"xterm" in seen)
    assert b"/dev/pts/" in seen
    assert b"50 132\r\n" in seen
    await client.send(streams["stdin"], b"exit 5\n")
    assert exit_code(await client.all(streams["error"])) == 5


async def test_client_that_disconnects_hangs_up_its_exec(clients: Clients, cri: Cri, box: str) -> None:
    """What it started is hung up: stdin ends, a terminal's programs get SIGHUP."""
    client, _ = await clients.exec(box, "cat", "-", "/dev/null")
    terminal, streams = await clients.exec(box, "sh", "-c", "echo ready; sleep 4321", tty=True)
    await terminal.until(streams["stdout"], lambda seen: b"ready" in seen)
    assert "4321" in cri.exec(box, "ps").stdout
    await client.close(abort=True)
    await terminal.close(abort=True)

    def left() -> str:
        return str(cri.exec(box, "ps").stdout)

    await eventually(
        lambda: asyncio.to_thread(left),
        until=lambda text: "4321" not in text and "cat -" not in text,
        timeout_s=15,
    )


async def test_exec_ends_when_its_container_is_stopped(clients: Clients, cri: Cri, box: str) -> None:
    client, streams = await clients.exec(box, "sleep", "3601")
    await eventually(
        lambda: asyncio.to_thread(cri.exec, box, "ps"), until=lambda done: "sleep 3601" in done.stdout
    )
    await asyncio.to_thread(cri.stop, box, 0)
    assert exit_code(await client.all(streams["error"])) == 137


def resident_mib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) >> 10


async def test_large_output_does_not_grow_the_daemon(clients: Clients, daemon: Daemon, box: str) -> None:
    url = clients.exec_url(
        box, "dd", "if=/dev/zero", "bs=1M", f"count={VOLUME_MIB}", stdin=False, stderr=False
    )
    client = await clients.spdy(url)
    before = most = resident_mib(daemon.pid)
    streams = await client.open_command("error", "stdout")
    stream = client.streams[streams["stdout"]]
    total = 0
    began = asyncio.get_running_loop().time()
    while not stream.ended.is_set():
        await asyncio.sleep(0.01)
        total += len(stream.seen)
        stream.seen.clear()
        most = max(most, resident_mib(daemon.pid))
    total += len(stream.seen)
    seconds = asyncio.get_running_loop().time() - began
    print(f"{total >> 20} MiB in {seconds:.1f} s; daemon from {before} to at most {most} MiB")
    assert exit_code(await client.all(streams["error"])) == 0
    assert total == VOLUME_MIB << 20
    assert most - before < GROWTH_MIB


async def test_large_input_does_not_grow_the_daemon(clients: Clients, daemon: Daemon, box: str) -> None:
    client = await clients.spdy(clients.exec_url(box, "wc", "-c", stderr=False))
    before = resident_mib(daemon.pid)
    streams = await client.open_command("error", "stdin", "stdout")
    size = min(VOLUME_MIB, 16) << 20
    await asyncio.wait_for(client.send(streams["stdin"], bytes(size)), 240)
    await client.end(streams["stdin"])
    assert int(await client.all(streams["stdout"], 120)) == size
    assert resident_mib(daemon.pid) - before < GROWTH_MIB


@pytest.mark.parametrize("kind", ["spdy", "websocket"])
async def test_file_copied_in_and_out_has_the_same_checksum(clients: Clients, box: str, kind: str) -> None:
    """As `kubectl cp` copies, through cat in place of tar. HUSK_TEST_STREAM_MIB=1024 copies a GiB."""
    block, size, sent, received = os.urandom(1 << 20), COPY_MIB, hashlib.sha256(), hashlib.sha256()
    commands = [("sh", "-c", "cat >/tmp/file; sha256sum /tmp/file"), ("cat", "/tmp/file")]
    if kind == "spdy":
        client = await clients.spdy(clients.exec_url(box, *commands[0], stderr=False))
        streams = await client.open_command("error", "stdin", "stdout")
        for number in range(size):
            piece = number.to_bytes(4, "big") + block[4:]
            sent.update(piece)
            await client.send(streams["stdin"], piece)
        await client.end(streams["stdin"])
        answer = await client.all(streams["stdout"], SESSIONS_S)
        client = await clients.spdy(clients.exec_url(box, *commands[1], stdin=False, stderr=False))
        stream = client.streams[(await client.open_command("error", "stdout"))["stdout"]]
        while not stream.ended.is_set():
            await asyncio.sleep(0.01)
            received.update(bytes(stream.seen))
            stream.seen.clear()
        received.update(bytes(stream.seen))
    else:
        socket = await clients.websocket(clients.exec_url(box, *commands[0], stderr=False), V5)
        for number in range(size):
            piece = number.to_bytes(4, "big") + block[4:]
            sent.update(piece)
            await asyncio.wait_for(socket.send(b"\0" + piece), SESSIONS_S)
        await socket.send(b"\xff\0")
        await socket.read_all()
        answer = socket.channel(1)
        socket = await clients.websocket(clients.exec_url(box, *commands[1], stdin=False, stderr=False), V5)
        more = True
        while more:
            more = await socket.receive()
            received.update(socket.channel(1))
            socket.messages = [each for each in socket.messages if each[0] == 3]
    assert answer.split()[0].decode() == sent.hexdigest()
    assert received.hexdigest() == sent.hexdigest()


async def test_stopped_reader_stops_only_its_stream(clients: Clients, cri: Cri, box: str) -> None:
    client = await clients.spdy(clients.exec_url(box, "yes", stdin=False, stderr=False))
    await client.open(streamtype="error")
    stopped = await client.open(streamtype="stdout", hold=True)
    await client.until(stopped, lambda seen: len(seen) == 64 << 10)
    other, streams = await clients.exec(box, "cat")
    for word in (b"one", b"two", b"three"):
        await other.send(streams["stdin"], word)
        await other.until(streams["stdout"], lambda seen, word=word: seen.endswith(word))  # type: ignore[misc]
    assert (await asyncio.to_thread(cri.exec, box, "echo", "sync")).stdout == "sync\n"
    assert len(client.streams[stopped].seen) == 64 << 10


async def test_many_sessions_at_once_are_served(clients: Clients, box: str) -> None:
    """HUSK_TEST_SESSIONS=500 opens as many, half of them over WebSocket."""

    async def by_spdy(number: int) -> bytes:
        client, streams = await clients.exec(box, "cat")
        await client.send(streams["stdin"], b"%d" % number)
        await client.until(streams["stdout"], lambda seen: bool(seen), SESSIONS_S)
        await everyone.wait()
        await client.end(streams["stdin"])
        assert exit_code(await client.all(streams["error"], SESSIONS_S)) == 0
        return await client.all(streams["stdout"])

    async def by_websocket(number: int) -> bytes:
        client = await clients.websocket(clients.exec_url(box, "cat"), V5)
        await client.send(b"\0%d" % number)
        await client.until(lambda: bool(client.channel(1)))
        await everyone.wait()
        await client.send(b"\xff\0")
        await client.read_all()
        assert exit_code(client.channel(3)) == 0
        return client.channel(1)

    everyone = asyncio.Barrier(SESSIONS)
    kinds = (by_spdy, by_websocket)
    async with asyncio.timeout(SESSIONS_S):
        seen = await asyncio.gather(*(kinds[number % 2](number) for number in range(SESSIONS)))
    assert seen == [b"%d" % number for number in range(SESSIONS)]


def test_exec_sync_output_is_cut_at_16_mib_and_says_so(cri: Cri, box: str) -> None:
    command = ["sh", "-c", "dd if=/dev/zero bs=1M count=20 2>/dev/null; echo done >&2"]
    result = cri.call("ExecSync", container_id=box, cmd=command)
    assert len(result.stdout) == (16 << 20) - 1024 - len("done\n")
    assert result.stderr == b"done\nhusk: stdout is cut, as a response has at most 16 MiB of output\n"


# ------------------------------------------------------------------------------------- attach


async def test_attach_reaches_the_first_process(clients: Clients, cri: Cri, pod: Pod) -> None:
    """Several clients get new output only and may write; the log has all of it too."""
    container = cri.run(pod, BUSYBOX, ["sh", "-c", f"echo before; {ECHO}"], stdin=True)
    eventually_sync(lambda: cri.log(container), timeout_s=30)
    first, streams = await clients.attach(container)
    await first.send(streams["stdin"], b"one\n")
    await first.until(streams["stderr"], lambda seen: seen == b"err one\n")
    second, others = await clients.attach(container, stdin=False, stderr=False)
    await asyncio.sleep(0.2)
    await first.send(streams["stdin"], b"two\n")
    await second.until(others["stdout"], lambda seen: seen == b"out two\n")
    await first.until(streams["stdout"], lambda seen: seen == b"out one\nout two\n")
    await first.close()
    third, streams = await clients.attach(container)
    await third.send(streams["stdin"], b"three\n")
    await second.until(others["stdout"], lambda seen: seen == b"out two\nout three\n")
    await asyncio.to_thread(cri.stop, container, 0)
    for client, error in ((second, others["error"]), (third, streams["error"])):
        assert exit_code(await client.all(error)) == 0
    text = [line.text for line in cri.log(container) if line.stream == "stdout"]
    assert text == ["before", "out one", "out two", "out three"]


async def test_attach_with_stdin_once_closes_stdin_with_the_client(
    clients: Clients, cri: Cri, pod: Pod
) -> None:
    container = cri.run(pod, BUSYBOX, ["sh", "-c", "cat; echo bye"], stdin=True, stdin_once=True)
    client, streams = await clients.attach(container)
    await client.send(streams["stdin"], b"all of it\n")
    await client.end(streams["stdin"])
    assert await client.all(streams["stdout"]) == b"all of it\nbye\n"
    assert exit_code(await client.all(streams["error"])) == 0
    assert cri.wait_exited(container).exit_code == 0


async def test_attach_to_terminal_resizes_it(clients: Clients, cri: Cri, pod: Pod) -> None:
    container = cri.run(pod, BUSYBOX, ["sh"], stdin=True, tty=True)
    client, streams = await clients.attach(container, tty=True, stderr=False)
    await client.send(streams["resize"], b'{"Width":99,"Height":11}')
    await client.send(streams["stdin"], b"sleep 0.3; stty size\n")
    await client.until(streams["stdout"], lambda seen: b"11 99\r\n" in seen)
    await client.send(streams["stdin"], b"exit\n")
    assert exit_code(await client.all(streams["error"])) == 0
    assert cri.wait_exited(container).exit_code == 0


def test_exec_and_attach_without_a_running_container_are_refused(cri: Cri, pod: Pod) -> None:
    container = cri.create(pod, BUSYBOX, ["sleep", "3600"])
    for id, code in (
        (container, grpc.StatusCode.FAILED_PRECONDITION),
        ("unknown", grpc.StatusCode.NOT_FOUND),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            cri.call("Exec", container_id=id, cmd=["true"], stdout=True)
        assert caught.value.code() is code
        with pytest.raises(grpc.RpcError) as caught:
            cri.call("Attach", container_id=id, stdout=True)
        assert caught.value.code() is code


# ------------------------------------------------------------------------------- port-forward


async def test_port_forward_copies_several_connections_and_a_refused_one_fails_alone(
    clients: Clients, cri: Cri, pod: Pod
) -> None:
    """The pod listens on its 127.0.0.1."""
    cri.pull(WEB)
    container = cri.run(pod, WEB)
    eventually_sync(
        lambda: cri.exec(container, "wget", "-q", "-O", "-", "127.0.0.1").code,
        until=lambda code: code == 0,
        timeout_s=30,
    )
    client = await clients.forward(pod)
    refused, error = await pair(client, 81, "refused")
    assert b"81" in await client.all(error)
    for number in range(3):
        data, error = await pair(client, 80, str(number))
        await client.send(data, b"GET / HTTP/1.0\r\n\r\n")
        page = await client.all(data)
        assert page.endswith(b"hello from the pod\n")
        await client.end(data)
        assert await client.all(error) == b""
    assert client.streams[refused].ended.is_set()


async def test_port_forward_delivers_a_reply_after_the_clients_end(
    clients: Clients, cri: Cri, pod: Pod, box: str
) -> None:
    cri.run(pod, BUSYBOX, ["nc", "-l", "-p", "7000", "-e", "sh", "-c", "wc -c"])
    sockets = ("cat", "/proc/net/tcp", "/proc/net/tcp6")
    eventually_sync(
        lambda: cri.exec(box, *sockets).stdout, until=lambda text: f":{7000:04X} " in text, timeout_s=30
    )
    client = await clients.forward(pod)
    data, error = await pair(client, 7000, "0")
    await client.send(data, b"x" * 100_000)
    await client.end(data)
    assert (await client.all(data)).strip() == b"100000"
    assert await client.all(error) == b""


async def test_port_forward_over_websocket_ends_with_the_pods_program(
    clients: Clients, cri: Cri, pod: Pod, box: str
) -> None:
    cri.run(pod, BUSYBOX, ["nc", "-l", "-p", "7001", "-e", "echo", "bye"])
    sockets = ("cat", "/proc/net/tcp", "/proc/net/tcp6")
    eventually_sync(
        lambda: cri.exec(box, *sockets).stdout, until=lambda text: f":{7001:04X} " in text, timeout_s=30
    )
    url = str(cri.call("PortForward", pod_sandbox_id=pod.id, port=[7001]).url)
    client = await clients.websocket(url, V4)
    await asyncio.wait_for(client.read_all(), 20)
    assert client.channel(0) == (7001).to_bytes(2, "little") + b"bye\n"


async def test_port_forward_to_a_stopped_pod_fails(clients: Clients, cri: Cri) -> None:
    pod = cri.run_pod("forward-ends")
    client = await clients.forward(pod)
    await asyncio.to_thread(cri.stop_pod, pod)
    _, error = await pair(client, 80, "0")
    assert b"not ready" in await client.all(error) or b"is" in bytes(client.streams[error].seen)
    with pytest.raises(grpc.RpcError) as caught:
        cri.call("PortForward", pod_sandbox_id=pod.id)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


# ------------------------------------------------------------------------------- the daemon ends


async def test_sessions_end_with_the_daemon(clients: Clients, cri: Cri, daemon: Daemon, box: str) -> None:
    """Its pods and containers do not; what was exec'ed does."""
    client, streams = await clients.exec(box, "sh", "-c", "echo begun; sleep 9753")
    await client.until(streams["stdout"], lambda seen: seen == b"begun\n")
    assert await asyncio.to_thread(daemon.terminate) == 0
    await client.wait_closed()
    await asyncio.to_thread(daemon.start)
    eventually_sync(lambda: cri.exec(box, "ps").stdout, until=lambda text: "9753" not in text, timeout_s=20)
