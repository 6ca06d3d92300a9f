"""The warm-up of a pooled VM, with the agent itself as the program."""

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
def command() -> WarmupCommand:
    return WarmupCommand(source=str(build("husk-agent")))


@pytest.fixture(autouse=True)
def _limits_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may raise its limits in a guest, but perhaps not on the machine of the tests."""
    whole = warmup.compile_plan

    def plan(guest_root: str, command: WarmupCommand) -> ContainerPlan:
        made = whole(guest_root, command)
        return replace(made, process=replace(made.process, rlimits=()))

    monkeypatch.setattr(warmup, "compile_plan", plan)


async def nothing_left(guest: Guest, root: Path) -> bool:
    welcome = await guest.connect()
    return not root.exists() and not welcome.containers


async def test_warm_up_runs_a_container_and_an_exec_and_leaves_nothing(
    guest: Guest, command: WarmupCommand, tmp_path: Path
) -> None:
    root = tmp_path / "warm"
    for _ in range(2):  # it can be repeated
        await warm_up(guest.client, root, str(root), command)
    assert await nothing_left(guest, root)


async def test_warm_up_program_runs_until_it_is_removed(
    guest: Guest, command: WarmupCommand, tmp_path: Path
) -> None:
    root = tmp_path / "warm"
    root.mkdir()
    plan = warmup.compile_plan(str(root), command)
    await guest.call(start=encode_container(plan))
    code, _, errors = await guest.exec(warmup.NAME, command.exec)
    assert (code, errors.split(":")[0]) == (2, "usage"), "the program ran, and ended at once"
    await guest.remove(warmup.NAME)


async def test_warm_up_that_failed_raises_and_leaves_nothing(guest: Guest, tmp_path: Path) -> None:
    root = tmp_path / "warm"
    with pytest.raises(GuestError, match="mount"):
        await warm_up(guest.client, root, str(root), WarmupCommand(source="/no/such/program"))
    assert await nothing_left(guest, root)
