"""What an engine samples of a pod: the text of its accounting files, and counts of what runs.

The engines read (a guest over the wire, the host itself); `sandbox.stats.parse` makes numbers of it. Files
have the names and the format of cgroup v2, whatever the engine reads them from.
"""

from __future__ import annotations

from collections.abc import Mapping

from sandbox.spec import Value

CGROUP_FILES = (
    "cpu.stat",
    "cpu.pressure",
    "memory.current",
    "memory.stat",
    "memory.max",
    "memory.peak",
    "memory.events",
    "memory.swap.current",
    "memory.swap.max",
    "memory.pressure",
    "pids.current",
    "pids.max",
    "io.stat",
    "io.pressure",
    "hugetlb.2MB.current",
    "hugetlb.1GB.current",
)


class ProcessCount(Value, frozen=True, kw_only=True):
    """What runs in a cgroup, nested ones included. `files` and `sockets` may be lower bounds."""

    processes: int = 0
    files: int = 0  # open descriptors; 0 unless they were asked for
    sockets: int = 0  # of these


class CgroupSample(Value, frozen=True, kw_only=True):
    """One cgroup: contents of CGROUP_FILES by name, empty where the kernel has no such file."""

    files: Mapping[str, bytes]
    count: ProcessCount = ProcessCount()


class UsageSample(Value, frozen=True, kw_only=True):
    """One pod at one moment."""

    wall_ns: int  # of the clock where it was sampled; 0: unknown
    pod: CgroupSample  # the cgroup that holds those of all containers
    containers: tuple[CgroupSample, ...]  # in the order of the request
    net_dev: bytes  # /proc/net/dev of the pod
    meminfo: bytes  # /proc/meminfo of the machine that the pod runs on
