"""What every hypervisor in sandbox/vmm has to do, with real VMs of a few bytes.

No guest system is needed for it: the kernel prints to the console, again and again or once.
"""

# ruff: noqa: ASYNC220 -- a test has its loop to itself

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import secrets
import signal
import struct
import subprocess
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from sandbox.errors import InvalidSpec, MissingProgram, VmmError, VmmGone
from sandbox.host import cgroup, process, unix_sockets
from sandbox.host.cgroup import Cgroups
from sandbox.host.process import ProcessIdentity
from sandbox.vmm import (
    Hypervisor,
    Machine,
    NicSpec,
    ShareSpec,
    VmHandle,
    VmSpec,
)
from sandbox.vmm.drivers import find_hypervisor, find_hypervisors
from tests.kit.tinykernel import make_kernel

DEADLINE_S = 20


@dataclass
class Site:
    """A pod's directory and cgroup, and the hypervisor under test."""

    name: str
    hypervisor: Hypervisor
    spec: VmSpec
    cgroups: Cgroups
    machines: list[Machine] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return Path(self.spec.run_dir)

    def processes(self) -> list[ProcessIdentity]:
        found = process.find_by_cgroup(self.spec.cgroups)
        return found + process.find_by_argument(f"husk-{self.spec.pod_id}", f"{self.run_dir}/")

    def guest(self, line: str, *, then: str = "repeat") -> None:
        Path(self.spec.kernel).write_bytes(make_kernel(line, then=then))

    async def start(self, **changes: object) -> Machine:
        """Closed in the end, whatever a test does with it."""
        machine = await self.hypervisor.start(msgspec.structs.replace(self.spec, **changes), ())
        self.machines.append(machine)
        return machine


@pytest.fixture(params=find_hypervisors())
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    hypervisor = find_hypervisor(request.param)
    pod_id = f"test{secrets.token_hex(6)}"
    cgroups = cgroup.find_cgroups(f"/husk-{pod_id}")
    cgroups.create(pod_id, "")
    run_dir, shares = tmp_path / "run", []
    for name, cache in (("rootfs", "always"), ("volumes", "auto")):
        (run_dir / "share" / name).mkdir(parents=True)
        shares.append(ShareSpec(tag=name, source=str(run_dir / "share" / name), cache=cache))
    (tmp_path / "initramfs").write_bytes(b"")
    spec = VmSpec(
        pod_id=pod_id,
        run_dir=str(run_dir),
        kernel=str(tmp_path / "kernel"),
        initramfs=str(tmp_path / "initramfs"),
        accelerator="tcg",
        memory_mib=64,
        vcpus=1,
        shares=tuple(shares),
        cgroups=cgroups.directories(pod_id, ""),
    )
    made = Site(request.param, hypervisor, spec, cgroups)
    made.guest("the guest lives")
    yield made
    for machine in made.machines:
        await machine.close()
    await hypervisor.destroy(pod_id, run_dir)
    left = made.processes()
    cgroups.remove(pod_id, "")
    assert left == []


async def until_printed(machine: Machine, line: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while line not in machine.console_tail():
            await asyncio.sleep(0.02)


async def test_a_vm_is_started_and_told_about(site: Site) -> None:
    machine = await site.start()
    handle = machine.handle
    assert handle.hypervisor == site.name
    assert set(handle.helpers) == {"rootfs", "volumes"}
    for identity in (handle.vmm, *handle.helpers.values()):
        assert identity in process.find_by_cgroup(site.spec.cgroups)
        assert os.getsid(identity.pid) == identity.pid
    status = Path(f"/proc/{handle.vmm.pid}/status").read_text()
    assert "CapEff:\t" + "0" * 16 in status and "Seccomp:\t2" in status and "Uid:\t0\t" not in status
    await until_printed(machine, "the guest lives")
    described = await machine.describe()
    assert described["state"] == "running" and described["accelerator"] == "tcg"
    await machine.close()


async def test_the_handle_is_enough_after_a_restart(site: Site) -> None:
    machine = await site.start()
    handle = machine.handle
    await until_printed(machine, "the guest lives")
    await machine.close()
    await machine.close()
    stored = msgspec.json.decode(msgspec.json.encode(handle), type=VmHandle)
    again = await find_hypervisor(site.name).attach(stored)
    assert "the guest lives" in again.console_tail(), "what it said before the restart"
    assert (await again.describe())["state"] == "running"
    await again.close()
    assert process.alive(handle.vmm), "letting go harms no VM"


async def test_killed_twice(site: Site) -> None:
    machine = await site.start()
    waiting = asyncio.create_task(machine.wait())
    for _ in range(2):
        await site.hypervisor.destroy(site.spec.pod_id, site.run_dir)
    async with asyncio.timeout(DEADLINE_S):
        assert await waiting
    assert site.processes() == []
    await machine.close()
    with pytest.raises(VmmGone):
        await site.hypervisor.attach(machine.handle)


async def test_destroyed_twice_by_name_alone(site: Site) -> None:
    await site.start()
    for _ in range(2):
        await site.hypervisor.destroy(site.spec.pod_id, site.run_dir)
        assert site.processes() == []
    assert not list(site.run_dir.glob("*.sock"))


async def test_destroyed_when_nothing_was_ever_made(site: Site) -> None:
    await site.hypervisor.destroy("never", site.run_dir / "never")


async def test_a_guest_that_resets_ends_its_vm(site: Site) -> None:
    site.guest("last words", then="reset")
    try:
        machine = await site.start()
    except VmmError:
        return  # it was quicker than us
    async with asyncio.timeout(DEADLINE_S):
        assert await machine.wait()
    await machine.close()


async def test_a_vmm_that_dies_is_noticed_with_its_signal(site: Site) -> None:
    machine = await site.start()
    handle = machine.handle
    waiting = asyncio.create_task(machine.wait())
    await asyncio.sleep(0)
    os.kill(handle.vmm.pid, signal.SIGSEGV)
    async with asyncio.timeout(DEADLINE_S):
        assert "11" in await waiting
    assert site.processes() == [], "helpers end with it"
    assert (await machine.describe())["state"].startswith("unknown")
    await machine.close()


async def test_a_helper_that_fails_undoes_all(site: Site) -> None:
    shares = (site.spec.shares[0], ShareSpec(tag="volumes", source=f"{site.run_dir}/none", cache="auto"))
    with pytest.raises(VmmError):
        await site.start(shares=shares)
    assert site.processes() == []
    await site.start()  # and nothing is in the way of the next


async def test_a_kernel_that_is_none_undoes_all(site: Site) -> None:
    Path(site.spec.kernel).write_bytes(b"rubbish")
    with pytest.raises(VmmError, match="kernel"):
        await site.start()
    assert site.processes() == []


async def test_missing_files_say_how_to_get_them(site: Site) -> None:
    with pytest.raises(MissingProgram, match="husk guest build"):
        await site.start(kernel="/nonexistent/vmlinux")
    with pytest.raises(InvalidSpec):
        await site.start(accelerator="magic")
    assert site.processes() == []


async def test_a_machine_type_that_does_not_exist_is_named(site: Site) -> None:
    with pytest.raises(VmmError, match="machine type"):
        await site.start(options={"machine": "no-such-machine"})
    assert site.processes() == []


async def test_a_cancelled_start_leaves_nothing(site: Site) -> None:
    starting = asyncio.create_task(site.start())
    async with asyncio.timeout(DEADLINE_S):
        while not site.processes():
            await asyncio.sleep(0.002)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert site.processes() == []


async def test_a_nic_is_carried_by_a_tap_of_another_namespace(site: Site) -> None:
    script = "ip tuntap add dev tap0 mode tap vnet_hdr && ip link set tap0 up && echo made && exec sleep 60"
    with subprocess.Popen(["unshare", "--net", "sh", "-c", script], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and await asyncio.to_thread(holder.stdout.readline) == b"made\n"
            netns = f"/proc/{holder.pid}/ns/net"
            tap = await asyncio.to_thread(open_tap, netns, "tap0")
            try:
                spec = msgspec.structs.replace(
                    site.spec, netns=netns, nics=(NicSpec(mac="02:00:00:00:00:01"),)
                )
                machine = await site.hypervisor.start(spec, (tap,))
                site.machines.append(machine)
                handle = machine.handle
                os.fstat(tap)  # what the caller gave is still the caller's
            finally:
                os.close(tap)
            assert Path(f"/proc/{handle.vmm.pid}/ns/net").readlink() == Path(netns).readlink()
            command = ["nsenter", f"--net={netns}", "ip", "-o", "link", "show", "tap0"]
            shown = await process.run(command, timeout_s=10)
            assert b"LOWER_UP" in shown.stdout, "somebody holds the other end"
        finally:
            holder.kill()


def open_tap(netns: str, name: str) -> int:
    """In a thread that ends with it: a thread that has entered a namespace is good for nothing else."""
    opened: list[int] = []

    def work() -> None:
        with open(netns) as namespace:  # noqa: PTH123
            assert ctypes.CDLL(None).setns(namespace.fileno(), 0x40000000) == 0
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        flags = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
        fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", name.encode(), flags))  # TUNSETIFF
        opened.append(tap)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return opened[0]


async def test_the_channel_listens_before_the_guest_does(site: Site) -> None:
    handle = (await site.start()).handle
    scheme, _, address = handle.channel.partition(":")
    assert scheme == "serial"
    with unix_sockets.connect(Path(address)):
        assert process.alive(handle.vmm)


# ------------------------------------------------------------------------------------ templates

ROOM = {"max_memory_mib": 192, "max_vcpus": 2, "max_nics": 2}


async def save(site: Site, directory: Path) -> None:
    """A template of the site's guest, by a VM that is gone afterwards."""
    machine = await site.start(savable=True, shares=(), **ROOM)
    await until_printed(machine, "the guest lives")
    await machine.save(directory)
    await machine.close()
    await site.hypervisor.destroy(site.spec.pod_id, site.run_dir)
    assert site.processes() == []


def forget_console(site: Site) -> None:
    (site.run_dir / "console.log").unlink()


async def test_a_saved_vm_goes_on_as_often_as_asked(site: Site, tmp_path: Path) -> None:
    await save(site, tmp_path / "template")
    Path(site.spec.kernel).unlink()  # what goes on needs none
    for _ in range(2):
        forget_console(site)
        machine = await site.start(template=str(tmp_path / "template"), **ROOM)
        assert set(machine.handle.helpers) == {"rootfs", "volumes"}
        assert (await machine.describe())["state"] == "running"
        await until_printed(machine, "the guest lives")
        await machine.close()
        await site.hypervisor.destroy(site.spec.pod_id, site.run_dir)
        assert site.processes() == []


async def test_a_paused_vm_says_nothing_until_it_is_resumed(site: Site) -> None:
    machine = await site.start()
    await until_printed(machine, "the guest lives")
    for _ in range(2):
        await machine.pause()
    assert (await machine.describe())["state"] == "paused"
    await asyncio.sleep(0.2)  # what is under way still arrives
    said = len(machine.console_tail())
    await asyncio.sleep(0.2)
    assert len(machine.console_tail()) == said
    for _ in range(2):
        await machine.resume()
    async with asyncio.timeout(DEADLINE_S):
        while len(machine.console_tail()) == said:
            await asyncio.sleep(0.02)
    await machine.close()


@pytest.mark.parametrize("damage", ["state", "ram", "gone", "other-size"])
async def test_a_template_that_is_damaged_undoes_all(site: Site, tmp_path: Path, damage: str) -> None:
    template = tmp_path / "template"
    await save(site, template)
    changes: dict[str, object] = {}
    match damage:
        case "state":
            (template / "state").write_bytes((template / "state").read_bytes()[:5000])
        case "ram":
            (template / "ram").unlink()
        case "gone":
            template = tmp_path / "none"
        case "other-size":
            changes["memory_mib"] = 128
    with pytest.raises(VmmError):
        await site.start(**{"template": str(template), **ROOM, **changes})
    assert site.processes() == []
    await site.start()  # and nothing is in the way of the next


async def test_a_cancelled_continuation_leaves_nothing(site: Site, tmp_path: Path) -> None:
    await save(site, tmp_path / "template")
    starting = asyncio.create_task(site.start(template=str(tmp_path / "template"), **ROOM))
    async with asyncio.timeout(DEADLINE_S):
        while not (site.run_dir / "agent.sock").exists():
            await asyncio.sleep(0.002)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert site.processes() == []


async def test_a_vm_is_not_grown_beyond_its_room(site: Site) -> None:
    machine = await site.start(**ROOM)
    for memory_mib, vcpus in ((256, 1), (64, 3)):
        with pytest.raises(VmmError, match="more than"):
            await machine.grow(memory_mib, vcpus)
    await machine.grow(64, 1)  # what it has anyway
    await machine.grow(64, 2)
    await machine.grow(64, 2)
    await machine.close()


async def test_a_guest_that_takes_no_memory_is_told_of(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.vmm.qemu.hotplug.MEMORY_TIMEOUT_S", 0.2)
    machine = await site.start(**ROOM)
    with pytest.raises(VmmError, match="took 0 of 64 MiB"):
        await machine.grow(128, 1)
    await machine.close()


async def test_the_fingerprint_is_of_what_a_template_depends_on(site: Site) -> None:
    async def fingerprint(**changes: object) -> str:
        return await site.hypervisor.fingerprint(msgspec.structs.replace(site.spec, **changes))

    first = await fingerprint()
    same = {"pod_id": "other", "run_dir": "/elsewhere", "shares": (), "netns": "/n", "cgroups": ()}
    assert await fingerprint(**same) == first
    for changes in ({"memory_mib": 128}, {"vcpus": 2}, {"accelerator": "kvm"}, {"max_nics": 2}):
        assert await fingerprint(**changes) != first
    site.guest("another guest")
    assert await fingerprint() != first
    with pytest.raises(MissingProgram, match="husk guest build"):
        await fingerprint(kernel="/nonexistent/vmlinux")
