"""A guest's clock goes as the host's does, whatever it did before."""

from __future__ import annotations

import time

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.kit.cri import Cri
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
PRIVILEGED = api.LinuxContainerConfig(security_context=api.LinuxContainerSecurityContext(privileged=True))


@pytest.fixture(scope="module")
def keeper(cri: Cri) -> str:
    """A container that may set the clock of its VM."""
    security = api.LinuxSandboxSecurityContext(privileged=True)
    privileged = cri.run_pod("clock", linux={"security_context": security})
    return cri.run(privileged, BUSYBOX, ["sleep", "3600"], linux=PRIVILEGED)


def shown(cri: Cri, container: str) -> dict[str, int]:
    """What adjtimex(2) tells in the guest."""
    lines = [line.strip().split(":", 1) for line in cri.exec(container, "adjtimex").stdout.splitlines()]
    return {line[0].split()[-1]: int(line[1].split()[0]) for line in lines if len(line) == 2}


def ahead_s(cri: Cri, container: str) -> float:
    """So far is its wall clock ahead of ours; of some answers the quickest."""
    found = []
    for _ in range(4):
        before = time.time()
        told = shown(cri, container)
        took = time.time() - before
        found.append((took, told["time.tv_sec"] + told["time.tv_usec"] / 1e6 - before - took / 2))
    return min(found)[1]


def check_right(cri: Cri, container: str) -> None:
    cri.wait_for(lambda: abs(ahead_s(cri, container)), lambda off: off < 0.02, 150)
    time.sleep(4)  # and stays so
    cri.wait_for(lambda: abs(ahead_s(cri, container)), lambda off: off < 0.03, 10)


def test_one_that_runs_too_fast_is_slowed_down(cri: Cri, keeper: str) -> None:
    cri.exec(keeper, "adjtimex", "-t", "10500")  # by 5 %
    cri.wait_for(lambda: shown(cri, keeper)["tick"], lambda tick: tick != 10500, 100)
    check_right(cri, keeper)


def test_one_that_was_set_is_set_back(cri: Cri, keeper: str) -> None:
    wrong = int(time.time()) - 3600
    said = cri.exec(keeper, "sh", "-c", f"date -s @{wrong} >/dev/null; date +%s").stdout
    assert int(said) - wrong < 60
    check_right(cri, keeper)
