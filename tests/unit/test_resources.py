"""Limits as files of cgroup v2."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.errors import InvalidSpec
from sandbox.plan.resources import compile_resources, weight_of_shares
from sandbox.spec import Resources


def files(resources: Resources, *, vcpus: int = 0) -> dict[str, str]:
    return {file.name: file.value for file in compile_resources(resources, vcpus=vcpus)}


def test_no_limits_set_the_oom_group_alone() -> None:
    assert files(Resources()) == {"memory.oom.group": "1"}


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
