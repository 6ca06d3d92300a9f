"""The walk over steps: rollback, Stop and recovery are the same thing."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field

import pytest

from sandbox.errors import InvalidSpec, PhaseFailed
from sandbox.lifecycle import UndoFailed, bring_up, take_down


@dataclass
class World:
    """Records what happened, in order, and which step names are saved."""

    done: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)

    def forget(self, names: Collection[str]) -> None:
        self.saved = [name for name in self.saved if name not in names]


@dataclass
class FakeStep:
    name: str
    fails_up: Exception | None = None
    fails_down: Exception | None = None

    async def up(self, world: World) -> None:
        assert self.name in world.saved, "the name must be saved before the effect"
        world.done.append(f"+{self.name}")
        if self.fails_up:
            raise self.fails_up

    async def down(self, world: World) -> None:
        world.done.append(f"-{self.name}")
        if self.fails_down:
            raise self.fails_down


async def up(world: World, *steps: FakeStep, console: str = "") -> None:
    await bring_up(
        steps,
        world,
        begin=world.saved.extend,
        finish=lambda name, begin, end: world.phases.append(name),
        ended=world.forget,
        console=lambda: console,
    )


async def test_every_step_runs_in_order_and_is_remembered() -> None:
    world = World()
    await up(world, FakeStep("a"), FakeStep("b"))
    assert world.done == ["+a", "+b"]
    assert world.saved == ["a", "b"]
    assert world.phases == ["a", "b"]


@pytest.mark.parametrize("broken", [0, 1, 2])
async def test_a_failing_step_undoes_itself_and_all_before_it(broken: int) -> None:
    world = World()
    steps = [FakeStep(name) for name in "abc"]
    steps[broken].fails_up = OSError(28, "No space left on device")
    with pytest.raises(PhaseFailed) as caught:
        await up(world, *steps, console="last words")
    names = "abc"[: broken + 1]
    assert world.done == [f"+{name}" for name in names] + [f"-{name}" for name in reversed(names)]
    assert world.saved == []
    assert caught.value.phase == "abc"[broken]
    assert "No space left" in caught.value.reason
    assert caught.value.console == "last words"


async def test_a_callers_mistake_keeps_its_type() -> None:
    with pytest.raises(InvalidSpec, match=r"config\.hostname"):
        await up(World(), FakeStep("a", fails_up=InvalidSpec("config.hostname", "is too long")))


async def test_what_cannot_be_undone_stays_saved_and_the_rest_is_released() -> None:
    world = World()
    with pytest.raises(PhaseFailed) as caught:
        await up(
            world,
            FakeStep("a"),
            FakeStep("b", fails_down=OSError("stuck")),
            FakeStep("c", fails_up=OSError("broken")),
        )
    assert world.saved == ["b"]
    assert world.done[-1] == "-a"
    assert "stuck" in caught.value.__notes__[0]


async def test_take_down_gathers_all_failures() -> None:
    world = World(saved=["a", "b", "c"])
    steps = [
        FakeStep("a", fails_down=OSError("one")),
        FakeStep("b"),
        FakeStep("c", fails_down=OSError("two")),
    ]
    with pytest.raises(UndoFailed) as caught:
        await take_down(steps, world, ended=world.forget)
    assert [name for name, _ in caught.value.failures] == ["c", "a"]
    assert world.saved == ["a", "c"]


async def test_cancelling_releases_nothing_for_the_next_start_does() -> None:
    world = World()

    class Slow(FakeStep):
        async def up(self, world: World) -> None:
            await asyncio.Event().wait()

    task = asyncio.create_task(up(world, FakeStep("a"), Slow("b")))
    while "+a" not in world.done:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.saved == ["a", "b"]
    assert world.done == ["+a"]
