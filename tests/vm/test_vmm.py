"""A real guest in a real VM: what the host mounts later appears in it, and its writes reach the host.

The guest is the distribution's kernel with a shell in place of the agent, so only the VMM, its shares and
the parts of the guest image are under test.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandbox.host import cgroup, mount_flags, mounts, process, syscalls, unix_sockets
from sandbox.vmm import Machine, ShareSpec, VmHandle, VmSpec
from sandbox.vmm.drivers import find_hypervisor
from tests.kit.eventually import eventually
from tests.kit.guest import fetch_kernel, make_image

pytestmark = pytest.mark.vm

INIT = """\
until port=$(grep -l ^husk.0 /sys/class/virtio-ports/*/name); do :; done
port=${port%/name}
exec 3<>/dev/${port##*/}
dd bs=32 count=1 <&3 2>/dev/null | tail -c 16 >&3
exec sh <&3 >&3 2>&3
"""


@dataclass
class Guest:
    handle: VmHandle
    machine: Machine
    channel: socket.socket
    run_dir: Path

    async def sh(self, script: str) -> str:
        """Run a script in the guest; return its output."""
        loop = asyncio.get_running_loop()
        end = secrets.token_hex(8)
        await loop.sock_sendall(self.channel, f"{script}\necho {end[:8]}''{end[8:]}\n".encode())
        printed = b""
        async with asyncio.timeout(30):
            while end.encode() not in printed:
                chunk = await loop.sock_recv(self.channel, 65536)
                assert chunk, self.machine.console_tail()
                printed += chunk
        return printed.decode().replace(end + "\n", "")

    def share(self, tag: str, name: str, *, directory: bool = True) -> Path:
        """Make a mount point in a share, by the writable directory of which the share is a read-only bind."""
        place = self.run_dir / "back" / tag / name
        place.parent.mkdir(exist_ok=True)
        place.mkdir() if directory else place.touch()
        return self.run_dir / "share" / tag / name


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    vmlinux, initramfs = make_image(tmp_path, await fetch_kernel(tmp_path), INIT)
    pod_id = f"vm{secrets.token_hex(6)}"
    run_dir = tmp_path / "run"
    shares = []
    for tag, cache in (("rootfs", "always"), ("volumes", "auto")):
        back, share = run_dir / "back" / tag, run_dir / "share" / tag
        back.mkdir(parents=True)
        share.mkdir(parents=True)
        mounts.bind(back, share, recursive=False)
        mounts.make_readonly(share)
        mounts.set_propagation(share, mount_flags.MS_PRIVATE)
        mounts.set_propagation(share, mount_flags.MS_SHARED)
        shares.append(ShareSpec(tag=tag, source=str(share), cache=cache))
    cgroups = cgroup.find_cgroups(f"/husk-{pod_id}")
    cgroups.create(pod_id, "")
    hypervisor = find_hypervisor("qemu")
    spec = VmSpec(
        pod_id=pod_id,
        run_dir=str(run_dir),
        kernel=str(vmlinux),
        initramfs=str(initramfs),
        accelerator="tcg",
        memory_mib=256,
        vcpus=1,
        shares=tuple(shares),
        cgroups=cgroups.directories(pod_id, ""),
    )
    try:
        machine = await hypervisor.start(spec, ())
        with unix_sockets.connect(run_dir / "agent.sock") as channel:
            yield Guest(machine.handle, machine, await greeted(channel, machine), run_dir)
        await machine.close()
    finally:
        await hypervisor.destroy(pod_id, run_dir)
        cgroups.remove(pod_id, "")
        mounts.unmount_tree(run_dir)
        shutil.rmtree(run_dir)
    assert process.find_by_argument(f"{run_dir}/", f"husk-{pod_id}") == []


async def greeted(channel: socket.socket, machine: Machine) -> socket.socket:
    loop = asyncio.get_running_loop()
    nonce = secrets.token_bytes(16)
    await loop.sock_sendall(channel, bytes(16) + nonce)
    answer = asyncio.create_task(loop.sock_recv(channel, 16))
    death = asyncio.create_task(machine.wait())
    await asyncio.wait({answer, death}, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    death.cancel()
    assert answer.done() and answer.result() == nonce, machine.console_tail()
    return channel


async def test_mounts_made_while_the_guest_runs_appear_in_it(guest: Guest, tmp_path: Path) -> None:
    mounted = await guest.sh(
        "mkdir /r /v; mount -t virtiofs rootfs /r && mount -t virtiofs volumes /v; ls /r /v"
    )
    assert mounted == "/r:\n\n/v:\n", "both shares are mounted, and empty"
    assert "Read-only" in await guest.sh("touch /r/planted /v/planted"), "a guest cannot create files there"
    lower, upper, work = (tmp_path / name for name in ("lower", "upper", "work"))
    for each in (lower, upper, work):
        each.mkdir()
    (lower / "etc").mkdir()
    (lower / "etc/name").write_text("lower\n")
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    syscalls.mount("overlay", guest.share("rootfs", "c1"), "overlay", 0, options)
    volume, single = tmp_path / "volume", tmp_path / "single"
    volume.mkdir()
    (volume / "file").write_text("in a volume\n")
    single.write_text("one\n")
    mounts.bind(volume, guest.share("volumes", "0"))
    mounts.bind(single, guest.share("volumes", "1", directory=False))

    assert await guest.sh("cat /r/c1/etc/name /v/0/file /v/1") == "lower\nin a volume\none\n"
    await guest.sh("echo written >/r/c1/new; chown 1234:5678 /r/c1/new; mknod /r/c1/null c 1 3")
    assert (upper / "new").read_text() == "written\n"
    assert ((upper / "new").stat().st_uid, (upper / "new").stat().st_gid) == (1234, 5678)
    assert (upper / "null").is_char_device()
    assert not (lower / "new").exists()
    # each volume is a separate super block in the guest, so that inode numbers do not clash
    assert await guest.sh("grep -c ' /[rv]/[c01]' /proc/mounts") == "1\n"

    single.write_text("two\n")
    await eventually(lambda: guest.sh("cat /v/1"), until=lambda text: text == "two\n")


async def test_panic_ends_the_vm_with_its_output_in_the_reason(guest: Guest) -> None:
    death = asyncio.create_task(guest.machine.wait())
    await asyncio.get_running_loop().sock_sendall(guest.channel, b"echo c >/proc/sysrq-trigger\n")
    async with asyncio.timeout(30):
        reason = await death
    assert "panic" in reason
    assert "Kernel panic" in guest.machine.console_tail()
    assert not any(process.alive(each) for each in (guest.handle.vmm, *guest.handle.helpers.values()))
