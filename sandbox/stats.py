"""Resource usage of containers, read from the guest's cgroup v2 files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sandbox.spec import ContainerId, Value

# What ReadCgroup is asked for, in this order; absent files come back empty.
FILES = ("cpu.stat", "memory.current", "memory.stat", "memory.max", "memory.swap.current", "pids.current")


class ContainerStats(Value, frozen=True, kw_only=True):
    """One container at one moment; times in nanoseconds, sizes in bytes."""

    container_id: ContainerId
    at_ns: int
    cpu_usage_ns: int = 0
    memory_usage: int = 0
    memory_working_set: int = 0  # usage less inactive file pages, as the kubelet reckons it
    memory_rss: int = 0
    memory_limit: int = 0  # 0: none
    page_faults: int = 0
    major_page_faults: int = 0
    swap_usage: int = 0
    pids: int = 0
    layer_bytes: int = 0
    layer_inodes: int = 0


def parse(
    container_id: ContainerId,
    at_ns: int,
    values: Sequence[bytes],
    *,
    layer_bytes: int = 0,
    layer_inodes: int = 0,
) -> ContainerStats:
    """Make sense of the contents of FILES. The guest is not trusted: what is no number counts as 0."""
    cpu_stat, current, stat, limit, swap, pids = values
    cpu = _table(cpu_stat)
    memory = _table(stat)
    usage = _number(current)
    return ContainerStats(
        container_id=container_id,
        at_ns=at_ns,
        cpu_usage_ns=cpu.get("usage_usec", 0) * 1000,
        memory_usage=usage,
        memory_working_set=max(0, usage - memory.get("inactive_file", 0)),
        memory_rss=memory.get("anon", 0),
        memory_limit=_number(limit),
        page_faults=memory.get("pgfault", 0),
        major_page_faults=memory.get("pgmajfault", 0),
        swap_usage=_number(swap),
        pids=_number(pids),
        layer_bytes=layer_bytes,
        layer_inodes=layer_inodes,
    )


def _table(text: bytes) -> dict[str, int]:
    return dict(_pairs(text.decode("ascii", "replace").splitlines()))


def _pairs(lines: Iterable[str]) -> Iterable[tuple[str, int]]:
    for line in lines:
        name, _, value = line.partition(" ")
        yield name, _number(value.encode())


def _number(text: bytes) -> int:
    text = text.strip()
    # 2**63 is beyond anything real and would not fit the wire's counters
    return min(int(text), 2**63 - 1) if text.isdigit() and len(text) < 20 else 0
