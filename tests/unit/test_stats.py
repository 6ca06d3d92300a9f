"""Accounting files of a pod are parsed, also those of a guest that lies."""

from __future__ import annotations

from collections.abc import Sequence

from sandbox.spec import ContainerId, PodId
from sandbox.stats import parse
from sandbox.stats.kernel_files import (
    NUMBER_MAX,
    InterfaceUsage,
    IoUsage,
    Pressure,
    Psi,
    flat_keyed,
    io_stat,
    limit,
    meminfo,
    net_dev,
    number,
    psi,
)
from sandbox.usage import CGROUP_FILES, CgroupSample, ProcessCount, UsageSample

MIB = 1 << 20
CPU_STAT = b"""usage_usec 5000000
user_usec 3000000
system_usec 2000000
nr_periods 10
nr_throttled 4
throttled_usec 700000
"""
MEMORY_STAT = b"""anon 40000000
file 9000000
kernel 300000
file_mapped 800000
inactive_file 6000000
pgfault 123
pgmajfault 4
"""
PRESSURE = b"""some avg10=1.50 avg60=0.25 avg300=0.00 total=9000001
full avg10=0.10 avg60=0.00 avg300=0.00 total=42
"""
NET_DEV = b"""Inter-|   Receive | Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop
    lo:     999      9    0    0    0     0          0         0      999       9 0 0 0 0 0 0
  eth1: 1000 10 1 2 0 0 0 0 2000 20 3 4 0 0 0 0
  eth0:5 1 0 0 0 0 0 0 6 1 0 0 0 0 0 0
"""
MEMINFO = b"MemTotal:         250000 kB\nMemFree: 1 kB\nSwapFree:        1000 kB\n"

CONTAINER = {
    "cpu.stat": CPU_STAT,
    "cpu.pressure": PRESSURE,
    "memory.current": b"50000000\n",
    "memory.stat": MEMORY_STAT,
    "memory.max": b"67108864\n",
    "memory.peak": b"60000000\n",
    "memory.events": b"low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\n",
    "memory.swap.current": b"4096\n",
    "memory.swap.max": b"max\n",
    "pids.current": b"5\n",
    "pids.max": b"max\n",
    "io.stat": b"253:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n",
    "hugetlb.2MB.current": b"4194304\n",
}


def cgroup(files: dict[str, bytes], count: ProcessCount) -> CgroupSample:
    return CgroupSample(files={name: files.get(name, b"") for name in CGROUP_FILES}, count=count)


def sample(
    pod: dict[str, bytes], *containers: dict[str, bytes], counts: Sequence[ProcessCount] = ()
) -> UsageSample:
    padded = [*counts, *[ProcessCount()] * (len(containers) - len(counts))]
    return UsageSample(
        wall_ns=0,
        pod=cgroup(pod, ProcessCount()),
        containers=tuple(cgroup(files, count) for files, count in zip(containers, padded, strict=True)),
        net_dev=NET_DEV,
        meminfo=MEMINFO,
    )


def parsed(sample: UsageSample, ids: tuple[str, ...] = ("c",), nics: tuple[str, ...] = ()) -> parse.PodStats:
    return parse.parse(PodId("p"), [ContainerId(id) for id in ids], nics, sample, 9)


def test_container_files_are_parsed() -> None:
    counts = [ProcessCount(processes=2, files=30, sockets=4)]
    (container,) = parsed(sample({}, CONTAINER, counts=counts)).containers
    assert (container.container_id, container.at_ns) == ("c", 9)
    assert (container.processes, container.files, container.sockets) == (2, 30, 4)
    cpu, memory = container.usage.cpu, container.usage.memory
    assert (cpu.usage_ns, cpu.user_ns, cpu.system_ns) == (5 * 10**9, 3 * 10**9, 2 * 10**9)
    assert (cpu.periods, cpu.throttled_periods, cpu.throttled_ns) == (10, 4, 700_000_000)
    assert cpu.psi == Psi(
        some=Pressure(avg10=1.5, avg60=0.25, total_us=9000001), full=Pressure(avg10=0.1, total_us=42)
    )
    assert (memory.usage, memory.working_set, memory.rss) == (50_000_000, 44_000_000, 40_000_000)
    assert (memory.cache, memory.mapped_file, memory.kernel) == (9_000_000, 800_000, 300_000)
    assert (memory.peak, memory.limit_hits, memory.oom_kills) == (60_000_000, 7, 1)
    assert (memory.page_faults, memory.major_page_faults) == (123, 4)
    assert memory.available == 64 * MIB - 44_000_000
    assert (memory.swap_usage, memory.swap_available) == (4096, 1000 * 1024)
    assert memory.psi is None
    assert (container.usage.threads, container.usage.threads_max) == (5, 0)
    assert container.usage.io == (IoUsage(device="253:0", read_bytes=1, written_bytes=2, reads=3, writes=4),)
    assert container.usage.hugepages == (("2MB", 4194304),)


def test_available_memory_is_up_to_the_lowest_limit_that_applies() -> None:
    unlimited = CONTAINER | {"memory.max": b"max\n"}
    machine = 250_000 * 1024 - 44_000_000
    assert parsed(sample({}, unlimited)).containers[0].usage.memory.available == machine
    assert parsed(sample({}, unlimited)).containers[0].usage.memory.limit == 0
    pod = {"memory.max": b"46000000\n", "memory.current": b"45000000\n"}
    found = parsed(sample(pod, unlimited, CONTAINER), ("a", "b"))
    assert [one.usage.memory.available for one in found.containers] == [2_000_000, 2_000_000]
    assert found.usage.memory.available == 1_000_000
    swap = {"memory.swap.max": b"10000\n", "memory.swap.current": b"4096\n"}
    assert parsed(sample({}, swap)).containers[0].usage.memory.swap_available == 10_000 - 4096


def test_pod_usage_is_that_of_the_cgroup_above_its_containers() -> None:
    counts = [ProcessCount(processes=2), ProcessCount(processes=3)]
    answer = sample({"cpu.stat": b"usage_usec 7\n"}, CONTAINER, CONTAINER, counts=counts)
    found = parsed(answer, ("a", "b"), ("eth0", "eth1", "eth2"))
    assert (found.usage.cpu.usage_ns, found.processes) == (7000, 5)
    assert [one.container_id for one in found.containers] == ["a", "b"]
    assert found.interfaces == (
        InterfaceUsage(name="eth0", rx_bytes=5, rx_packets=1, tx_bytes=6, tx_packets=1),
        InterfaceUsage(
            name="eth1",
            rx_bytes=1000,
            rx_packets=10,
            rx_errors=1,
            rx_dropped=2,
            tx_bytes=2000,
            tx_packets=20,
            tx_errors=3,
            tx_dropped=4,
        ),
    )


def test_number_and_limit_read_invalid_text_as_zero() -> None:
    assert [number(text) for text in (b"7\n", b"", b"-1", b"1e3", b"max", b"9" * 30, b"9" * 19)] == (
        [7, 0, 0, 0, 0, 0, NUMBER_MAX]
    )
    assert [limit(text) for text in (b"max\n", b"0\n", b"9\n", b"")] == [0, 1, 9, 0]


def test_huge_numbers_are_capped_to_fit_the_wire() -> None:
    huge = b"usage_usec %d\n" % NUMBER_MAX
    assert parsed(sample({}, {"cpu.stat": huge})).containers[0].usage.cpu.usage_ns == NUMBER_MAX
    assert meminfo(b"MemTotal: %d kB" % NUMBER_MAX) == {b"MemTotal": NUMBER_MAX}


def test_unknown_interfaces_and_devices_are_left_out() -> None:
    text = b"".join(b"evil%d: 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1\n" % n for n in range(100))
    assert net_dev(text, ["eth0"]) == ()
    assert net_dev(b"eth0: 1 2 3\n", ["eth0"]) == ()
    assert len(io_stat(b"".join(b"%d:0 rbytes=1\n" % n for n in range(100)))) == 32
    assert io_stat(b"../../x:0 rbytes=1\n8:0; rbytes=1\n") == ()


def test_pressure_is_absent_where_the_kernel_does_not_keep_it() -> None:
    assert psi(b"") is None
    assert psi(b"some avg10=nan avg60=inf avg300=1e999 total=-3\n") == Psi()
    assert psi(b"some avg10=999.99 total=1") == Psi(some=Pressure(avg10=100.0, total_us=1))


def test_number_of_lines_is_bounded() -> None:
    assert len(flat_keyed(b"".join(b"k%d 1\n" % n for n in range(10_000)))) <= 256
