"""What a pod costs the host: its guest's memory, and apart from that the VMM and its helpers.

Read from /proc and the pod's cgroup alone, so that any thread may ask, and no guest is needed. The
guest's RAM is shared memory that the VMM and each virtiofsd map, so resident sizes would count it
several times: here it is counted once, as the VMM's shared pages.
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
    cpu_seconds: float = 0
    own_bytes: int = 0  # resident, what is shared with others left out
    shared_bytes: int = 0


class HostUsage(Value, frozen=True, kw_only=True):
    """CPU time of the VMM includes what its guest ran."""

    guest_memory_bytes: int
    vmm: ProcessUsage
    helpers: ProcessUsage  # virtiofsd, with the children that it makes itself

    @property
    def overhead_memory_bytes(self) -> int:
        return self.vmm.own_bytes + self.helpers.own_bytes


def host_usage(vm: VmHandle, cgroups: Sequence[str]) -> HostUsage:
    """Of what lives in the pod's cgroup; a process that has ended counts as nothing.

    `cgroups`: the pod's directory in each hierarchy of the host; one of them tells enough.
    """
    pids = {identity.pid for identity in find_by_cgroup(cgroups[:1])}
    pids |= {vm.vmm.pid, *(identity.pid for identity in vm.helpers.values())}
    vmm = process_usage([vm.vmm.pid])
    return HostUsage(guest_memory_bytes=vmm.shared_bytes, vmm=vmm, helpers=process_usage(pids - {vm.vmm.pid}))


def process_usage(pids: Iterable[int]) -> ProcessUsage:
    """Of all together (proc(5), stat and status)."""
    ticks = own = shared = 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError, ValueError):
            stat = read_stat(pid)
            if stat is None:
                continue
            sizes = meminfo(Path(f"/proc/{pid}/status").read_bytes())
            ticks += stat.user_ticks + stat.system_ticks
            own += sizes.get(b"RssAnon", 0) + sizes.get(b"RssFile", 0)
            shared += sizes.get(b"RssShmem", 0)
    return ProcessUsage(cpu_seconds=ticks / os.sysconf("SC_CLK_TCK"), own_bytes=own, shared_bytes=shared)
