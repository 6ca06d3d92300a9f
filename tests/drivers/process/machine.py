"""A guest that runs as a process, just started or reattached to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from sandbox.host import process
from sandbox.vmm import Machine, VmHandle
from sandbox.vmm.console import LIMIT, printable


class ProcessMachine(Machine):
    """See `sandbox.vmm.Machine`; the verbs that are not overridden raise Unsupported."""

    def __init__(self, handle: VmHandle) -> None:
        self.handle = handle
        self._run_dir = Path(handle.spec.run_dir)

    async def wait(self) -> str:
        """See RunningVm. Helpers are waited for too: they exit with the guest."""
        status = await process.wait_exit(self.handle.vmm)
        await asyncio.gather(*(process.wait_exit(each) for each in self.handle.helpers.values()))
        reason = "the guest exited"
        if status is not None and status < 0:
            reason += f" (signal {-status})"
        elif status:
            reason += f" (status {status})"
        return reason + log_tail(self._run_dir)

    def console_tail(self) -> str:
        """See RunningVm."""
        return printable(_read_log(self._run_dir, LIMIT))

    async def describe(self) -> Mapping[str, str]:
        """See RunningVm."""
        running = process.alive(self.handle.vmm)
        facts = {
            "hypervisor": self.handle.hypervisor,
            "accelerator": self.handle.spec.accelerator,
            "pid": str(self.handle.vmm.pid),
            "state": "running" if running else "unknown: the process has exited",
        }
        return facts | {f"{name}.pid": str(each.pid) for name, each in self.handle.helpers.items()}

    async def close(self) -> None:
        """See RunningVm: there is no connection."""


def log_tail(run_dir: Path) -> str:
    """Return ": " and the last 4 KiB that the guest printed, or ""."""
    text = printable(_read_log(run_dir, 4096))
    return f": {text}" if text else ""


def _read_log(run_dir: Path, limit: int) -> bytes:
    try:
        return (run_dir / "console.log").read_bytes()[-limit:]
    except OSError:
        return b""
