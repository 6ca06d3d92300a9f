"""A running QEMU, just started or reattached to: its verbs, its output, and its exit."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sandbox.errors import DeadlineExceeded, VmmError
from sandbox.host import process
from sandbox.host.process import ProcessIdentity
from sandbox.host.tasks import end
from sandbox.vmm import Device, DiskSpec, Machine, ShareSpec, VmHandle, virtiofsd
from sandbox.vmm.console import Console, printable
from sandbox.vmm.qemu import devices, hotplug, shares, snapshot
from sandbox.vmm.qemu.argv import NAME, process_name
from sandbox.vmm.qemu.qmp import Monitor

LOG_LIMIT = 256 << 10
EXIT_GRACE_S = 0.2  # between the exit of a helper and that of QEMU, where QEMU's exit is the cause


class QemuMachine(Machine):
    """See `sandbox.vmm.Machine`. Owns the monitor and the console that it is given."""

    def __init__(
        self, handle: VmHandle, monitor: Monitor, console: Console, prober: virtiofsd.Prober
    ) -> None:
        self.handle = handle
        self._virtiofsd = prober
        self._added = asyncio.Event()  # a helper
        self._monitor = monitor
        self._console = console
        self._run_dir = Path(handle.spec.run_dir)
        self._plugging = asyncio.Lock()  # so that what a command is about is not changed by another
        self._trim = asyncio.create_task(_limit_log(self._run_dir / "qemu.log"), name="qemu-log")

    async def wait(self) -> str:
        """See RunningVm. The reason ends with the tail of QEMU's log.

        QEMU and the guest outlive a virtiofsd, but each access to its files blocks from then on.
        """
        vmm = asyncio.create_task(process.wait_exit(self.handle.vmm))
        helpers: dict[str, asyncio.Task[int | None]] = {}
        try:
            while not any(task.done() for task in (vmm, *helpers.values())):
                for tag, helper in self.handle.helpers.items():
                    if tag not in helpers:
                        helpers[tag] = asyncio.create_task(process.wait_exit(helper))
                self._added.clear()
                added = asyncio.create_task(self._added.wait())
                try:
                    await asyncio.wait({vmm, added, *helpers.values()}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    await end(added)
            # a helper exits with QEMU's connection, which closes shortly before QEMU has exited
            await asyncio.wait({vmm}, timeout=EXIT_GRACE_S)
            if not vmm.done():
                ends = [describe_end(tag, task.result()) for tag, task in helpers.items() if task.done()]
                return "; ".join(ends) + log_tail(self._run_dir)
        finally:
            await end(vmm, *helpers.values())
        return await self._describe_exit(vmm.result())

    async def _describe_exit(self, status: int | None) -> str:
        await self._console.drain()
        reason = self._monitor.ending or "QEMU exited"
        if status is not None and status < 0:
            reason += f" (signal {-status})"
        elif status:
            reason += f" (status {status})"
        for tag, helper in self.handle.helpers.items():
            # They exit with the connection; one that failed is the likely cause.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    ended = await process.wait_exit(helper)
                    reason += f"; virtiofsd for {tag} failed ({ended})" if ended else ""
        return reason + log_tail(self._run_dir)

    # ----------------------------------------------------------------------------- verbs

    async def pause(self) -> None:
        """See Pausable: QMP `stop`."""
        await self._monitor.execute("stop")

    async def resume(self) -> None:
        """See Pausable: QMP `cont`."""
        await self._monitor.execute("cont")

    async def grow(self, memory_mib: int, vcpus: int) -> None:
        """See Growable: virtio-mem for memory, device_add for CPUs."""
        spec = self.handle.spec
        if memory_mib > max(spec.memory_mib, spec.max_memory_mib) or vcpus > max(spec.vcpus, spec.max_vcpus):
            raise VmmError(
                f"{memory_mib} MiB and {vcpus} CPUs are more than this VM can have"
                f" ({spec.max_memory_mib} MiB, {spec.max_vcpus} CPUs)"
            )
        await hotplug.plug_cpus(self._monitor, vcpus)
        await hotplug.add_memory(self._monitor, (memory_mib - spec.memory_mib) << 20)

    async def plug(self, device: Device, fd: int) -> None:
        """See Growable and `devices`."""
        async with self._plugging:
            await devices.plug(self._monitor, self.handle.spec, device, fd)

    async def unplug(self, device: Device) -> None:
        """See Growable and `devices`."""
        async with self._plugging:
            await devices.unplug(self._monitor, device)

    async def resize_disk(self, disk: DiskSpec, size: int) -> None:
        """See Growable."""
        await devices.resize_disk(self._monitor, disk, size)

    async def add_share(self, share: ShareSpec) -> VmHandle:
        """See Growable and `shares`."""
        async with self._plugging:
            if share.tag not in self.handle.helpers:
                spec = self.handle.spec
                spec = msgspec.structs.replace(spec, shares=(*spec.shares, share))
                handle = msgspec.structs.replace(self.handle, spec=spec)
                if await shares.is_plugged(self._monitor, share.tag):
                    helper = await asyncio.to_thread(shares.find_added, handle, share.tag)
                else:
                    helper = await shares.add(self._monitor, await self._virtiofsd.find(), spec, share)
                self.handle = msgspec.structs.replace(handle, helpers={**handle.helpers, share.tag: helper})
                self._added.set()
        return self.handle

    async def restore(self) -> None:
        """Load the template's state, then plug in the shares, which could not be saved with it.

        Raises VmmError, VmmGone, DeadlineExceeded, OSError.
        """
        spec = self.handle.spec
        await snapshot.restore(self._monitor, Path(spec.template))
        for share in spec.shares:
            await devices.plug_share(self._monitor, share.tag)

    async def save(self, directory: Path) -> None:
        """See Savable and `snapshot`."""
        await snapshot.save(self._monitor, self._run_dir / snapshot.RAM, directory)

    def console_tail(self) -> str:
        """See RunningVm."""
        return self._console.tail()

    async def describe(self) -> Mapping[str, str]:
        """See RunningVm. `disk.SERIAL` is the size of each disk in bytes and its access mode."""
        facts = {
            "hypervisor": NAME,
            "accelerator": self.handle.spec.accelerator,
            "memoryMiB": str(self.handle.spec.memory_mib),
            "vcpus": str(self.handle.spec.vcpus),
            "pid": str(self.handle.vmm.pid),
        }
        facts |= {f"virtiofsd.{tag}.pid": str(helper.pid) for tag, helper in self.handle.helpers.items()}
        try:
            status = await self._monitor.execute("query-status")
            version = await self._monitor.execute("query-version")
            facts |= await devices.describe_disks(self._monitor)
        except (VmmError, DeadlineExceeded) as error:
            return facts | {"state": f"unknown: {error}"}
        if isinstance(status, dict):
            facts["state"] = str(status.get("status", ""))
        if isinstance(version, dict) and isinstance(version.get("qemu"), dict):
            numbers = version["qemu"]
            facts["version"] = ".".join(str(numbers.get(part)) for part in ("major", "minor", "micro"))
        return facts

    async def close(self) -> None:
        """See RunningVm."""
        await end(self._trim)
        await self._monitor.close()
        await self._console.close()


def describe_end(tag: str, status: int | None) -> str:
    """Return what to say of a virtiofsd that ended while QEMU runs. `status` is as of `process.wait_exit`."""
    how = "" if status is None else f" (signal {-status})" if status < 0 else f" (status {status})"
    return f"virtiofsd for {tag} ended{how}, and the guest cannot reach its files"


async def end_all(pod_id: str, run_dir: Path) -> None:
    """Kill every process of a pod's VM, found by name alone.

    A virtiofsd forks a child into other namespaces, possibly between the scan of /proc and the
    kill, so this repeats until a scan finds nothing. Raises DeadlineExceeded as `process.kill` does.
    """
    names = (process_name(pod_id), f"{run_dir}/")
    while found := await asyncio.to_thread(process.find_by_argument, *names):
        await kill_all(found)


async def kill_all(identities: list[ProcessIdentity]) -> None:
    """Kill all of them before waiting for any. Raises the first failure, after all have been tried."""
    results = await asyncio.gather(*(process.kill(i) for i in identities), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def log_tail(run_dir: Path) -> str:
    """Return ": " and the last 4 KiB that QEMU and its helpers wrote, for the end of a message; or ""."""
    try:
        text = printable((run_dir / "qemu.log").read_bytes()[-4096:])
    except OSError:
        return ""
    return f": {text}" if text else ""


async def _limit_log(log: Path) -> None:
    """Truncate the log every 30 s if it has grown beyond LOG_LIMIT, as a guest can make QEMU complain
    without end. Safe, as QEMU writes with O_APPEND."""
    while True:
        await asyncio.sleep(30)
        with contextlib.suppress(OSError):
            _truncate(log)


def _truncate(log: Path) -> None:
    if log.stat().st_size > LOG_LIMIT:
        os.truncate(log, 0)
