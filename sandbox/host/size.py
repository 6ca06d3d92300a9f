"""How much memory and how many CPUs this machine offers."""

from __future__ import annotations

import os


def memory_mib() -> int:
    """Return all memory of the machine in MiB, rounded down (sysconf(3), _SC_PHYS_PAGES)."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


def usable_cpus() -> int:
    """Return the number of CPUs that this process may run on (sched_getaffinity(2))."""
    return len(os.sched_getaffinity(0))
