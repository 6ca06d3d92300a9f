"""What the fakes of a VM have in common: every verb, none of which a test expects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sandbox.vmm import NicSpec, VmHandle


class StillMachine:
    """Runs, and nothing is done to it."""

    handle: VmHandle

    async def pause(self) -> None:
        raise NotImplementedError

    async def resume(self) -> None:
        raise NotImplementedError

    async def grow(self, memory_mib: int, vcpus: int) -> None:
        raise NotImplementedError

    async def plug_nic(self, number: int, nic: NicSpec, tap: int) -> None:
        raise NotImplementedError

    async def save(self, directory: Path) -> None:
        raise NotImplementedError

    def console_tail(self) -> str:
        return ""

    async def describe(self) -> Mapping[str, str]:
        return {}

    async def close(self) -> None: ...
