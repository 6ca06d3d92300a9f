"""A QEMU that runs, just started or adopted: its verbs, what it says, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from sandbox.errors import DeadlineExceeded, VmmError
from sandbox.host import process
from sandbox.host.process import ProcessIdentity
from sandbox.host.tasks import end
from sandbox.vmm import NicSpec, VmHandle
from sandbox.vmm.console import Console, printable
from sandbox.vmm.qemu import hotplug, snapshot
from sandbox.vmm.qemu.argv import nic_device, port_name, process_name, share_device
from sandbox.vmm.qemu.qmp import Monitor

LOG_LIMIT = 256 << 10


class QemuMachine:
    """A running QEMU, just started or adopted."""

    def __init__(self, handle: VmHandle, monitor: Monitor, console: Console) -> None:
        self.handle = handle
        self._monitor = monitor
        self._console = console
        self._run_dir = Path(handle.spec.run_dir)
        self._trim = asyncio.create_task(_keep_short(self._run_dir / "qemu.log"), name="qemu-log")

    async def wait(self) -> str:
        status = await process.wait_exit(self.handle.vmm)
        await self._console.drain()
        reason = self._monitor.ending or "QEMU ended"
        if status is not None and status < 0:
            reason += f" (signal {-status})"
        elif status:
            reason += f" (status {status})"
        for tag, helper in self.handle.helpers.items():
            # They end with the connection; one that went first is the likely cause.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    ended = await process.wait_exit(helper)
                    reason += f"; virtiofsd for {tag} failed ({ended})" if ended else ""
        return reason + said(self._run_dir)

    # ----------------------------------------------------------------------------- verbs

    async def pause(self) -> None:
        await self._monitor.execute("stop")

    async def resume(self) -> None:
        await self._monitor.execute("cont")

    async def grow(self, memory_mib: int, vcpus: int) -> None:
        spec = self.handle.spec
        if memory_mib > max(spec.memory_mib, spec.max_memory_mib) or vcpus > max(spec.vcpus, spec.max_vcpus):
            raise VmmError(
                f"{memory_mib} MiB and {vcpus} CPUs are more than this VM can be given"
                f" ({spec.max_memory_mib} MiB, {spec.max_vcpus} CPUs)"
            )
        await hotplug.plug_cpus(self._monitor, vcpus)
        await hotplug.give_memory(self._monitor, (memory_mib - spec.memory_mib) << 20)

    async def plug_nic(self, number: int, nic: NicSpec, tap: int) -> None:
        name = f"net{number}"
        await self._monitor.pass_descriptor(name, tap)
        await self._monitor.execute("netdev_add", {"type": "tap", "id": name, "fd": name})
        device = nic_device(number, nic.mac, nic.mtu)
        await self._monitor.execute("device_add", device | {"bus": port_name(number)})

    async def restore(self) -> None:
        """Continue the template, and plug the shares in, which could not be saved with it.

        Raises VmmError, VmmGone, DeadlineExceeded, OSError.
        """
        spec = self.handle.spec
        await snapshot.restore(self._monitor, Path(spec.template))
        for number, share in enumerate(spec.shares):
            device = share_device(share.tag) | {"id": f"share-{share.tag}", "bus": port_name(number)}
            await self._monitor.execute("device_add", device)

    async def save(self, directory: Path) -> None:
        await snapshot.save(self._monitor, self._run_dir / snapshot.RAM, directory)

    def console_tail(self) -> str:
        return self._console.tail()

    async def describe(self) -> Mapping[str, str]:
        facts = {
            "hypervisor": "qemu",
            "accelerator": self.handle.spec.accelerator,
            "memoryMiB": str(self.handle.spec.memory_mib),
            "vcpus": str(self.handle.spec.vcpus),
            "pid": str(self.handle.vmm.pid),
        }
        facts |= {f"virtiofsd.{tag}.pid": str(helper.pid) for tag, helper in self.handle.helpers.items()}
        try:
            status = await self._monitor.execute("query-status")
            version = await self._monitor.execute("query-version")
        except (VmmError, DeadlineExceeded) as error:
            return facts | {"state": f"unknown: {error}"}
        if isinstance(status, dict):
            facts["state"] = str(status.get("status", ""))
        if isinstance(version, dict) and isinstance(version.get("qemu"), dict):
            numbers = version["qemu"]
            facts["version"] = ".".join(str(numbers.get(part)) for part in ("major", "minor", "micro"))
        return facts

    async def close(self) -> None:
        """Idempotent."""
        await end(self._trim)
        await self._monitor.close()
        await self._console.close()


async def end_all(pod_id: str, run_dir: Path) -> None:
    """End every process of a pod's VM, found by name alone.

    A virtiofsd may fork its child, which runs in namespaces of its own, between the look and the
    kill, so the last look is one that finds nothing. Raises DeadlineExceeded as `process.kill` does.
    """
    names = (process_name(pod_id), f"{run_dir}/")
    while found := await asyncio.to_thread(process.find_by_argument, *names):
        await kill_all(found)


async def kill_all(identities: list[ProcessIdentity]) -> None:
    """Kill them all before waiting for any. Raises the first failure once all have been tried."""
    results = await asyncio.gather(*(process.kill(i) for i in identities), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def said(run_dir: Path) -> str:
    """The end of what QEMU and its helpers wrote, as the tail of a message."""
    try:
        said = printable((run_dir / "qemu.log").read_bytes()[-4096:])
    except OSError:
        return ""
    return f": {said}" if said else ""


async def _keep_short(log: Path) -> None:
    """A guest can make QEMU complain without end. It writes at the end, so cutting is safe."""
    while True:
        await asyncio.sleep(30)
        with contextlib.suppress(OSError):
            _cut(log)


def _cut(log: Path) -> None:
    if log.stat().st_size > LOG_LIMIT:
        os.truncate(log, 0)
