"""Functions in separate threads: results, namespaces, and what happens when the caller is cancelled."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import subprocess
import threading
import time
from pathlib import Path

import pytest

from sandbox.host import syscalls, threads
from tests.kit.eventually import eventually


class Held:
    """A function that blocks until `go` is set, and then returns "held"."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.discarded: list[str] = []

    def __call__(self) -> str:
        self.entered.set()
        assert self.go.wait(10)
        return "held"

    async def begin(self, *, linger_s: float | None = None, on_cancel: bool = False) -> asyncio.Task[str]:
        task = asyncio.create_task(
            threads.run(
                self,
                "test",
                on_cancel=self.go.set if on_cancel else lambda: None,
                discard=self.discarded.append,
                linger_s=linger_s,
            )
        )
        assert await asyncio.to_thread(self.entered.wait, 10)
        return task


@pytest.mark.parametrize("pooled", [False, True])
async def test_run_returns_result_and_raises_failure(pooled: bool) -> None:
    def fail() -> None:
        raise OSError("no")

    assert await threads.run(lambda: 7, "test", pooled=pooled) == 7
    with pytest.raises(OSError, match="no"):
        await threads.run(fail, "test", pooled=pooled)


@pytest.mark.parametrize("pooled", [False, True])
async def test_run_passes_context_variables(pooled: bool) -> None:
    variable = contextvars.ContextVar[str]("variable")
    variable.set("pod")
    assert await threads.run(variable.get, "test", pooled=pooled) == "pod"


async def test_cancelled_run_waits_for_the_end_and_discards_the_result() -> None:
    held = Held()
    task = await held.begin(on_cancel=True)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert held.discarded == ["held"]


async def test_run_cancelled_twice_still_waits_for_the_end() -> None:
    held = Held()
    task = await held.begin()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
    held.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert held.discarded == ["held"]


@pytest.mark.parametrize("linger_s", [0, 0.01])
async def test_cancelled_run_stops_waiting_after_its_limit_and_discards_later(linger_s: float) -> None:
    held = Held()
    task = await held.begin(linger_s=linger_s)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert held.discarded == []
    held.go.set()
    await eventually(lambda: held.discarded == ["held"])


async def test_failure_after_cancellation_discards_nothing() -> None:
    entered, go = threading.Event(), threading.Event()
    discarded: list[None] = []

    def work() -> None:
        entered.set()
        assert go.wait(10)
        raise OSError("too late")

    task = asyncio.create_task(threads.run(work, "test", on_cancel=go.set, discard=discarded.append))
    await asyncio.to_thread(entered.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert discarded == []


async def test_failing_discard_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    entered, go = threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        assert go.wait(10)

    def discard(_: None) -> None:
        raise OSError("the mount is busy")

    task = asyncio.create_task(threads.run(work, "husk-rootfs", on_cancel=go.set, discard=discard))
    await asyncio.to_thread(entered.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "husk-rootfs" in caplog.text and "the mount is busy" in caplog.text


def own_namespace(name: str) -> int:
    """The inode of a namespace of the calling thread."""
    return Path(f"/proc/thread-self/ns/{name}").stat().st_ino


def test_call_changes_only_its_own_thread() -> None:
    own = own_namespace("net")

    def leave() -> int:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        return own_namespace("net")

    assert threads.call(leave, "test") != own
    assert own_namespace("net") == own


@pytest.mark.parametrize(
    ("option", "name", "kind"),
    [("--net", "net", syscalls.CLONE_NEWNET), ("--mount", "mnt", syscalls.CLONE_NEWNS)],
)
def test_function_runs_in_the_given_namespace(option: str, name: str, kind: int) -> None:
    holder_argv = ["unshare", option, "sh", "-c", "echo ready; read line"]
    with subprocess.Popen(holder_argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        path = Path(f"/proc/{holder.pid}/ns/{name}")
        inode = path.stat().st_ino
        assert own_namespace(name) != inode
        assert threads.call_in_namespace(path, kind, lambda: own_namespace(name), "test") == inode
        with path.open("rb") as file:
            assert (
                threads.call_in_namespace(file.fileno(), kind, lambda: own_namespace(name), "test") == inode
            )
        assert own_namespace(name) != inode
        holder.stdin.close()


def test_absent_namespace_raises() -> None:
    with pytest.raises(FileNotFoundError):
        threads.call_in_namespace(Path("/no/such/namespace"), syscalls.CLONE_NEWNET, time.time, "test")
    with pytest.raises(OSError, match=r"setns: .*/dev/null"):
        threads.call_in_namespace(Path("/dev/null"), syscalls.CLONE_NEWNET, time.time, "test")
