"""What every hypervisor driver must do, ours and those of tests/drivers, each with its kit's guest.

A guest here only prints a line, again and again or once: no daemon talks to it. What a driver lacks, it must
refuse with Unsupported, and leave nothing behind.
"""

# ruff: noqa: ASYNC220 -- a test has its loop to itself

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import signal
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from sandbox.errors import InvalidSpec, MissingProgram, VmmError, VmmGone
from sandbox.host import cgroup, process, syscalls, threads, unix_sockets
from sandbox.host.cgroup import Cgroups
from sandbox.host.process import ProcessIdentity
from sandbox.vmm import (
    DiskSpec,
    Feature,
    Hypervisor,
    Machine,
    NicSpec,
    ShareSpec,
    Unsupported,
    VmHandle,
    VmSpec,
)
from sandbox.vmm.drivers import find_host, find_hypervisor, find_hypervisors
from sandbox.vmm.qemu import devices, hotplug
from tests.drivers import Kit, find_kit
from tests.kit.eventually import eventually

DEADLINE_S = 20
LINE = "the guest lives"


@dataclass
class Site:
    """A pod's directory and cgroup, and the driver under test."""

    name: str
    kit: Kit
    hypervisor: Hypervisor
    spec: VmSpec
    cgroups: Cgroups
    machines: list[Machine] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return Path(self.spec.run_dir)

    def supports(self, feature: Feature) -> bool:
        return feature in self.hypervisor.features(self.spec)

    def processes(self) -> list[ProcessIdentity]:
        found = process.find_by_cgroup(self.spec.cgroups)
        return found + process.find_by_argument(f"husk-{self.spec.pod_id}", f"{self.run_dir}/")

    def guest(self, line: str, *, then: str = "repeat") -> None:
        self.kit.make_guest(self.run_dir.parent, line, then)

    async def start(self, **changes: object) -> Machine:
        """Start the VM with a changed spec. It is closed at the end, whatever the test does with it."""
        machine = await self.hypervisor.start(msgspec.structs.replace(self.spec, **changes), ())
        self.machines.append(machine)
        return machine

    async def refuses(self, feature: Feature, **changes: object) -> bool:
        """Whether the driver lacks a feature; then starting a VM that needs it must be refused cleanly."""
        if self.supports(feature):
            return False
        with pytest.raises(Unsupported, match=feature) as refused:
            await self.start(**changes)
        assert (refused.value.hypervisor, refused.value.feature) == (self.name, feature)
        assert self.processes() == []
        return True


@contextmanager
def unsupported(site: Site, feature: Feature) -> Iterator[None]:
    """Expect a verb to be refused, and the VM to be none the worse for it."""
    with pytest.raises(Unsupported) as refused:
        yield
    assert (refused.value.hypervisor, refused.value.feature) == (site.name, feature)


@pytest.fixture(params=find_hypervisors())
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    name, hypervisor = request.param, find_hypervisor(request.param)
    kit = find_kit(name)
    pod_id = f"test{secrets.token_hex(6)}"
    cgroups = cgroup.find_cgroups(f"/husk-{pod_id}")
    cgroups.create(pod_id, "")
    run_dir, shares = tmp_path / "run", []
    for share, cache in (("rootfs", "always"), ("volumes", "auto")):
        (run_dir / "share" / share).mkdir(parents=True)
        shares.append(ShareSpec(tag=share, source=str(run_dir / "share" / share), cache=cache))
    spec = msgspec.structs.replace(
        kit.make_guest(tmp_path, LINE, "repeat"),
        hypervisor=name,
        pod_id=pod_id,
        run_dir=str(run_dir),
        shares=tuple(shares),
        cgroups=cgroups.directories(pod_id, ""),
    )
    made = Site(name, kit, hypervisor, spec, cgroups)
    yield made
    for machine in made.machines:
        await machine.close()
    await hypervisor.destroy(pod_id, run_dir)
    left = made.processes()
    cgroups.remove(pod_id, "")
    assert left == []


async def until_printed(machine: Machine, line: str) -> None:
    await eventually(machine.console_tail, until=lambda tail: line in tail, timeout_s=DEADLINE_S)


async def test_started_vm_is_described_by_its_handle(site: Site) -> None:
    machine = await site.start()
    handle = machine.handle
    assert handle.hypervisor == site.name
    assert set(handle.helpers) == site.kit.helpers(site.spec)
    everyone = (handle.vmm, *handle.helpers.values())
    for identity in everyone:
        assert identity in process.find_by_cgroup(site.spec.cgroups)
        assert os.getsid(identity.pid) in {each.pid for each in everyone}, "no signal of ours reaches it"
    assert os.getsid(handle.vmm.pid) == handle.vmm.pid
    site.kit.check_confinement(handle)
    await until_printed(machine, LINE)
    described = await machine.describe()
    assert described["state"] == "running" and described["accelerator"] == site.kit.ACCELERATOR
    assert described["pid"] == str(handle.vmm.pid)
    await machine.close()


async def test_stored_handle_is_enough_to_attach_after_a_restart(site: Site) -> None:
    machine = await site.start()
    handle = machine.handle
    await until_printed(machine, LINE)
    await machine.close()
    await machine.close()
    stored = msgspec.json.decode(msgspec.json.encode(handle), type=VmHandle)
    again = await find_hypervisor(site.name).attach(stored)
    assert LINE in again.console_tail(), "what it printed before the restart"
    assert (await again.describe())["state"] == "running"
    await again.close()
    assert process.alive(handle.vmm), "closing the connection does not end the VM"


async def test_destroy_ends_a_running_vm_and_is_idempotent(site: Site) -> None:
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


async def test_destroy_needs_the_name_alone(site: Site) -> None:
    await site.start()
    for _ in range(2):
        await find_hypervisor(site.name).destroy(site.spec.pod_id, site.run_dir)
        assert site.processes() == []
    assert not list(site.run_dir.glob("*.sock"))


async def test_destroy_of_a_vm_that_never_existed_succeeds(site: Site) -> None:
    await site.hypervisor.destroy("never", site.run_dir / "never")


async def test_guest_that_resets_ends_its_vm(site: Site) -> None:
    site.guest("last words", then="reset")
    try:
        machine = await site.start()
    except VmmError:
        return  # it was quicker than us
    async with asyncio.timeout(DEADLINE_S):
        assert await machine.wait()
    await machine.close()


async def test_vmm_that_dies_is_reported_with_its_signal(site: Site) -> None:
    machine = await site.start()
    handle = machine.handle
    waiting = asyncio.create_task(machine.wait())
    await asyncio.sleep(0)
    os.kill(handle.vmm.pid, signal.SIGSEGV)
    async with asyncio.timeout(DEADLINE_S):
        assert "11" in await waiting
    assert site.processes() == [], "helpers exit with it"
    assert (await machine.describe())["state"].startswith("unknown")
    await machine.close()


async def test_start_with_a_share_that_does_not_exist_leaves_nothing(site: Site) -> None:
    shares = (site.spec.shares[0], ShareSpec(tag="volumes", source=f"{site.run_dir}/none", cache="auto"))
    with pytest.raises(VmmError):
        await site.start(shares=shares)
    assert site.processes() == []
    await site.start()  # and nothing is in the way of the next


async def test_start_with_a_kernel_that_is_none_leaves_nothing(site: Site) -> None:
    Path(site.spec.kernel).write_bytes(b"rubbish")
    with pytest.raises(VmmError, match="kernel"):
        await site.start()
    assert site.processes() == []


async def test_start_with_missing_or_unknown_parts_is_rejected(site: Site) -> None:
    with pytest.raises(MissingProgram, match="husk guest build"):
        await site.start(kernel="/nonexistent/vmlinux")
    with pytest.raises(InvalidSpec, match="accelerator"):
        await site.start(accelerator="magic")
    with pytest.raises(InvalidSpec, match="options"):
        await site.start(options=site.kit.UNKNOWN_OPTIONS)
    assert site.processes() == []


async def test_cancelled_start_leaves_nothing(site: Site) -> None:
    starting = asyncio.create_task(site.start())
    async with asyncio.timeout(DEADLINE_S):
        while not site.processes():
            await asyncio.sleep(0.002)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert site.processes() == []


async def test_nic_is_connected_to_a_tap_of_another_namespace(site: Site) -> None:
    script = "ip tuntap add dev tap0 mode tap vnet_hdr && ip link set tap0 up && echo made && exec sleep 60"
    with subprocess.Popen(["unshare", "--net", "sh", "-c", script], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and await asyncio.to_thread(holder.stdout.readline) == b"made\n"
            netns = f"/proc/{holder.pid}/ns/net"
            tap = await asyncio.to_thread(open_tap, Path(netns), "tap0")
            try:
                nics = (NicSpec(mac="02:00:00:00:00:01"),)
                spec = msgspec.structs.replace(site.spec, netns=netns, nics=nics)
                machine = await site.hypervisor.start(spec, (tap,))
                site.machines.append(machine)
                handle = machine.handle
                os.fstat(tap)  # still open: it belongs to the caller
            finally:
                os.close(tap)
            holding = site.kit.network_process(handle)
            assert Path(f"/proc/{holding.pid}/ns/net").readlink() == Path(netns).readlink()
            command = ["nsenter", f"--net={netns}", "ip", "-o", "link", "show", "tap0"]
            shown = await process.run(command, timeout_s=10)
            assert b"LOWER_UP" in shown.stdout, "the other end is held"
        finally:
            holder.kill()


def open_tap(netns: Path, name: str) -> int:
    def work() -> int:
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        flags = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
        fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", name.encode(), flags))  # TUNSETIFF
        return tap

    return threads.call_in_namespace(netns, syscalls.CLONE_NEWNET, work, "tap")


async def test_channel_accepts_a_connection_before_the_guest_is_ready(site: Site) -> None:
    handle = (await site.start()).handle
    scheme, _, address = handle.channel.partition(":")
    assert scheme in ("serial", "unix")
    with unix_sockets.connect(Path(address)):
        assert process.alive(handle.vmm)


# ---------------------------------------------------------------------------------------- pausing


async def test_paused_vm_prints_nothing_until_it_is_resumed(site: Site) -> None:
    machine = await site.start()
    await until_printed(machine, LINE)
    if not site.supports(Feature.PAUSE):
        for verb in (machine.pause, machine.resume):
            with unsupported(site, Feature.PAUSE):
                await verb()
        assert (await machine.describe())["state"] == "running"
        return
    for _ in range(2):
        await machine.pause()
    assert (await machine.describe())["state"] == "paused"
    await asyncio.sleep(0.2)  # output that is on its way still arrives
    printed = len(machine.console_tail())
    await asyncio.sleep(0.2)
    assert len(machine.console_tail()) == printed
    for _ in range(2):
        await machine.resume()
    await eventually(machine.console_tail, until=lambda tail: len(tail) > printed, timeout_s=DEADLINE_S)
    await machine.close()


# ---------------------------------------------------------------------------------------- growing

GROWTH = {"max_memory_mib": 192, "max_vcpus": 2, "max_nics": 2, "max_disks": 2}


async def test_vm_is_not_grown_beyond_its_spec(site: Site) -> None:
    machine = await site.start(**GROWTH)
    if not site.supports(Feature.GROW):
        with unsupported(site, Feature.GROW):
            await machine.grow(128, 2)
        assert (await machine.describe())["state"] == "running"
        return
    for memory_mib, vcpus in ((256, 1), (64, 3)):
        with pytest.raises(VmmError, match="more than"):
            await machine.grow(memory_mib, vcpus)
    await machine.grow(64, 1)  # no growth
    await machine.grow(64, 2)
    await machine.grow(64, 2)
    await machine.close()


@pytest.mark.parametrize("site", ["qemu"], indirect=True)
async def test_qemu_guest_that_accepts_no_memory_fails_the_growth(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hotplug, "MEMORY_TIMEOUT_S", 0.2)
    machine = await site.start(**GROWTH)
    with pytest.raises(VmmError, match="took 0 of 64 MiB"):
        await machine.grow(128, 1)
    await machine.close()


# --------------------------------------------------------------------------------------- plugging


@contextmanager
def opened(directory: Path, name: str, size: int = 1 << 20, mode: int = os.O_RDWR) -> Iterator[int]:
    """A new file, which QEMU's user may not open."""
    path = directory / name
    path.touch(mode=0o600)
    os.truncate(path, size)
    fd = os.open(path, mode | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


async def plugging(site: Site) -> Machine | None:
    """A VM with slots for a NIC and two disks. None: the driver cannot plug, and refuses to."""
    machine = await site.start(**GROWTH)
    if site.supports(Feature.PLUG):
        return machine
    disk = DiskSpec(serial="d")
    with unsupported(site, Feature.PLUG):
        await machine.plug(disk, -1)
    with unsupported(site, Feature.PLUG):
        await machine.unplug(disk)
    with unsupported(site, Feature.PLUG):
        await machine.resize_disk(disk, 1 << 20)
    return None


async def test_disks_are_plugged_resized_and_unplugged(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest of this suite releases no device, so what is unplugged stays there, and fails."""
    monkeypatch.setattr(devices, "UNPLUG_TIMEOUT_S", 0.2)
    machine = await plugging(site)
    if machine is None:
        return
    root, scratch = DiskSpec(serial="root", readonly=True), DiskSpec(serial="scratch-1")
    with opened(tmp_path, "root", mode=os.O_RDONLY) as fd:
        await machine.plug(root, fd)
        os.fstat(fd)  # still open: it belongs to the caller
    with opened(tmp_path, "scratch", 3 << 20) as fd:
        await machine.plug(scratch, fd)
    described = await machine.describe()
    assert (described["disk.root"], described["disk.scratch-1"]) == (f"{1 << 20} ro", f"{3 << 20} rw")
    await machine.resize_disk(scratch, 4 << 20)
    assert (await machine.describe())["disk.scratch-1"] == f"{4 << 20} rw"
    with opened(tmp_path, "third") as fd, pytest.raises(VmmError, match="more than"):
        await machine.plug(DiskSpec(serial="third"), fd)
    # another daemon attaches and goes on
    await machine.close()
    machine = await site.hypervisor.attach(machine.handle)
    for disk in (scratch, root):
        for _ in range(2):
            await machine.unplug(disk)
    assert not [name for name in await machine.describe() if name.startswith("disk.")]
    descriptors = [fd.readlink() for fd in Path(f"/proc/{machine.handle.vmm.pid}/fd").iterdir()]
    assert not [path for path in descriptors if tmp_path in path.parents and path.name in ("root", "scratch")]
    await machine.unplug(DiskSpec(serial="never"))
    await machine.close()


async def test_disk_that_cannot_be_plugged_leaves_nothing(site: Site, tmp_path: Path) -> None:
    machine = await plugging(site)
    if machine is None:
        return
    null = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(VmmError, match="neither a block device"):
        await machine.plug(DiskSpec(serial="null", readonly=True), null)
    os.close(null)
    with opened(tmp_path, "plain") as fd:
        for serial in ("a,share-rw=on", "a" * 21, ""):
            with pytest.raises(InvalidSpec, match="serial"):
                await machine.plug(DiskSpec(serial=serial), fd)
        with pytest.raises(VmmError):
            await machine.plug(DiskSpec(serial="closed"), 1 << 20)
        await machine.plug(DiskSpec(serial="plain"), fd)
        with pytest.raises(VmmError):
            await machine.plug(DiskSpec(serial="plain"), fd)
    await machine.close()


def another_share(site: Site) -> ShareSpec:
    source = site.run_dir / "share" / "more"
    source.mkdir()
    return ShareSpec(tag="more", source=str(source), cache="none")


async def test_share_that_is_added_ends_with_the_vm_and_its_end_is_seen(site: Site) -> None:
    machine, share = await site.start(), another_share(site)
    if not site.supports(Feature.PLUG):
        with unsupported(site, Feature.PLUG):
            await machine.add_share(share)
        return
    before = machine.handle
    end = asyncio.create_task(machine.wait())
    await asyncio.sleep(0)  # it waits for the helpers that there are
    handle = await machine.add_share(share)
    assert await machine.add_share(share) == handle == machine.handle
    assert process.alive(handle.helpers["more"]) and handle.spec.shares[-1] == share
    # a daemon that was killed before it saved the handle is followed by one that finds the share again
    await machine.close()
    another = await site.hypervisor.attach(before)
    assert await another.add_share(share) == handle
    await another.close()
    await process.kill(handle.helpers["more"])
    assert "virtiofsd for more ended" in await asyncio.wait_for(end, DEADLINE_S)


async def test_share_that_cannot_be_added_leaves_nothing(site: Site) -> None:
    machine = await site.start()
    if not site.supports(Feature.PLUG):
        return
    before, processes = machine.handle, len(site.processes())
    missing = ShareSpec(tag="more", source=str(site.run_dir / "share" / "missing"), cache="none")
    for wrong in (missing, msgspec.structs.replace(missing, tag="a,b")):
        with pytest.raises((VmmError, InvalidSpec)):
            await machine.add_share(wrong)
    assert machine.handle == before
    await eventually(lambda: len(site.processes()), until=lambda count: count == processes)
    assert "more" in (await machine.add_share(another_share(site))).helpers
    await machine.close()


async def test_nic_beyond_the_spec_is_rejected(site: Site) -> None:
    machine = await site.start()  # none beyond those of its start
    if not site.supports(Feature.PLUG):
        return
    with pytest.raises(VmmError, match="more than"):
        await machine.plug(NicSpec(mac="02:00:00:00:00:02"), -1)
    await machine.close()


# -------------------------------------------------------------------------------------- templates


async def save(site: Site, directory: Path) -> bool:
    """Make a template of the site's guest, whose VM is gone afterwards. False: the driver refuses to."""
    if await site.refuses(Feature.SAVE, savable=True, shares=(), **GROWTH):
        assert await site.refuses(Feature.SAVE, template=str(directory), **GROWTH)
        machine = await site.start()
        with unsupported(site, Feature.SAVE):
            await machine.save(directory)
        assert not directory.exists() and (await machine.describe())["state"] == "running"
        return False
    machine = await site.start(savable=True, shares=(), **GROWTH)
    await until_printed(machine, LINE)
    await machine.save(directory)
    await machine.close()
    await site.hypervisor.destroy(site.spec.pod_id, site.run_dir)
    assert site.processes() == []
    return True


async def test_template_is_restored_as_often_as_requested(site: Site, tmp_path: Path) -> None:
    if not await save(site, tmp_path / "template"):
        return
    Path(site.spec.kernel).unlink()  # a restored VM needs none
    for _ in range(2):
        (site.run_dir / "console.log").unlink()
        machine = await site.start(template=str(tmp_path / "template"), **GROWTH)
        assert set(machine.handle.helpers) == site.kit.helpers(site.spec)
        assert (await machine.describe())["state"] == "running"
        await until_printed(machine, LINE)
        await machine.close()
        await site.hypervisor.destroy(site.spec.pod_id, site.run_dir)
        assert site.processes() == []


@pytest.mark.parametrize("damage", ["state", "ram", "gone", "other-size"])
async def test_restore_of_a_damaged_template_leaves_nothing(site: Site, tmp_path: Path, damage: str) -> None:
    template = tmp_path / "template"
    if not await save(site, template):
        return
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
        await site.start(**{"template": str(template), **GROWTH, **changes})
    assert site.processes() == []
    await site.start()  # and nothing is in the way of the next


async def test_cancelled_restore_leaves_nothing(site: Site, tmp_path: Path) -> None:
    if not await save(site, tmp_path / "template"):
        return
    starting = asyncio.create_task(site.start(template=str(tmp_path / "template"), **GROWTH))
    async with asyncio.timeout(DEADLINE_S):
        while not (site.run_dir / "agent.sock").exists():
            await asyncio.sleep(0.002)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert site.processes() == []


async def test_fingerprint_covers_what_a_template_depends_on(site: Site) -> None:
    async def fingerprint(**changes: object) -> str:
        return await site.hypervisor.fingerprint(msgspec.structs.replace(site.spec, **changes))

    first = await fingerprint()
    same = {"pod_id": "other", "run_dir": "/elsewhere", "shares": (), "netns": "/n", "cgroups": ()}
    assert await fingerprint(**same) == first
    for changes in ({"memory_mib": 128}, {"vcpus": 2}):
        assert await fingerprint(**changes) != first
    site.guest("another guest")
    assert await fingerprint() != first
    with pytest.raises(MissingProgram, match="husk guest build"):
        await fingerprint(kernel="/nonexistent/vmlinux")


# ------------------------------------------------------------------------------------------- host


async def test_host_of_each_driver_reports_version_accelerators_and_checks(site: Site) -> None:
    host = find_host(site.name)
    assert await host.version()
    *_, last = host.candidates()
    assert not last.trial and last.reason, "the last candidate is believed to work"
    findings = [await check.run() for check in host.checks()]
    assert findings and all(finding.detail for finding in findings)
    for accelerator in ("auto", site.kit.ACCELERATOR):
        host.check(accelerator, {})
    with pytest.raises(InvalidSpec) as refused:
        host.check("magic", {})
    assert refused.value.field == "accelerator"
    with pytest.raises(InvalidSpec, match="options"):
        host.check("auto", site.kit.UNKNOWN_OPTIONS)


@pytest.mark.parametrize("site", ["qemu"], indirect=True)
async def test_qemu_names_a_machine_type_that_does_not_exist(site: Site) -> None:
    with pytest.raises(VmmError, match="machine type"):
        await site.start(options={"machine": "no-such-machine"})
    assert site.processes() == []


@pytest.mark.parametrize("site", ["qemu"], indirect=True)
async def test_qemu_fingerprint_covers_the_accelerator(site: Site) -> None:
    kvm = msgspec.structs.replace(site.spec, accelerator="kvm")
    assert await site.hypervisor.fingerprint(kvm) != await site.hypervisor.fingerprint(site.spec)
