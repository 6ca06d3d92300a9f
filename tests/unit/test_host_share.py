"""What a VM may use of the host: by what its pod and containers ask for, and as files of cgroups."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sandbox.errors import InvalidSpec
from sandbox.host.cgroup import Cgroups, Layout, Mode
from sandbox.plan.host_share import host_share
from sandbox.plan.values import HostShare
from sandbox.spec import Resources

NONE = Resources()


def share(*containers: Resources, pod: Resources = NONE, overhead: Resources = NONE) -> HostShare:
    return host_share(pod, overhead, containers, whole=True)


def test_vm_has_the_union_of_what_containers_name() -> None:
    found = share(Resources(cpuset_cpus="1-2", cpuset_mems="0"), NONE, Resources(cpuset_cpus="2,7"))
    assert (found.cpus, found.mems) == (frozenset((1, 2, 7)), frozenset((0,)))
    assert share(NONE).cpus == share().cpus == frozenset()


def test_vm_is_as_important_as_the_most_important_container() -> None:
    assert share(Resources(oom_score_adj=900), Resources(oom_score_adj=-5)).oom_score_adj == -5
    assert share().oom_score_adj is None


@pytest.mark.parametrize(
    ("pod", "overhead", "containers", "expected"),
    [
        (NONE, NONE, [NONE], (0, 0, 0)),
        (NONE, NONE, [Resources(cpu_shares=100), Resources(cpu_shares=50)], (150, 0, 0)),
        (Resources(cpu_shares=512), Resources(cpu_shares=10), [Resources(cpu_shares=100)], (522, 0, 0)),
        (Resources(cpu_quota=50_000), NONE, [], (0, 50_000, 100_000)),
        (Resources(cpu_quota=-1), Resources(cpu_quota=1000), [], (0, 0, 0)),
        (
            Resources(cpu_quota=5000, cpu_period=10_000),
            Resources(cpu_quota=25_000, cpu_period=100_000),
            [],
            (0, 7500, 10_000),
        ),
    ],
    ids=["nothing", "containers", "pod and overhead", "quota", "no quota", "other period"],
)
def test_weight_and_quota_are_those_of_the_pod_with_its_overhead(
    pod: Resources, overhead: Resources, containers: list[Resources], expected: tuple[int, int, int]
) -> None:
    found = share(*containers, pod=pod, overhead=overhead)
    assert (found.cpu_shares, found.cpu_quota_us, found.cpu_period_us) == expected
    below = host_share(pod, overhead, containers, whole=False)
    assert (below.cpu_shares, below.cpu_quota_us) == (0, 0), "the client limits the cgroup above"


@pytest.mark.parametrize("field", ["cpuset_cpus", "cpuset_mems"])
def test_list_that_is_none_is_refused_with_its_field(field: str) -> None:
    odd = msgspec.structs.replace(NONE, **{field: "2-1"})
    with pytest.raises(InvalidSpec, match=field):
        share(odd)


class Files:
    """Directories as the kernel makes them, in one hierarchy."""

    def __init__(self, root: Path, *, unified: bool) -> None:
        above = root / "above"
        self.pod = above / "husk-p"
        self.pod.mkdir(parents=True)
        for folder in (above, self.pod):
            for name, value in (("cpuset.cpus", "0-3\n"), ("cpuset.mems", "0\n")):
                (folder / name).write_text(value)
                if unified:
                    (folder / f"{name}.effective").write_text(value)
            (folder / ("cgroup.controllers" if unified else "cpuset.memory_migrate")).write_text("")
        layout = Layout(
            mode=Mode.V2 if unified else Mode.V1,
            hierarchies=() if unified else (str(root),),
            unified=str(root) if unified else "",
        )
        self.cgroups = Cgroups(layout=layout)

    def read(self) -> tuple[str, str]:
        return tuple((self.pod / f"cpuset.{name}").read_text().strip() for name in ("cpus", "mems"))  # type: ignore[return-value]


@pytest.fixture(params=[False, True], ids=["v1", "v2"])
def files(tmp_path: Path, request: pytest.FixtureRequest) -> Files:
    return Files(tmp_path, unified=request.param)


def test_cpuset_is_written_and_given_back(files: Files) -> None:
    files.cgroups.confine("p", "/above", {1, 3}, {0})
    assert files.read() == ("1,3", "0")
    if files.cgroups.layout.hierarchies:
        assert (files.pod / "cpuset.memory_migrate").read_text() == "1"
    files.cgroups.confine("p", "/above", (), ())
    assert files.read() == ("0-3", "0")


def test_cpuset_that_was_never_set_is_left_as_it_is(tmp_path: Path) -> None:
    """On cgroup v2 it follows the cgroup above then."""
    files = Files(tmp_path, unified=True)
    (files.pod / "cpuset.cpus").write_text("\n")
    files.cgroups.confine("p", "/above", (), ())
    assert files.read() == ("", "0")


@pytest.mark.parametrize(
    ("cpus", "mems", "words"),
    [
        ({4}, (), r"cpuset_cpus: there is no 4 for the pod; accepted: some of 0-3"),
        ({1}, {1}, r"cpuset_mems: there is no 1 for the pod; accepted: some of 0"),
    ],
)
def test_cpuset_that_the_cgroup_above_lacks_is_refused_and_changes_nothing(
    files: Files, cpus: set[int], mems: set[int], words: str
) -> None:
    with pytest.raises(InvalidSpec, match=words):
        files.cgroups.confine("p", "/above", cpus, mems)
    assert files.read() == ("0-3", "0")


def test_cpuset_without_a_controller_is_refused(tmp_path: Path) -> None:
    cgroups = Cgroups(layout=Layout(mode=Mode.V2, hierarchies=(), unified=str(tmp_path)))
    (tmp_path / "husk/husk-p").mkdir(parents=True)
    cgroups.confine("p", "", (), ())
    with pytest.raises(InvalidSpec, match="this host has no controller for it"):
        cgroups.confine("p", "", {0}, ())


@pytest.mark.parametrize(
    ("shares", "quota_us", "expected"),
    [
        (0, 0, {"cpu.weight": "100", "cpu.max": "max 100000"}),
        (0, 0, {"cpu.shares": "1024", "cpu.cfs_quota_us": "-1"}),
        (2, 5000, {"cpu.weight": "1", "cpu.max": "5000 100000"}),
        (2, 5000, {"cpu.shares": "2", "cpu.cfs_quota_us": "5000"}),
        (1 << 18, 0, {"cpu.weight": "10000", "cpu.max": "max 100000", "cpu.shares": "262144"}),
    ],
)
def test_weight_and_quota_are_written_where_there_are_such_files(
    tmp_path: Path, shares: int, quota_us: int, expected: dict[str, str]
) -> None:
    pod = tmp_path / "husk/husk-p"
    pod.mkdir(parents=True)
    for name in expected:
        (pod / name).write_text("")
    cgroups = Cgroups(layout=Layout(mode=Mode.V2, hierarchies=(), unified=str(tmp_path)))
    cgroups.weigh("p", shares=shares, quota_us=quota_us, period_us=0)
    assert {each.name: each.read_text() for each in pod.iterdir()} == expected
