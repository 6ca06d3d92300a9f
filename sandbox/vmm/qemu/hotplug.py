"""Adding resources to a running QEMU: hot-plugged CPUs, and memory of its virtio-mem device.

Both take totals and are idempotent; nothing is ever removed.
"""

from __future__ import annotations

import asyncio
import time

from sandbox.errors import VmmError
from sandbox.vmm.qemu.argv import GROWING
from sandbox.vmm.qemu.qmp import Monitor

MEMORY_TIMEOUT_S = 10.0
BLOCK = 2 << 20  # granularity of virtio-mem on x86 with transparent huge pages
_POLL_S = 0.005


async def plug_cpus(monitor: Monitor, count: int) -> None:
    """Plug in CPUs until there are `count` in all. Raises VmmError where there are not enough slots."""
    answer = await monitor.execute("query-hotpluggable-cpus")
    slots = [slot for slot in answer if isinstance(slot, dict)] if isinstance(answer, list) else []
    free = [slot for slot in slots if "qom-path" not in slot]
    missing = count - (len(slots) - len(free))
    if missing > len(free):
        raise VmmError(f"{count} CPUs are more than the {len(slots)} that this VM has slots for")
    # the guest numbers CPUs in the order of their slots, which QEMU lists in reverse
    for slot in list(reversed(free))[: max(0, missing)]:
        properties = slot["props"]
        name = f"cpu{properties['socket-id']}-{properties['core-id']}-{properties['thread-id']}"
        await monitor.execute("device_add", {"driver": slot["type"], "id": name, **properties})


async def add_memory(monitor: Monitor, size: int) -> None:
    """Add memory until there are `size` bytes beyond what the VM was started with. Raises VmmError when the
    guest has not accepted them within MEMORY_TIMEOUT_S."""
    if size <= 0:
        return
    path = f"/machine/peripheral/{GROWING}"
    size = -(-size // BLOCK) * BLOCK
    if await _number(monitor, path, "size") >= size:
        return
    await monitor.execute("qom-set", {"path": path, "property": "requested-size", "value": size})
    deadline = time.monotonic() + MEMORY_TIMEOUT_S
    while (added := await _number(monitor, path, "size")) < size:
        if time.monotonic() > deadline:
            raise VmmError(
                f"the guest took {added >> 20} of {size >> 20} MiB more within {MEMORY_TIMEOUT_S:g} s"
            )
        await asyncio.sleep(_POLL_S)


async def _number(monitor: Monitor, path: str, name: str) -> int:
    value = await monitor.execute("qom-get", {"path": path, "property": name})
    if not isinstance(value, int):
        raise VmmError(f"QEMU answers {value!r} for {name} of {path}")
    return value
