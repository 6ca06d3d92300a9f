"""Giving a running QEMU more: CPUs that are plugged in, and memory of its virtio-mem device.

Both are asked for in whole and are idempotent: what is there already stays.
"""

from __future__ import annotations

import asyncio
import time

from sandbox.errors import VmmError
from sandbox.vmm.qemu.argv import GROWING
from sandbox.vmm.qemu.qmp import Monitor

MEMORY_TIMEOUT_S = 10.0
BLOCK = 2 << 20  # what virtio-mem gives at least, on x86 with huge pages
_POLL_S = 0.005


async def plug_cpus(monitor: Monitor, count: int) -> None:
    """At least `count` CPUs in all. Raises VmmError where there is no room for them."""
    answer = await monitor.execute("query-hotpluggable-cpus")
    slots = [slot for slot in answer if isinstance(slot, dict)] if isinstance(answer, list) else []
    free = [slot for slot in slots if "qom-path" not in slot]
    missing = count - (len(slots) - len(free))
    if missing > len(free):
        raise VmmError(f"{count} CPUs are more than the {len(slots)} that this VM has room for")
    # the guest numbers CPUs in the order of their slots, which QEMU lists backwards
    for slot in list(reversed(free))[: max(0, missing)]:
        properties = slot["props"]
        name = f"cpu{properties['socket-id']}-{properties['core-id']}-{properties['thread-id']}"
        await monitor.execute("device_add", {"driver": slot["type"], "id": name, **properties})


async def give_memory(monitor: Monitor, size: int) -> None:
    """`size` bytes on top of what it was started with. Raises VmmError when the guest does not take them."""
    if size <= 0:
        return
    path = f"/machine/peripheral/{GROWING}"
    size = -(-size // BLOCK) * BLOCK
    if await _number(monitor, path, "size") >= size:
        return
    await monitor.execute("qom-set", {"path": path, "property": "requested-size", "value": size})
    deadline = time.monotonic() + MEMORY_TIMEOUT_S
    while (given := await _number(monitor, path, "size")) < size:
        if time.monotonic() > deadline:
            raise VmmError(
                f"the guest took {given >> 20} of {size >> 20} MiB more within {MEMORY_TIMEOUT_S:g} s"
            )
        await asyncio.sleep(_POLL_S)


async def _number(monitor: Monitor, path: str, name: str) -> int:
    value = await monitor.execute("qom-get", {"path": path, "property": name})
    if not isinstance(value, int):
        raise VmmError(f"QEMU answers {value!r} for {name} of {path}")
    return value
