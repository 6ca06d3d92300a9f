"""CPU time and memory of processes are read from /proc and summed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.host.process import ProcessIdentity
from sandbox.stats.host_usage import host_usage, process_usage
from sandbox.vmm import VmHandle, VmSpec

MIB = 1 << 20
# holds 30 MiB of private and 50 MiB of shared memory, uses 0.2 s of CPU time, and then prints "ready"
HOLDER = """
import mmap, sys, time
own = bytearray(b"x" * (30 << 20))
shared = mmap.mmap(-1, 50 << 20)
shared.write(b"y" * (50 << 20))
end = time.process_time() + 0.2
while time.process_time() < end: pass
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == b"ready\n"
        yield child
        child.stdin.close()


def handle(pid: int, *helpers: int) -> VmHandle:
    spec = VmSpec(
        pod_id="p",
        run_dir="/r",
        kernel="",
        initramfs="",
        accelerator="tcg",
        memory_mib=1,
        vcpus=1,
    )
    return VmHandle(
        hypervisor="fake",
        spec=spec,
        vmm=ProcessIdentity(pid=pid, start_time=1, boot_id="b"),
        helpers={str(one): ProcessIdentity(pid=one, start_time=1, boot_id="b") for one in helpers},
        channel="",
    )


def test_private_and_shared_memory_are_counted_separately(holder: subprocess.Popen[bytes]) -> None:
    usage = process_usage([holder.pid])
    assert 30 * MIB <= usage.own_bytes < 75 * MIB
    assert 50 * MIB <= usage.shared_bytes < 55 * MIB
    assert 0.1 < usage.cpu_seconds < 5


def test_shared_memory_counts_once_and_not_as_overhead(holder: subprocess.Popen[bytes]) -> None:
    usage = host_usage(handle(holder.pid, os.getpid()), ())
    assert usage.guest_memory_bytes == process_usage([holder.pid]).shared_bytes
    assert usage.overhead_memory_bytes == usage.vmm.own_bytes + usage.helpers.own_bytes
    assert usage.helpers.own_bytes > MIB


def test_children_of_helpers_are_found_by_their_cgroup(
    holder: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n{holder.pid}\n")
    usage = host_usage(handle(os.getpid()), (str(tmp_path), "/never/read"))
    assert usage.helpers.own_bytes >= 30 * MIB


def test_exited_process_counts_zero(holder: subprocess.Popen[bytes], tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    assert process_usage([holder.pid]).own_bytes == 0
    gone = host_usage(handle(holder.pid), (str(tmp_path / "gone"),))
    assert (gone.guest_memory_bytes, gone.overhead_memory_bytes) == (0, 0)
