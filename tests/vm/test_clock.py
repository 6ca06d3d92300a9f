"""A guest's clock is synchronized to the host's, also after it was slowed down, sped up or set."""

from __future__ import annotations

import time

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.kit.cri import Cri
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
PRIVILEGED = api.LinuxContainerConfig(security_context=api.LinuxContainerSecurityContext(privileged=True))


@pytest.fixture(scope="module")
def clock_setter(cri: Cri) -> str:
    """A container that may set the clock of its VM."""
    security = api.LinuxSandboxSecurityContext(privileged=True)
    privileged = cri.run_pod("clock", linux={"security_context": security})
    return cri.run(privileged, BUSYBOX, ["sleep", "3600"], linux=PRIVILEGED)


def read_adjtimex(cri: Cri, container: str) -> dict[str, int]:
    """Return the fields of adjtimex(2) in the guest."""
    lines = [line.strip().split(":", 1) for line in cri.exec(container, "adjtimex").stdout.splitlines()]
    return {line[0].split()[-1]: int(line[1].split()[0]) for line in lines if len(line) == 2}


def ahead_s(cri: Cri, container: str) -> float:
    """Return by how much its wall clock is ahead of ours, by the fastest of four round trips."""
    found = []
    for _ in range(4):
        before = time.time()
        fields = read_adjtimex(cri, container)
        took = time.time() - before
        found.append((took, fields["time.tv_sec"] + fields["time.tv_usec"] / 1e6 - before - took / 2))
    return min(found)[1]


def wait_until_right(cri: Cri, container: str) -> None:
    eventually_sync(lambda: abs(ahead_s(cri, container)), until=lambda off: off < 0.02, timeout_s=150)
    time.sleep(4)  # and stays so
    eventually_sync(lambda: abs(ahead_s(cri, container)), until=lambda off: off < 0.03, timeout_s=10)


def test_clock_that_runs_too_fast_is_slowed_down(cri: Cri, clock_setter: str) -> None:
    cri.exec(clock_setter, "adjtimex", "-t", "10500")  # by 5 %
    eventually_sync(
        lambda: read_adjtimex(cri, clock_setter)["tick"], until=lambda tick: tick != 10500, timeout_s=100
    )
    wait_until_right(cri, clock_setter)


def test_clock_that_was_set_is_set_back(cri: Cri, clock_setter: str) -> None:
    wrong = int(time.time()) - 3600
    answer = cri.exec(clock_setter, "sh", "-c", f"date -s @{wrong} >/dev/null; date +%s").stdout
    assert int(answer) - wrong < 60
    wait_until_right(cri, clock_setter)
