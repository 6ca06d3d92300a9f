"""What this machine has to give."""

from __future__ import annotations

import os

from sandbox.plan.vm import HostSize


def find_host_size() -> HostSize:
    """CPUs that this process may run on, and all memory in MiB."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return HostSize(memory_mib=pages >> 20, cpus=len(os.sched_getaffinity(0)))
