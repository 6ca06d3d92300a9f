"""The errand of a VM that waits for a pod, run by the agent itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from sandbox.errors import GuestError
from sandbox.plan.encode import encode_container
from sandbox.plan.values import ContainerPlan
from sandbox.vm_pods import warmup
from sandbox.vm_pods.warmup import WarmupCommand, warm_up
from tests.kit.agent import Guest, build


@pytest.fixture
def errand() -> WarmupCommand:
    return WarmupCommand(source=str(build("husk-agent")))


@pytest.fixture(autouse=True)
def _limits_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest's root may raise its limits; the machine of the tests may not let even root do that."""
    whole = warmup.compile_plan

    def plan(guest_root: str, errand: WarmupCommand) -> ContainerPlan:
        made = whole(guest_root, errand)
        return replace(made, process=replace(made.process, rlimits=()))

    monkeypatch.setattr(warmup, "compile_plan", plan)


async def nothing_left(guest: Guest, root: Path) -> bool:
    welcome = await guest.connect()
    return not root.exists() and not welcome.containers


async def test_it_runs_an_exec_beside_a_container_and_leaves_nothing(
    guest: Guest, errand: WarmupCommand, tmp_path: Path
) -> None:
    root = tmp_path / "warm"
    for _ in range(2):  # also a second time
        await warm_up(guest.client, root, str(root), errand)
    assert await nothing_left(guest, root)


async def test_what_it_runs_stays_until_it_is_removed(
    guest: Guest, errand: WarmupCommand, tmp_path: Path
) -> None:
    root = tmp_path / "warm"
    root.mkdir()
    plan = warmup.compile_plan(str(root), errand)
    await guest.call(start=encode_container(plan))
    code, _, said = await guest.exec(warmup.NAME, errand.ends)
    assert (code, said.split(":")[0]) == (2, "usage"), "the program ran, and ended at once"
    await guest.remove(warmup.NAME)


async def test_a_guest_that_cannot_do_it_is_told_apart(guest: Guest, tmp_path: Path) -> None:
    root = tmp_path / "warm"
    with pytest.raises(GuestError, match="mount"):
        await warm_up(guest.client, root, str(root), WarmupCommand(source="/no/such/program"))
    assert await nothing_left(guest, root)
