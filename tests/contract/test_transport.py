"""The contract of guest transports, run on every transport found in sandbox/guest."""

from __future__ import annotations

import asyncio
import errno
import importlib
import os
import pkgutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

import sandbox.guest
from sandbox.errors import GuestUnreachable
from sandbox.guest import Transport, transports, vsock
from sandbox.guest.client import GuestClient
from tests.fakes.guest import FakeAgent

SCHEMES = [
    module.name
    for module in pkgutil.iter_modules(sandbox.guest.__path__)
    if not module.name.endswith("_pb2")
    and hasattr(importlib.import_module(f"sandbox.guest.{module.name}"), "transport")
]
VMADDR_CID_LOCAL = 1  # linux/vm_sockets.h; Python 3.11 has no name for it
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy:DeprecationWarning")


@pytest.fixture
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    policy: asyncio.AbstractEventLoopPolicy = uvloop.EventLoopPolicy()
    return policy


@asynccontextmanager
async def listening(scheme: str, directory: Path, serve: Serve) -> AsyncIterator[str]:
    """Listen as an agent does for this transport; yields the address to connect to."""
    if scheme in ("unix", "serial"):
        server = await asyncio.start_unix_server(serve, str(directory / "agent.sock"))
        address = f"{scheme}:{directory}/agent.sock"
    elif scheme == "vsock":
        listener = vsock_listener()
        server = await asyncio.start_unix_server(serve, sock=vsock.rewrap(listener[0]))
        address = f"vsock:{VMADDR_CID_LOCAL}:{listener[1]}"
    else:
        pytest.fail(f"this fixture cannot listen for {scheme} yet")
    try:
        yield address
    finally:
        server.close()


def vsock_listener() -> tuple[socket.socket, int]:
    """Listen on vsock's loopback; skips where the kernel lacks the module vsock_loopback."""
    try:
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listener.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        listener.listen()
        port = listener.getsockname()[1]
        vsock.dial(VMADDR_CID_LOCAL, port, 0.2).close()
        listener.accept()[0].close()
    except (OSError, GuestUnreachable) as error:
        pytest.skip(f"this kernel has no vsock loopback ({error})")
    return listener, port


def test_all_transports_are_found() -> None:
    assert {"unix", "serial", "vsock"} <= set(SCHEMES)


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_bytes_pass_in_both_directions(scheme: str, tmp_path: Path) -> None:
    sent = os.urandom(3 << 20)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(len(sent)))
        await writer.drain()
        writer.close()

    async with listening(scheme, tmp_path, echo) as address:
        sock = await transports.connect(address, 5)
        assert not sock.getblocking()
        assert not os.get_inheritable(sock.fileno())
        assert sock.family is socket.AF_UNIX
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        writer.write(sent)
        assert await reader.read(-1) == sent
        writer.close()


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_client_connects_over_the_transport(scheme: str, tmp_path: Path) -> None:
    agent = FakeAgent()
    async with listening(scheme, tmp_path, agent.serve) as address:
        client = await GuestClient.connect(
            address, token=b"t" * 16, epoch=1, on_event=lambda event: None, timeout_s=5
        )
        assert client.welcome.agent == "fake"
        await client.close()


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_connect_without_a_listener_is_unreachable(scheme: str, tmp_path: Path) -> None:
    rest = "3:65000" if scheme == "vsock" else str(tmp_path / "absent.sock")
    transport: Transport = transports.find_transport(scheme)
    with pytest.raises(GuestUnreachable, match=rest):
        await transport.connect(rest, 0.1)


@pytest.mark.parametrize(
    "address", ["frames:/x", "client:/x", "nothing:/x", "../unix:/x", ":", "", "guest_pb2:x"]
)
async def test_address_without_a_transport_is_refused(address: str) -> None:
    with pytest.raises(GuestUnreachable, match="transport"):
        await transports.connect(address, 0.1)


@pytest.mark.parametrize("scheme", ["unix", "serial"])
async def test_connect_waits_for_a_full_listen_queue(scheme: str, tmp_path: Path) -> None:
    """A VMM serves one connection; EAGAIN for a full queue must not count as success."""
    path = str(tmp_path / "agent.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(0)
    first = await transports.connect(f"{scheme}:{path}", 1)
    with pytest.raises(GuestUnreachable, match=os.strerror(errno.EAGAIN)):
        await transports.connect(f"{scheme}:{path}", 0.05)
    waiting = asyncio.create_task(transports.connect(f"{scheme}:{path}", 5))
    await asyncio.sleep(0)
    listener.accept()[0].close()
    (await waiting).close()
    first.close()
    listener.close()


@pytest.mark.parametrize("scheme", ["unix", "serial"])
async def test_socket_with_a_long_path_is_reached(scheme: str, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    (tmp_path / "short").symlink_to(deep)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{tmp_path}/short/s")
    listener.listen()
    (await transports.connect(f"{scheme}:{deep}/s", 1)).close()
    listener.close()


@pytest.mark.parametrize("address", ["3", "3:x", "3:4:5", "-1:5", "4294967296:1"])
def test_invalid_vsock_address_is_refused(address: str) -> None:
    with pytest.raises(GuestUnreachable, match="vsock address"):
        vsock.parse_address(address)


async def test_rewrapped_descriptor_works_in_the_event_loop() -> None:
    """Tests what `vsock` does with its socket, on TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname())
        peer = listener.accept()[0]
    fd = dialled.fileno()
    again = vsock.rewrap(dialled)
    assert (again.fileno(), dialled.fileno()) == (fd, -1)
    reader, writer = await asyncio.open_unix_connection(sock=again)
    writer.write(b"ping")
    assert await asyncio.to_thread(peer.recv, 4) == b"ping"
    peer.sendall(b"pong")
    peer.close()
    assert await reader.read(-1) == b"pong"
    writer.close()


async def test_cancelled_vsock_connect_closes_a_late_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    release = asyncio.Event()
    loop = asyncio.get_running_loop()

    def late(cid: int, port: int, timeout_s: float) -> socket.socket:
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
        return ours

    monkeypatch.setattr(vsock, "dial", late)
    dialling = asyncio.create_task(vsock.transport.connect("3:1024", 5))
    await asyncio.sleep(0)
    dialling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dialling
    release.set()
    assert await asyncio.to_thread(theirs.recv, 1) == b""
    theirs.close()
