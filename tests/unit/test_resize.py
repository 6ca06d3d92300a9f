"""The size that a VM needs for new limits."""

from __future__ import annotations

import pytest

from sandbox.errors import BeyondNode, InvalidSpec
from sandbox.plan import grown_size
from sandbox.plan.vm import HostSize, check_growth, check_limits, within_node
from sandbox.spec import Resources, VmSize
from sandbox.vmm import VmSpec

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


@pytest.mark.parametrize(
    ("pod", "containers", "size"),
    [
        (limits(), [limits(100, 1), limits()], (100 + 256 + 128, 2)),
        (limits(), [limits(100, 1), limits(), limits()], (100 + 256 + 128, 2)),  # they share it
        (limits(), [limits(), limits()], (256, 1)),
        (limits(500, 2), [limits(100, 1), limits()], (628, 2)),  # the pod's limit bounds both
        (limits(100, 1), [limits(100, 1), limits()], (100 + 256 + 128, 2)),  # as a kubelet sends it
        (limits(), [limits(500), limits(500), limits(500)], (1628, 1)),
        (limits(), [limits(500, -1), limits(0, 2)], (500 + 256 + 128, 3)),
    ],
)
def test_container_without_a_limit_has_the_boot_size_beside_others(
    pod: Resources, containers: list[Resources], size: tuple[int, int]
) -> None:
    grown = grown_size(SMALL, pod, Resources(), containers, unlimited=SMALL)
    assert (grown.memory_mib, grown.vcpus) == size


NODE = HostSize(memory_mib=4000, cpus=2)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (limits(4001), r"memory_limit_in_bytes: 4001 MiB asked for; the node has 4000 MiB and 2 CPUs"),
        (limits(cpus=2.1), r"cpu_quota: 3 CPUs asked for; the node has 4000 MiB and 2 CPUs"),
        (limits(40_000, 4), "40000 MiB"),
    ],
)
def test_limit_beyond_the_node_is_refused_with_what_it_has(limit: Resources, words: str) -> None:
    with pytest.raises(BeyondNode, match=words):
        check_limits(limit, SMALL, NODE)


@pytest.mark.parametrize("limit", [limits(4000, 2), limits(-1, -1), limits()])
def test_limit_that_the_node_has_is_accepted(limit: Resources) -> None:
    check_limits(limit, SMALL, NODE)


def test_limit_that_the_vm_has_is_accepted_on_a_smaller_node() -> None:
    large = VmSize(memory_mib=9000, vcpus=8)
    check_limits(limits(9000, 8), large, NODE)
    assert within_node(large, large, NODE) == large


def test_limits_that_exceed_the_node_together_get_what_it_has() -> None:
    wanted = VmSize(memory_mib=9000, vcpus=6, huge_mib=2)
    assert within_node(wanted, SMALL, NODE) == VmSize(memory_mib=3968, vcpus=2, huge_mib=2)


def test_growth_beyond_the_vm_is_refused_with_what_it_can_have() -> None:
    spec = VmSpec(
        hypervisor="qemu",
        pod_id="p",
        run_dir="/",
        kernel="k",
        initramfs="i",
        accelerator="tcg",
        memory_mib=256,
        vcpus=1,
        max_memory_mib=1280,
        max_vcpus=2,
    )
    check_growth(spec, VmSize(memory_mib=1280, vcpus=2), NODE)
    with pytest.raises(BeyondNode, match="this VM can have 1280 MiB and 2 CPUs, the node 4000 MiB"):
        check_growth(spec, VmSize(memory_mib=1281, vcpus=2), NODE)
