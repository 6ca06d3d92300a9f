"""The size that a VM needs for new limits."""

from __future__ import annotations

import pytest

from sandbox.errors import InvalidSpec
from sandbox.plan import grown_size
from sandbox.spec import Resources, VmSize

MIB = 1 << 20
SMALL = VmSize(memory_mib=256, vcpus=1)


def limits(memory_mib: int = 0, cpus: float = 0) -> Resources:
    return Resources(memory_limit=memory_mib * MIB, cpu_quota=int(cpus * 100_000))


@pytest.mark.parametrize(
    ("pod", "containers", "size"),
    [
        (limits(), [], (256, 1)),
        (limits(), [limits(100, 0.5)], (256, 1)),  # 100 and 128 for the guest fit
        (limits(), [limits(100, 0.6), limits(100, 0.6)], (328, 2)),
        (limits(), [limits(), limits(100)], (256, 1)),  # no limit needs nothing
        (limits(1000, 3.5), [limits(100)], (1128, 4)),
        (limits(100), [limits(500), limits(500)], (1128, 1)),
        (limits(), [Resources(memory_limit=-1, cpu_quota=-1)], (256, 1)),
        (limits(cpus=4000), [], (256, 255)),
    ],
)
def test_size_grows_to_limits_of_pod_and_containers(
    pod: Resources, containers: list[Resources], size: tuple[int, int]
) -> None:
    grown = grown_size(SMALL, pod, Resources(), containers)
    assert (grown.memory_mib, grown.vcpus) == size


def test_size_never_shrinks() -> None:
    large = VmSize(memory_mib=4096, vcpus=8)
    assert grown_size(large, limits(10, 1), Resources(), [limits(10, 1)]) == large


def huge(mib: float, memory_mib: int = 0) -> Resources:
    pages = {"2MB": int(mib * MIB), "1GB": 0}
    return Resources(hugepage_limits=pages, memory_limit=memory_mib * MIB)


def test_huge_pages_are_added_and_rounded_up() -> None:
    size = grown_size(SMALL, limits(), Resources(), [huge(63), huge(0.1)])
    assert (size.memory_mib, size.huge_mib) == (256 + 66, 66)
    # a larger memory limit leaves the huge pages; then more of these
    size = grown_size(size, limits(1000), Resources(), [huge(63)])
    assert (size.memory_mib, size.huge_mib) == (1128 + 66, 66)
    size = grown_size(size, huge(200, 1000), Resources(), [huge(10)])
    assert (size.memory_mib, size.huge_mib) == (1128 + 200, 200)


def test_limit_in_gigantic_pages_is_rejected() -> None:
    gigantic = Resources(hugepage_limits={"1GB": 1 << 30})
    with pytest.raises(InvalidSpec, match=r"hugepage_limits.*1GB"):
        grown_size(SMALL, limits(), Resources(), [gigantic])


def test_declared_overhead_is_added() -> None:
    grown = grown_size(SMALL, limits(1000, 1), limits(300, 0.5), [])
    assert (grown.memory_mib, grown.vcpus) == (1300, 2)
