"""Limits of a container as files of its cgroup v2 directory. Pure.

Sources: Documentation/admin-guide/cgroup-v2.rst of the kernel; config-linux.md of the OCI
runtime-spec for the meaning of the CRI's fields, which are those of cgroup v1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sandbox.errors import InvalidSpec
from sandbox.plan.values import CgroupFile
from sandbox.spec import Resources

DEFAULT_PERIOD_US = 100_000
MIN_PERIOD_US = 1_000
MAX_PERIOD_US = 1_000_000
MIN_QUOTA_US = 1_000
MIN_SHARES = 2
MAX_SHARES = 262_144

_FIELD = "config.linux.resources"
_CONTROLLERS = ("cpu", "cpuset", "hugetlb", "io", "memory", "misc", "pids", "rdma")
# Without a slash or a leading dot: the name of a file in the container's directory.
_UNIFIED = re.compile(r"([a-z]+)(?:\.[A-Za-z0-9_]+)+", re.ASCII)
_PAGE_SIZE = re.compile(r"[1-9][0-9]*[KMGT]?B", re.ASCII)
_LIST = re.compile(r"[0-9]{1,5}(?:-[0-9]{1,5})?(?:,[0-9]{1,5}(?:-[0-9]{1,5})?)*", re.ASCII)
_MAX_VALUE_BYTES = 4096


def compile_resources(resources: Resources, *, vcpus: int = 0) -> tuple[CgroupFile, ...]:
    """Return the files in the order in which to write them. Raises InvalidSpec with the field.

    A cpuset names CPUs of the host, as the kubelet's CPU manager assigns those. With `vcpus`, those of the
    guest, a set that names CPUs or memory nodes which the guest does not have is left out, as the guest's
    kernel would reject it, and swap is refused, which no guest has. `unified` comes last and overrides the
    dedicated fields. An OOM kill ends one process, unless `unified` sets memory.oom.group.
    """
    files = _cpu(resources)
    files |= _memory(resources)
    if vcpus:
        _refuse_swap(resources)
    files |= _cpusets(resources, vcpus)
    files |= _hugepages(resources)
    for name, value in resources.unified.items():
        _check_unified(name, value)
        files.pop(name, None)
        files[name] = value
    return tuple(
        CgroupFile(name=name, value=line)
        for name, value in files.items()
        for line in value.split("\n")  # io.max, for one, takes a line per write
        if line.strip()
    )


def merge_resources(current: Resources, requested: Resources) -> Resources:
    """Return `current` with what is requested.

    0 and "" mean "leave as it is" (CRI, LinuxContainerResources), but the limit of memory and swap together
    follows one of memory alone: as under containerd, no swap is left then.
    """
    changes = {
        name: value
        for name in Resources.__struct_fields__
        if (value := getattr(requested, name)) and name not in ("unified", "hugepage_limits")
    }
    if requested.memory_limit and current.memory_swap_limit:
        changes.setdefault("memory_swap_limit", requested.memory_limit)
    return Resources(
        **{name: getattr(current, name) for name in Resources.__struct_fields__}
        | changes
        | {
            "unified": current.unified | requested.unified,
            "hugepage_limits": current.hugepage_limits | requested.hugepage_limits,
        }
    )


def weight_of_shares(shares: int) -> int:
    """Return cpu.weight (1 to 10000) for cpu.shares (2 to 262144), linearly, as all OCI runtimes do."""
    bounded = min(max(shares, MIN_SHARES), MAX_SHARES)
    return 1 + (bounded - MIN_SHARES) * 9999 // (MAX_SHARES - MIN_SHARES)


def _cpu(resources: Resources) -> dict[str, str]:
    files = {}
    period = resources.cpu_period or DEFAULT_PERIOD_US
    if not MIN_PERIOD_US <= period <= MAX_PERIOD_US:
        raise InvalidSpec(
            f"{_FIELD}.cpu_period", f"{period} is out of range", f"{MIN_PERIOD_US} to {MAX_PERIOD_US} us"
        )
    if 0 < resources.cpu_quota < MIN_QUOTA_US:
        raise InvalidSpec(
            f"{_FIELD}.cpu_quota", f"{resources.cpu_quota} is too small", f"{MIN_QUOTA_US} us or more, or -1"
        )
    if resources.cpu_quota or resources.cpu_period:
        quota = str(resources.cpu_quota) if resources.cpu_quota > 0 else "max"
        files["cpu.max"] = f"{quota} {period}"
    if resources.cpu_shares < 0:
        raise InvalidSpec(f"{_FIELD}.cpu_shares", f"{resources.cpu_shares} is negative", "2 to 262144")
    if resources.cpu_shares:
        files["cpu.weight"] = str(weight_of_shares(resources.cpu_shares))
    return files


def _memory(resources: Resources) -> dict[str, str]:
    files = {}
    limit, total = resources.memory_limit, resources.memory_swap_limit
    if limit:
        files["memory.max"] = "max" if limit < 0 else str(limit)
    if total < 0:
        files["memory.swap.max"] = "max"
    elif total:
        # The CRI counts memory and swap together, cgroup v2 swap alone.
        if limit <= 0 or total < limit:
            raise InvalidSpec(
                f"{_FIELD}.memory_swap_limit_in_bytes",
                f"{total} is below memory_limit_in_bytes {limit}, or given without it",
                "memory and swap together",
            )
        files["memory.swap.max"] = str(total - limit)
    return files


def _refuse_swap(resources: Resources) -> None:
    """Raise InvalidSpec for swap that a guest would have to have. No limit (-1, "max") asks for none."""
    limit, total = resources.memory_limit, resources.memory_swap_limit
    if total > limit > 0:
        raise InvalidSpec(
            f"{_FIELD}.memory_swap_limit_in_bytes",
            f"{total} is {total - limit} more than memory_limit_in_bytes, and a VM has no swap",
            f"{limit}, the memory limit; or -1",
        )
    for name in ("memory.swap.max", "memory.swap.high"):
        value = resources.unified.get(name, "max").strip()
        if value not in ("0", "max"):
            raise InvalidSpec(f"{_FIELD}.unified['{name}']", f"{value!r}: a VM has no swap", "0 or max")


def _cpusets(resources: Resources, vcpus: int) -> dict[str, str]:
    cpus = members(resources.cpuset_cpus, "cpuset_cpus")
    nodes = members(resources.cpuset_mems, "cpuset_mems")
    files = {}
    if cpus and (not vcpus or max(cpus) < vcpus):
        files["cpuset.cpus"] = resources.cpuset_cpus
    if nodes and (not vcpus or max(nodes) == 0):
        files["cpuset.mems"] = resources.cpuset_mems
    return files


def members(text: str, name: str) -> Sequence[int]:
    """Return the numbers of a list such as "0-3,7" (cpuset(7), "List format"); "" has none.

    Raises InvalidSpec with the field of this name.
    """
    if not text:
        return ()
    if not _LIST.fullmatch(text):
        raise InvalidSpec(f"{_FIELD}.{name}", f"{text!r} is not a list", "such as 0-3,7")
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise InvalidSpec(f"{_FIELD}.{name}", f"{part!r} ends before it begins", "such as 0-3,7")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _hugepages(resources: Resources) -> dict[str, str]:
    files = {}
    for size, limit in resources.hugepage_limits.items():
        if not _PAGE_SIZE.fullmatch(size):
            raise InvalidSpec(
                f"{_FIELD}.hugepage_limits", f"page size {size!r} is malformed", "such as 2MB or 1GB"
            )
        # Clients send 0 for each page size of the host, which the guest's kernel may not support.
        if limit > 0:
            files[f"hugetlb.{size}.max"] = str(limit)
            # or a mapping beyond the limit succeeds, and touching it raises SIGBUS
            files[f"hugetlb.{size}.rsvd.max"] = str(limit)
    return files


def _check_unified(name: str, value: str) -> None:
    field = f"{_FIELD}.unified[{name!r}]"
    match = _UNIFIED.fullmatch(name)
    if match is None or match[1] not in _CONTROLLERS:
        raise InvalidSpec(
            field,
            "is not a file of a cgroup v2 controller",
            f"<controller>.<file> of {', '.join(_CONTROLLERS)}",
        )
    if not value.strip() or "\0" in value or len(value.encode("utf-8", "replace")) > _MAX_VALUE_BYTES:
        raise InvalidSpec(
            field, "the value is empty, too long or has a zero byte", "what the kernel's file takes"
        )
