"""The guest's accounting files make sense, and so do those of a guest that lies."""

from __future__ import annotations

from sandbox.guest import guest_pb2 as pb
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
from sandbox.stats.parse import FILES, PATHS

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


def values(
    pod: dict[str, bytes], *containers: dict[str, bytes], net: bytes = NET_DEV, memory: bytes = MEMINFO
) -> pb.CgroupValues:
    files = [cgroup.get(name, b"") for cgroup in (pod, *containers) for name in FILES]
    return pb.CgroupValues(values=[*files, net, memory])


def parsed(
    answer: pb.CgroupValues, ids: tuple[str, ...] = ("c",), nics: tuple[str, ...] = ()
) -> parse.PodStats:
    found = parse.parse(PodId("p"), [ContainerId(id) for id in ids], nics, answer, 9)
    assert found is not None
    return found


def test_what_is_asked_for_is_one_message() -> None:
    request = parse.request([ContainerId("a"), ContainerId("b")], files=False).read_cgroup
    assert list(request.container_ids) == [".", "a", "b"]
    assert (tuple(request.names), tuple(request.paths)) == (FILES, PATHS)
    assert request.count == pb.ReadCgroup.PROCESSES
    assert parse.request([], files=True).read_cgroup.count == pb.ReadCgroup.FILES


def test_a_container() -> None:
    answer = values({}, CONTAINER)
    answer.counts.extend([pb.ProcessCount(), pb.ProcessCount(processes=2, files=30, sockets=4)])
    (container,) = parsed(answer).containers
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


def test_available_is_what_the_lowest_limit_above_leaves() -> None:
    unlimited = CONTAINER | {"memory.max": b"max\n"}
    machine = 250_000 * 1024 - 44_000_000
    assert parsed(values({}, unlimited)).containers[0].usage.memory.available == machine
    assert parsed(values({}, unlimited)).containers[0].usage.memory.limit == 0
    pod = {"memory.max": b"46000000\n", "memory.current": b"45000000\n"}
    found = parsed(values(pod, unlimited, CONTAINER), ("a", "b"))
    assert [one.usage.memory.available for one in found.containers] == [2_000_000, 2_000_000]
    assert found.usage.memory.available == 1_000_000
    swap = {"memory.swap.max": b"10000\n", "memory.swap.current": b"4096\n"}
    assert parsed(values({}, swap)).containers[0].usage.memory.swap_available == 10_000 - 4096


def test_a_pod_is_the_cgroup_that_holds_its_containers() -> None:
    answer = values({"cpu.stat": b"usage_usec 7\n"}, CONTAINER, CONTAINER)
    answer.counts.extend([pb.ProcessCount(), pb.ProcessCount(processes=2), pb.ProcessCount(processes=3)])
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


def test_an_agent_that_answers_something_else() -> None:
    answer = values({}, CONTAINER)
    answer.values.append(b"more")
    assert parse.parse(PodId("p"), [ContainerId("c")], (), answer, 9) is None
    assert parse.parse(PodId("p"), [ContainerId("c")], (), pb.CgroupValues(), 9) is None


def test_an_agent_that_counts_nothing_or_too_much() -> None:
    answer = values({}, CONTAINER)
    assert parsed(answer).containers[0].processes == 0
    answer.counts.extend([pb.ProcessCount(processes=1)] * 50)
    assert [one.processes for one in parsed(answer).containers] == [1]


def test_numbers() -> None:
    assert [number(text) for text in (b"7\n", b"", b"-1", b"1e3", b"max", b"9" * 30, b"9" * 19)] == (
        [7, 0, 0, 0, 0, 0, NUMBER_MAX]
    )
    assert [limit(text) for text in (b"max\n", b"0\n", b"9\n", b"")] == [0, 1, 9, 0]


def test_huge_numbers_fit_the_wire() -> None:
    huge = b"usage_usec %d\n" % NUMBER_MAX
    assert parsed(values({}, {"cpu.stat": huge})).containers[0].usage.cpu.usage_ns == NUMBER_MAX
    assert meminfo(b"MemTotal: %d kB" % NUMBER_MAX) == {b"MemTotal": NUMBER_MAX}


def test_only_names_that_the_host_knows_are_taken() -> None:
    text = b"".join(b"evil%d: 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1\n" % n for n in range(100))
    assert net_dev(text, ["eth0"]) == ()
    assert net_dev(b"eth0: 1 2 3\n", ["eth0"]) == ()
    assert len(io_stat(b"".join(b"%d:0 rbytes=1\n" % n for n in range(100)))) == 32
    assert io_stat(b"../../x:0 rbytes=1\n8:0; rbytes=1\n") == ()


def test_no_pressure_where_it_is_not_kept() -> None:
    assert psi(b"") is None
    assert psi(b"some avg10=nan avg60=inf avg300=1e999 total=-3\n") == Psi()
    assert psi(b"some avg10=999.99 total=1") == Psi(some=Pressure(avg10=100.0, total_us=1))


def test_lines_are_bounded() -> None:
    assert len(flat_keyed(b"".join(b"k%d 1\n" % n for n in range(10_000)))) <= 256
