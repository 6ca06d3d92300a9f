"""Sockets of the host in containers: who may connect, what is carried, and what ends when."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.kit import images
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir
from tests.kit.unix_server import UnixServer

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
SLEEP = ("sleep", "3600")
MEBIBYTES = int(os.environ.get("HUSK_TEST_SOCKET_MEBIBYTES", "48"))
GROWTH_BYTES = 24 << 20  # of the daemon, while these are carried


def answer_at_the_end(peer: socket.socket) -> None:
    """Answer once the client has shut down its side, so that only a half-close gets an answer."""
    seen = []
    while data := peer.recv(1 << 17):
        seen.append(data)
    for data in seen:
        peer.sendall(data.upper())


def echo(peer: socket.socket) -> None:
    while data := peer.recv(1 << 16):
        peer.sendall(data)


def wait_for_end(peer: socket.socket) -> None:
    peer.recv(1)


@pytest.fixture(scope="module")
def tools() -> api.Mount:
    path = scratch_dir("tools")
    (path / "sock").write_bytes(images.helper("sock"))
    (path / "sock").chmod(0o755)
    return api.Mount(container_path="/tools", host_path=str(path), readonly=True)


@pytest.fixture
def servers() -> Iterator[list[UnixServer]]:
    found: list[UnixServer] = []
    yield found
    for server in found:
        server.stop()


@pytest.fixture
def folder() -> Path:
    return scratch_dir("run")


def memory_bytes(daemon: Daemon) -> int:
    lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


def mounted(path: Path, at: str = "/run/s.sock", readonly: bool = True) -> api.Mount:
    return api.Mount(container_path=at, host_path=str(path), readonly=readonly)


@pytest.mark.parametrize("kind", ["stream", "seqpacket"])
def test_connection_is_answered_after_its_half_close(
    cri: Cri, pod: Pod, tools: api.Mount, servers: list[UnixServer], folder: Path, kind: str
) -> None:
    types = {"stream": socket.SOCK_STREAM, "seqpacket": socket.SOCK_SEQPACKET}
    servers.append(UnixServer(folder / "s.sock", types[kind], serve=answer_at_the_end))
    for readonly in (True, False):
        mounts = [tools, mounted(folder / "s.sock", readonly=readonly)]
        script = f"stat -c %F:%a /run/s.sock; printf 'one\\ntwo\\n' | /tools/sock {kind} /run/s.sock"
        result = cri.run_to_end(pod, BUSYBOX, ["sh", "-c", script], mounts=mounts)
        assert result == (0, "socket:666\nONE\nTWO\n")


def test_datagrams_reach_the_log_socket_of_the_host(
    cri: Cri, pod: Pod, tools: api.Mount, servers: list[UnixServer], folder: Path
) -> None:
    server = UnixServer(folder / "dev-log", socket.SOCK_DGRAM)
    servers.append(server)
    (folder / "log").symlink_to(folder / "dev-log")
    mounts = [tools, mounted(folder / "log", "/dev/log")]
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=mounts)
    assert cri.exec(container, "logger", "-t", "app", "from the guest").code == 0
    server.listener.settimeout(20)
    assert server.listener.recv(1000).endswith(b"app: from the guest")


def test_mode_and_user_count_as_on_the_host(
    cri: Cri, pod: Pod, tools: api.Mount, servers: list[UnixServer], folder: Path
) -> None:
    private, grouped = (
        UnixServer(folder / "private", mode=0o600, serve=echo),
        UnixServer(folder / "grouped", mode=0o660, serve=echo),
    )
    servers += [private, grouped]
    os.chown(grouped.path, 0, 2000)
    mounts = [tools, mounted(private.path, "/private"), mounted(grouped.path, "/grouped")]
    script = "for s in private grouped; do echo $s | /tools/sock stream /$s; done 2>&1"
    security = api.LinuxContainerSecurityContext(
        run_as_user=api.Int64Value(value=1000),
        run_as_group=api.Int64Value(value=1000),
        supplemental_groups=[2000],
        no_new_privs=True,
    )
    linux = api.LinuxContainerConfig(security_context=security)
    code, text = cri.run_to_end(pod, BUSYBOX, ["sh", "-c", script], mounts=mounts, linux=linux)
    assert (code, text) == (0, "sock: connect: Permission denied\ngrouped\n")
    assert (private.seen, [each[:2] for each in grouped.seen]) == ([], [(1000, 1000)])
    code, text = cri.run_to_end(pod, BUSYBOX, ["sh", "-c", script], mounts=mounts)
    assert (code, text) == (0, "private\ngrouped\n")
    assert [each[:2] for each in private.seen] == [(0, 0)]


def test_five_hundred_connections_at_once_are_answered(
    cri: Cri, pod: Pod, tools: api.Mount, servers: list[UnixServer], folder: Path
) -> None:
    servers.append(UnixServer(folder / "s.sock", serve=echo))
    mounts = [tools, mounted(folder / "s.sock")]
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=mounts)
    assert cri.exec(container, "/tools/sock", "many", "/run/s.sock", "500").stdout == "500\n"


def test_large_transfers_leave_the_daemons_memory_flat(
    daemon: Daemon, cri: Cri, pod: Pod, tools: api.Mount, servers: list[UnixServer], folder: Path
) -> None:
    """HUSK_TEST_SOCKET_MEBIBYTES=1024 carries a GiB in each direction."""
    block, seen = bytes(range(256)) * 4096, [0]

    def drain(peer: socket.socket) -> None:
        while data := peer.recv(1 << 20):
            seen[0] += len(data)

    def fill(peer: socket.socket) -> None:
        for _ in range(MEBIBYTES):
            peer.sendall(block)

    servers += [UnixServer(folder / "drain", serve=drain), UnixServer(folder / "fill", serve=fill)]
    mounts = [tools, mounted(folder / "drain", "/drain"), mounted(folder / "fill", "/fill")]
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=mounts)

    def carry(count: int) -> None:
        assert cri.exec(container, "/tools/sock", "fill", "/drain", str(count)).stdout == "sent\n"

    carry(1)
    before = memory_bytes(daemon)
    begin = time.monotonic()
    carry(MEBIBYTES)
    eventually_sync(lambda: seen[0], until=((1 + MEBIBYTES) << 20).__eq__, timeout_s=60)
    middle = time.monotonic()
    result = cri.exec(container, "/tools/sock", "sum", "/fill").stdout.split()
    assert list(map(int, result)) == [MEBIBYTES << 20, MEBIBYTES * sum(block)]
    ended = time.monotonic()
    print(f"{MEBIBYTES} MiB to the host in {middle - begin:.1f} s, from it in {ended - middle:.1f} s")
    assert memory_bytes(daemon) - before < GROWTH_BYTES


def test_server_that_starts_again_is_reached_by_running_containers(
    cri: Cri, pod: Pod, tools: api.Mount, servers: list[UnixServer], folder: Path
) -> None:
    server = UnixServer(folder / "s.sock", serve=echo)
    servers.append(server)
    mounts = [tools, mounted(folder / "s.sock")]
    first, second = (cri.run(pod, BUSYBOX, SLEEP, mounts=mounts) for _ in range(2))
    ask = ("sh", "-c", "echo hello | /tools/sock stream /run/s.sock")
    assert [cri.exec(each, *ask).stdout for each in (first, second)] == ["hello\n"] * 2
    server.stop()
    assert cri.exec(first, *ask).stdout == ""
    server.start()
    assert [cri.exec(each, *ask).stdout for each in (first, second)] == ["hello\n"] * 2
    cri.stop(first, timeout=0)
    cri.remove(first)
    assert cri.exec(second, *ask).stdout == "hello\n"


def test_connections_end_with_their_container_and_with_the_daemon(
    daemon: Daemon, cri: Cri, tools: api.Mount, servers: list[UnixServer], folder: Path
) -> None:
    server = UnixServer(folder / "s.sock", serve=wait_for_end)
    servers.append(server)
    pod = cri.run_pod("sockets")
    mounts = [tools, mounted(folder / "s.sock")]
    hold = ["/tools/sock", "hold", "/run/s.sock"]
    first, second = (cri.run(pod, BUSYBOX, hold, mounts=mounts) for _ in range(2))
    eventually_sync(lambda: len(server.seen), until=(2).__eq__, timeout_s=20)
    cri.stop(first, timeout=0)
    eventually_sync(lambda: server.closed, until=(1).__eq__, timeout_s=20)
    daemon.kill()
    eventually_sync(lambda: server.closed, until=(2).__eq__, timeout_s=20)
    daemon.start()
    cri.wait_exited(second)
    assert [line.text for line in cri.log(second)] == ["connected", "closed"]
    third = cri.run(pod, BUSYBOX, hold, mounts=mounts)
    eventually_sync(lambda: len(server.seen), until=(3).__eq__, timeout_s=20)
    cri.remove_pod(pod)
    eventually_sync(lambda: server.closed, until=(3).__eq__, timeout_s=20)
    assert third


def test_sockets_in_a_mounted_directory_and_of_a_container_connect_nothing_outside(
    cri: Cri, pod: Pod, tools: api.Mount, servers: list[UnixServer], folder: Path
) -> None:
    """A limit, as docs/limits.md says: the socket itself must be mounted."""
    servers.append(UnixServer(folder / "s.sock", serve=echo))
    directory = api.Mount(container_path="/run/host", host_path=str(folder))
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=[tools, directory])
    assert cri.exec(container, "stat", "-c", "%F", "/run/host/s.sock").stdout == "socket\n"
    result = cri.exec(container, "sh", "-c", "echo x | /tools/sock stream /run/host/s.sock")
    assert (result.code, result.stderr) == (1, "sock: connect: Connection refused\n")
    cri.run(pod, BUSYBOX, ["/tools/sock", "serve", "/run/host/own.sock"], mounts=[tools, directory])
    own = folder / "own.sock"
    eventually_sync(own.is_socket, timeout_s=20)
    inside = cri.exec(container, "sh", "-c", "echo x | /tools/sock stream /run/host/own.sock")
    assert inside.stdout == "x\n"
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
        client.connect(str(own))
