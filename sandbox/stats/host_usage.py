"""What a pod costs the host: the memory of its guest, and the overhead of the VMM and its helpers.

Read from /proc and the pod's cgroup alone, so that it works in any thread and without a guest. The guest's
RAM is shared memory that the VMM and each virtiofsd map, so the sum of resident sizes would count it several
times: here it is counted once, as the VMM's shared pages.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from sandbox.host.proc import read_stat
from sandbox.host.process import find_by_cgroup
from sandbox.spec import Value
from sandbox.stats.kernel_files import meminfo
from sandbox.vmm import VmHandle


class ProcessUsage(Value, frozen=True, kw_only=True):
    """Sums over some processes."""

    cpu_seconds: float = 0
    own_bytes: int = 0  # resident, without shared memory
    shared_bytes: int = 0


class HostUsage(Value, frozen=True, kw_only=True):
    """What one pod costs. The CPU time of the VMM includes that of its guest."""

    guest_memory_bytes: int
    vmm: ProcessUsage
    helpers: ProcessUsage  # virtiofsd and its own children

    @property
    def overhead_memory_bytes(self) -> int:
        """Memory of the VMM and its helpers beyond the guest's RAM."""
        return self.vmm.own_bytes + self.helpers.own_bytes


def host_usage(vm: VmHandle, cgroups: Sequence[str]) -> HostUsage:
    """Measure the processes of a VM and all others in the pod's cgroup. Blocking.

    `cgroups` are the pod's directories in the host's hierarchies, of which the first is read. A process that
    has exited counts 0.
    """
    pids = {identity.pid for identity in find_by_cgroup(cgroups[:1])}
    pids |= {vm.vmm.pid, *(identity.pid for identity in vm.helpers.values())}
    vmm = process_usage([vm.vmm.pid])
    return HostUsage(guest_memory_bytes=vmm.shared_bytes, vmm=vmm, helpers=process_usage(pids - {vm.vmm.pid}))


def process_usage(pids: Iterable[int]) -> ProcessUsage:
    """Sum over processes what proc(5) says in stat and status; those that have exited count 0."""
    ticks = own = shared = 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError, ValueError):
            stat = read_stat(pid)
            if stat is None:
                continue
            sizes = meminfo(Path(f"/proc/{pid}/status").read_bytes())
            ticks += stat.cpu_ticks
            own += sizes.get(b"RssAnon", 0) + sizes.get(b"RssFile", 0)
            shared += sizes.get(b"RssShmem", 0)
    return ProcessUsage(cpu_seconds=ticks / os.sysconf("SC_CLK_TCK"), own_bytes=own, shared_bytes=shared)
