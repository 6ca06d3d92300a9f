"""Descriptors are counted rarely far from the limit, and the guest is asked for inodes in time."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.errors import GuestError, GuestUnreachable
from sandbox.guest import guest_pb2 as pb
from sandbox.vm_pods import inode_watch
from sandbox.vm_pods.inode_watch import (
    LONGEST_S,
    SHORTEST_S,
    Server,
    guest_bound,
    host_bound,
    lowest_limit,
    next_count_s,
    watch_inodes,
)
from tests.kit.eventually import eventually


class Guest:
    """Stands in for the connection to an agent."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked = 0
        self._error = error

    async def call(self, request: pb.Request, timeout_s: float) -> pb.Reply:
        assert request.WhichOneof("body") == "release_inodes"
        self.asked += 1
        if self._error is not None:
            raise self._error
        return pb.Reply()


@pytest.fixture
def child() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "60"])
    yield process.pid
    process.kill()
    process.wait()


def test_count_is_rare_far_from_the_threshold_and_frequent_near_it() -> None:
    assert next_count_s(500_000) == LONGEST_S
    assert SHORTEST_S < next_count_s(2048) < 0.2
    assert next_count_s(1) == SHORTEST_S


def test_descriptors_of_a_process_are_counted(tmp_path: Path) -> None:
    before = inode_watch.count_descriptors(os.getpid())
    with (tmp_path / "file").open("w"):
        assert inode_watch.count_descriptors(os.getpid()) == before + 1


def test_children_are_watched_with_their_limits(child: int) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert Server(child, soft) in inode_watch.find_servers([os.getpid()])


def test_bounds_are_below_every_limit() -> None:
    for limit in (1024, 4096, 20_000, 65_536, 1 << 20):
        assert 0 < guest_bound(limit) < host_bound(limit) <= limit * 3 // 4
    assert (guest_bound(4096), guest_bound(1 << 20)) == (1024, 1 << 19)
    assert guest_bound(0) == 0  # no virtiofsd, as with a driver that exports the shares by itself


def test_lowest_limit_is_that_of_the_processes_and_0_without_any(child: int) -> None:
    resource.prlimit(child, resource.RLIMIT_NOFILE, (512, 512))
    assert lowest_limit([os.getpid()]) == 512
    assert lowest_limit([]) == 0


async def test_guest_is_asked_above_half_of_the_limit_and_not_below(
    child: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = Guest()
    monkeypatch.setattr(inode_watch, "count_descriptors", lambda pid: 1)
    watch = asyncio.create_task(watch_inodes([child], lambda: guest))  # type: ignore[arg-type,return-value]
    await asyncio.to_thread(lambda: None)
    assert guest.asked == 0
    watch.cancel()
    monkeypatch.setattr(inode_watch, "count_descriptors", lambda pid: 1 << 30)
    watch = asyncio.create_task(watch_inodes([child], lambda: guest))  # type: ignore[arg-type,return-value]
    await eventually(lambda: guest.asked > 1)
    watch.cancel()


async def test_watch_ends_with_the_virtiofsd() -> None:
    process = subprocess.Popen(["true"])  # noqa: ASYNC220
    process.wait()
    await asyncio.wait_for(watch_inodes([process.pid], lambda: None), 5)


async def test_agent_without_the_request_is_asked_once(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inode_watch, "count_descriptors", lambda pid: 1 << 30)
    guest = Guest(GuestError("request", 95, "unknown"))
    await asyncio.wait_for(watch_inodes([child], lambda: guest), 5)  # type: ignore[arg-type,return-value]
    assert guest.asked == 1


async def test_lost_connection_does_not_end_the_watch(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inode_watch, "count_descriptors", lambda pid: 1 << 30)
    guest = Guest(GuestUnreachable("lost"))
    watch = asyncio.create_task(watch_inodes([child], lambda: guest))  # type: ignore[arg-type,return-value]
    await eventually(lambda: guest.asked > 1)
    watch.cancel()
