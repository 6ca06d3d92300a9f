"""Limits as files of cgroup v2."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.errors import InvalidSpec
from sandbox.plan.resources import compile_resources, merge_resources, weight_of_shares
from sandbox.spec import Resources


def files(resources: Resources, *, vcpus: int = 0) -> dict[str, str]:
    return {file.name: file.value for file in compile_resources(resources, vcpus=vcpus)}


def test_no_limits_write_no_file() -> None:
    assert files(Resources()) == {}


@pytest.mark.parametrize("value", ["0", "1"])
def test_oom_group_is_written_only_where_it_is_asked_for(value: str) -> None:
    assert "memory.oom.group" not in files(Resources(memory_limit=4096, oom_score_adj=5))
    assert files(Resources(unified={"memory.oom.group": value}))["memory.oom.group"] == value


@pytest.mark.parametrize(
    ("resources", "name", "value"),
    [
        (Resources(cpu_quota=50_000), "cpu.max", "50000 100000"),
        (Resources(cpu_quota=50_000, cpu_period=20_000), "cpu.max", "50000 20000"),
        (Resources(cpu_quota=-1), "cpu.max", "max 100000"),
        (Resources(cpu_shares=1024), "cpu.weight", "39"),
        (Resources(memory_limit=4096), "memory.max", "4096"),
        (Resources(memory_limit=-1), "memory.max", "max"),
        (Resources(memory_limit=4096, memory_swap_limit=4096), "memory.swap.max", "0"),
        (Resources(memory_limit=4096, memory_swap_limit=8192), "memory.swap.max", "4096"),
        (Resources(memory_swap_limit=-1), "memory.swap.max", "max"),
        (Resources(cpuset_cpus="0-2,5"), "cpuset.cpus", "0-2,5"),
        (Resources(cpuset_mems="0"), "cpuset.mems", "0"),
        (Resources(hugepage_limits={"1GB": 1 << 30}), "hugetlb.1GB.max", str(1 << 30)),
        (Resources(unified={"memory.oom.group": "0"}), "memory.oom.group", "0"),
        (Resources(memory_limit=4096, unified={"memory.max": "8192"}), "memory.max", "8192"),
    ],
)
def test_every_field_is_a_file_of_the_cgroup(resources: Resources, name: str, value: str) -> None:
    assert files(resources)[name] == value


def test_hugepage_limit_of_zero_is_left_out() -> None:
    assert "hugetlb.1GB.max" not in files(Resources(hugepage_limits={"1GB": 0}))


@pytest.mark.parametrize(
    ("cpus", "vcpus", "sent"), [("0-1", 2, True), ("2-3", 2, False), ("0,7", 2, False), ("30", 0, True)]
)
def test_cpuset_with_cpus_that_the_guest_lacks_is_left_out(cpus: str, vcpus: int, sent: bool) -> None:
    assert ("cpuset.cpus" in files(Resources(cpuset_cpus=cpus), vcpus=vcpus)) is sent


@pytest.mark.parametrize(("shares", "weight"), [(2, 1), (1, 1), (262144, 10000), (1 << 40, 10000)])
def test_cpu_weight_at_the_ends_of_its_scale(shares: int, weight: int) -> None:
    assert weight_of_shares(shares) == weight


@pytest.mark.parametrize(
    ("resources", "field"),
    [
        (Resources(cpu_period=10), "cpu_period"),
        (Resources(cpu_period=2_000_000), "cpu_period"),
        (Resources(cpu_quota=10), "cpu_quota"),
        (Resources(cpu_shares=-5), "cpu_shares"),
        (Resources(memory_limit=8192, memory_swap_limit=4096), "memory_swap_limit_in_bytes"),
        (Resources(memory_swap_limit=4096), "memory_swap_limit_in_bytes"),
        (Resources(cpuset_cpus="1-"), "cpuset_cpus"),
        (Resources(cpuset_cpus="3-1"), "cpuset_cpus"),
        (Resources(cpuset_mems="zero"), "cpuset_mems"),
        (Resources(hugepage_limits={"2MB/../../x": 1}), "hugepage_limits"),
        (Resources(unified={"../memory.max": "1"}), "unified['../memory.max']"),
        (Resources(unified={"cgroup.procs": "1"}), "unified['cgroup.procs']"),
        (Resources(unified={"memory": "1"}), "unified['memory']"),
        (Resources(unified={"memory.max": ""}), "unified['memory.max']"),
        (Resources(unified={"memory.max": "1\0"}), "unified['memory.max']"),
    ],
)
def test_invalid_limit_is_rejected_with_its_field(resources: Resources, field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        compile_resources(resources)
    assert caught.value.field == f"config.linux.resources.{field}"


@given(st.text(), st.text())
def test_unified_entry_never_leaves_the_containers_directory(name: str, value: str) -> None:
    try:
        compiled = compile_resources(Resources(unified={name: value}))
    except InvalidSpec:
        return
    assert all("/" not in file.name and "\0" not in file.value for file in compiled)


@given(st.integers(2, 262144), st.integers(2, 262144))
def test_more_cpu_shares_never_weigh_less(one: int, other: int) -> None:
    assert (weight_of_shares(min(one, other)) <= weight_of_shares(max(one, other))) and weight_of_shares(
        one
    ) >= 1


@pytest.mark.parametrize(
    ("resources", "field"),
    [
        (Resources(memory_limit=4096, memory_swap_limit=8192), "memory_swap_limit_in_bytes"),
        (Resources(unified={"memory.swap.max": "4096"}), "unified['memory.swap.max']"),
        (Resources(unified={"memory.swap.high": "1"}), "unified['memory.swap.high']"),
    ],
)
def test_swap_is_refused_in_a_guest_and_allowed_on_the_host(resources: Resources, field: str) -> None:
    with pytest.raises(InvalidSpec, match="a VM has no swap") as caught:
        compile_resources(resources, vcpus=1)
    assert caught.value.field == f"config.linux.resources.{field}"
    assert files(resources)


@pytest.mark.parametrize(
    "resources",
    [
        Resources(memory_limit=4096, memory_swap_limit=4096),
        Resources(memory_limit=4096, memory_swap_limit=-1),
        Resources(memory_limit=-1, memory_swap_limit=-1),
        Resources(unified={"memory.swap.max": "0"}),
        Resources(unified={"memory.swap.max": "max"}),
    ],
)
def test_no_swap_or_no_limit_of_it_is_accepted_in_a_guest(resources: Resources) -> None:
    assert "memory.swap.max" in files(resources, vcpus=1)


@pytest.mark.parametrize("before", [8192, 4096, -1])
@pytest.mark.parametrize("limit", [16384, 1024])
def test_memory_alone_after_swap_leaves_no_swap(before: int, limit: int) -> None:
    current = Resources(memory_limit=4096, memory_swap_limit=before)
    merged = merge_resources(current, Resources(memory_limit=limit))
    assert (merged.memory_limit, merged.memory_swap_limit) == (limit, limit)
    assert files(merged, vcpus=1) == {"memory.max": str(limit), "memory.swap.max": "0"}


def test_memory_without_limit_after_swap_has_no_limit_of_swap() -> None:
    merged = merge_resources(Resources(memory_limit=4096, memory_swap_limit=8192), Resources(memory_limit=-1))
    assert files(merged) == {"memory.max": "max", "memory.swap.max": "max"}


def test_other_limits_leave_swap_as_it_is() -> None:
    current = Resources(memory_limit=4096, memory_swap_limit=8192)
    assert merge_resources(current, Resources(cpu_quota=5000)).memory_swap_limit == 8192
    both = merge_resources(current, Resources(memory_limit=1024, memory_swap_limit=2048))
    assert (both.memory_limit, both.memory_swap_limit) == (1024, 2048)
    never = merge_resources(Resources(memory_limit=4096), Resources(memory_limit=1024))
    assert never.memory_swap_limit == 0
