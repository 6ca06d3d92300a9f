"""What QEMU's driver needs of the host, and how it bounds a guest's output."""

from __future__ import annotations

import asyncio
import socket
import stat
from pathlib import Path

import pytest

from sandbox.errors import InvalidSpec, MissingProgram, VmmGone
from sandbox.host import process, unix_sockets
from sandbox.vmm.console import LIMIT, Console, printable, read_tail
from sandbox.vmm.drivers import find_host, find_hypervisor, find_hypervisors
from sandbox.vmm.qemu import host
from sandbox.vmm.qemu.qmp import Monitor


def test_drivers_are_found_by_their_folders() -> None:
    assert find_hypervisors()[0] == "qemu"
    assert find_hypervisor("qemu") and find_host("qemu")
    for name in ("console", "qmp", ""):
        with pytest.raises(InvalidSpec, match="accepted: qemu"):
            find_hypervisor(name)


def test_missing_programs_are_reported_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(process.ENVIRONMENT, "PATH", "/nonexistent")
    with pytest.raises(MissingProgram, match="qemu-system-x86"):
        host.find_program()
    monkeypatch.setattr(host, "FIRMWARE", ("/nonexistent/qboot.rom",))
    with pytest.raises(MissingProgram, match="qboot"):
        host.find_firmware()


async def test_version_of_qemu_starts_with_a_number() -> None:
    assert (await host.find_version(host.find_program()))[0].isdecimal()


def test_user_of_qemu_is_never_root_and_gets_a_group_only_for_kvm() -> None:
    user = host.find_user("tcg")
    assert user.uid != 0 and user.gid != 0 and user.groups == ()
    assert 0 not in host.find_user("kvm").groups


def test_socket_with_a_long_path_is_accessible_to_root_only(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    directory.mkdir(parents=True)
    path = directory / "a.sock"
    for _ in range(2):  # the second replaces what a crash would have left
        with unix_sockets.listen(path) as listener, unix_sockets.connect(path) as client:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            peer, _ = listener.accept()
            with peer:
                client.sendall(b"x")
                assert peer.recv(1) == b"x"
    with pytest.raises(ConnectionRefusedError):
        unix_sockets.connect(path)


async def test_console_keeps_a_bounded_tail(tmp_path: Path) -> None:
    here, there = socket.socketpair()
    here.setblocking(False)
    console = Console(here, tmp_path)
    loop = asyncio.get_running_loop()
    there.setblocking(False)
    for number in range(3000):
        await loop.sock_sendall(there, b"line %05d %s\n" % (number, b"x" * 60))
    there.close()
    await console.drain()
    assert console.tail().endswith("line 02999 " + "x" * 60)
    assert len(console.tail()) <= LIMIT
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 2 * LIMIT
    await console.close()
    await console.close()
    assert printable(read_tail(tmp_path)) == console.tail()


async def test_console_tail_survives_a_restart(tmp_path: Path) -> None:
    for word in (b"first\n", b"second\n"):
        here, there = socket.socketpair()
        here.setblocking(False)
        console = Console(here, tmp_path)
        there.sendall(word)
        there.close()
        await console.drain()
        await console.close()
    assert console.tail() == "first\nsecond"


def test_control_sequences_of_a_guest_are_replaced() -> None:
    assert printable(b"a\x1b[2Jb\r\nc\xff\x00") == "a?[2Jb\nc\ufffd?"


async def test_monitor_without_a_server_raises_vmm_gone(tmp_path: Path) -> None:
    with pytest.raises(VmmGone):
        await Monitor.connect(tmp_path / "qmp.sock", 1.0)
    listener = unix_sockets.listen(tmp_path / "qmp.sock")

    async def hang_up() -> None:
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        connection.close()

    listener.setblocking(False)
    closing = asyncio.create_task(hang_up())
    with listener, pytest.raises(VmmGone):
        await Monitor.connect(tmp_path / "qmp.sock", 5.0)
    await closing
