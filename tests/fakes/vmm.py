"""A machine that supports nothing, for fakes that are only started and described."""

from __future__ import annotations

from collections.abc import Mapping

from sandbox.vmm import Machine, VmHandle


class StillMachine(Machine):
    """Runs until a subclass says otherwise; every verb that a driver may lack raises Unsupported."""

    handle: VmHandle

    async def wait(self) -> str:
        raise NotImplementedError

    def console_tail(self) -> str:
        return ""

    async def describe(self) -> Mapping[str, str]:
        return {}

    async def close(self) -> None:
        return None
