"""Cost of booting a guest image: `python -m tests.bench.boot [--rounds N] IMAGE...`

An IMAGE is a directory as `husk guest build` prints it. Each round boots every image once, in turn, with the
devices of a pod (two shares, no NIC); the machine should be idle otherwise. Times are milliseconds from the
start of QEMU to the agent's Welcome. "cpu" is the processor time of QEMU until then, "touched" the guest RAM
that was written or read, "qemu" QEMU's other memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from sandbox.guest.client import GuestClient
from sandbox.host.proc import read_stat
from sandbox.vmm import ShareSpec, VmHandle, VmSpec
from sandbox.vmm.drivers import find_hypervisor
from tests.bench.memory import pss_mib

MEMORY_MIB = 256
BOOT_TIMEOUT_S = 60.0
COLUMNS = (
    "qemu_ms",
    "firmware_ms",
    "kernel_ms",
    "modules_ms",
    "agent_ms",
    "total_ms",
    "cpu_ms",
    "touched_mib",
    "qemu_mib",
)


def make_spec(image: Path, run_dir: Path, options: argparse.Namespace) -> VmSpec:
    shares = []
    for tag, cache in (("rootfs", "always"), ("volumes", "auto")):
        (run_dir / tag).mkdir()
        shares.append(ShareSpec(tag=tag, source=str(run_dir / tag), cache=cache))
    return VmSpec(
        pod_id=f"boot{os.getpid()}",
        run_dir=str(run_dir),
        kernel=str(image / "vmlinux"),
        initramfs=str(image / "initramfs"),
        accelerator=options.accelerator,
        options={"cpu": options.cpu} if options.cpu else {},
        memory_mib=options.memory,
        vcpus=options.vcpus,
        kernel_args=tuple(options.arg),
        shares=tuple(shares),
    )


async def boot(image: Path, options: argparse.Namespace) -> dict[str, float]:
    """The figures of one boot. The VM is gone when this returns."""
    hypervisor = find_hypervisor("qemu")
    run_dir = Path(tempfile.mkdtemp(prefix="hb-"))
    run_dir.chmod(0o711)  # QEMU's user goes through it
    spec = make_spec(image, run_dir, options)
    begun = time.monotonic()
    try:
        machine = await hypervisor.start(spec, ())
        handle = machine.handle
        started = time.monotonic()
        client = await GuestClient.connect(
            handle.channel, token=bytes(16), epoch=1, on_event=lambda event: None, timeout_s=BOOT_TIMEOUT_S
        )
        total = time.monotonic() - begun
        held = measure(handle)
        phases = {phase.name: phase.at_ns / 1e6 for phase in client.welcome.phases}
        if options.console:
            print(machine.console_tail(), file=sys.stderr)
        await client.close()
        await machine.close()
    finally:
        await hypervisor.destroy(spec.pod_id, run_dir)
        shutil.rmtree(run_dir)
    qemu = (started - begun) * 1000
    return held | {
        "qemu_ms": qemu,
        # what is left: the guest's clock begins with its kernel
        "firmware_ms": total * 1000 - qemu - phases["channel"],
        "kernel_ms": phases["agent"],
        "modules_ms": phases["modules"] - phases["mounts"],
        "agent_ms": phases["channel"] - phases["modules"] + phases["mounts"] - phases["agent"],
        "total_ms": total * 1000,
    }


def measure(handle: VmHandle) -> dict[str, float]:
    """Processor time and memory of QEMU."""
    stat = read_stat(handle.vmm.pid)
    assert stat is not None
    ram, rest = pss_mib(handle.vmm.pid)
    for fd in Path(f"/proc/{handle.vmm.pid}/fd").iterdir():
        if "memfd:" in str(fd.readlink()):  # count pages that QEMU has not mapped too
            ram = fd.stat().st_blocks * 512 / (1 << 20)
    cpu_ms = stat.cpu_ticks * 1000 / os.sysconf("SC_CLK_TCK")
    return {"cpu_ms": cpu_ms, "touched_mib": ram, "qemu_mib": rest}


async def run_rounds(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    rounds: dict[str, dict[str, list[float]]] = {str(image): defaultdict(list) for image in options.images}
    for _ in range(options.rounds):
        for image in options.images:
            for name, value in (await boot(image, options)).items():
                rounds[str(image)][name].append(value)
    return {
        image: {name: round(statistics.median(values[name]), 1) for name in COLUMNS}
        for image, values in rounds.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.bench.boot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--accelerator", default="tcg")
    parser.add_argument("--cpu", default="", help="instead of the one that Husk chooses")
    parser.add_argument("--vcpus", type=int, default=1)
    parser.add_argument("--memory", type=int, default=MEMORY_MIB, metavar="MIB")
    parser.add_argument("--arg", action="append", default=[], help="one more for the kernel; may be repeated")
    parser.add_argument("--console", action="store_true", help="print the guest's console")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    medians = asyncio.run(run_rounds(options))
    if options.json:
        print(json.dumps(medians, indent=2))
        return 0
    print(
        f"median of {options.rounds} boots, {options.vcpus} CPU, {options.memory} MiB, {options.accelerator}"
    )
    print(" ".join(f"{name:>12}" for name in COLUMNS))
    for image, figures in medians.items():
        print(" ".join(f"{figures[name]:12.1f}" for name in COLUMNS), image)
    return 0


if __name__ == "__main__":
    sys.exit(main())
