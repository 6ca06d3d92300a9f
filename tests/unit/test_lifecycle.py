"""Steps: a failed start, a stop and a recovery release the same resources in the same order."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import pytest

from sandbox.errors import InvalidSpec, PhaseFailed
from sandbox.lifecycle import Parallel, Steps, UndoFailed, bring_up, held_steps, step_names, take_down


@dataclass
class FakeSubject:
    """Records what happened, in order, and which step names are saved."""

    done: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    console_tail: str = ""

    def begin(self, names: Sequence[str]) -> None:
        self.saved.extend(names)

    def finish(self, name: str, begin_s: float, end_s: float) -> None:
        assert begin_s <= end_s
        self.phases.append(name)

    def ended(self, names: Collection[str]) -> None:
        self.saved = [name for name in self.saved if name not in names]

    def console(self) -> str:
        return self.console_tail


@dataclass
class FakeStep:
    name: str
    fails_up: Exception | None = None
    fails_down: Exception | None = None

    async def up(self, subject: FakeSubject) -> None:
        assert self.name in subject.saved, "the name must be saved before the effect"
        subject.done.append(f"+{self.name}")
        if self.fails_up:
            raise self.fails_up

    async def down(self, subject: FakeSubject) -> None:
        subject.done.append(f"-{self.name}")
        if self.fails_down:
            raise self.fails_down


class HangingStep(FakeStep):
    async def up(self, subject: FakeSubject) -> None:
        await asyncio.Event().wait()


async def test_bring_up_runs_steps_in_order_and_keeps_their_names() -> None:
    subject = FakeSubject()
    await bring_up((FakeStep("a"), FakeStep("b")), subject)
    assert subject.done == ["+a", "+b"]
    assert subject.saved == ["a", "b"]
    assert subject.phases == ["a", "b"]


@pytest.mark.parametrize("broken", [0, 1, 2])
async def test_bring_up_with_failing_step_releases_it_and_all_before(broken: int) -> None:
    subject = FakeSubject(console_tail="last words")
    steps = [FakeStep(name) for name in "abc"]
    steps[broken].fails_up = OSError(28, "No space left on device")
    with pytest.raises(PhaseFailed) as caught:
        await bring_up(steps, subject)
    names = "abc"[: broken + 1]
    assert subject.done == [f"+{name}" for name in names] + [f"-{name}" for name in reversed(names)]
    assert subject.saved == []
    assert caught.value.phase == "abc"[broken]
    assert "No space left" in caught.value.reason
    assert caught.value.console == "last words"


async def test_bring_up_with_invalid_spec_keeps_the_error_type() -> None:
    with pytest.raises(InvalidSpec, match=r"config\.hostname"):
        await bring_up(
            (FakeStep("a", fails_up=InvalidSpec("config.hostname", "is too long")),), FakeSubject()
        )


async def test_bring_up_with_failing_release_keeps_its_name_and_releases_the_rest() -> None:
    subject = FakeSubject()
    with pytest.raises(PhaseFailed) as caught:
        await bring_up(
            (
                FakeStep("a"),
                FakeStep("b", fails_down=OSError("stuck")),
                FakeStep("c", fails_up=OSError("broken")),
            ),
            subject,
        )
    assert subject.saved == ["b"]
    assert subject.done[-1] == "-a"
    assert "stuck" in caught.value.__notes__[0]


async def test_bring_up_with_failing_branch_stops_the_other_before_its_next_step() -> None:
    subject = FakeSubject()
    reached, go_on = asyncio.Event(), asyncio.Event()

    class Slow(FakeStep):
        async def up(self, subject: FakeSubject) -> None:
            reached.set()
            await go_on.wait()
            await super().up(subject)

    class Failing(FakeStep):
        async def up(self, subject: FakeSubject) -> None:
            await reached.wait()
            go_on.set()
            raise OSError("broken")

    steps: Steps[FakeSubject] = (
        FakeStep("a"),
        Parallel(((Slow("b"), FakeStep("c")), (Failing("d"),))),
        FakeStep("e"),
    )
    with pytest.raises(PhaseFailed, match="d failed"):
        await bring_up(steps, subject)
    assert subject.done[:2] == ["+a", "+b"], "a step that runs is waited for"
    assert sorted(subject.done[2:4]) == ["-b", "-d"]
    assert subject.done[4:] == ["-a"], "c and e have not begun"
    assert subject.saved == []


async def test_take_down_raises_all_failures_together() -> None:
    subject = FakeSubject(saved=["a", "b", "c"])
    steps = [
        FakeStep("a", fails_down=OSError("one")),
        FakeStep("b"),
        FakeStep("c", fails_down=OSError("two")),
    ]
    with pytest.raises(UndoFailed) as caught:
        await take_down(steps, subject)
    assert [name for name, _ in caught.value.failures] == ["c", "a"]
    assert subject.saved == ["a", "c"]


async def test_bring_up_when_cancelled_releases_nothing_and_keeps_all_names() -> None:
    subject = FakeSubject()
    task = asyncio.create_task(bring_up((FakeStep("a"), HangingStep("b")), subject))
    while "+a" not in subject.done:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert subject.saved == ["a", "b"]
    assert subject.done == ["+a"]


def test_held_steps_with_parallel_branches_keeps_their_order() -> None:
    steps: Steps[FakeSubject] = (
        FakeStep("a"),
        Parallel(((FakeStep("b"), FakeStep("c")), (FakeStep("d"),))),
        FakeStep("e"),
    )
    assert step_names(steps) == ["a", "b", "c", "d", "e"]
    assert step_names(held_steps(steps, {"e", "c", "d"})) == ["c", "d", "e"]
