"""The descriptors that a pod's virtiofsds hold: kept below their limit, whatever the pod does.

A virtiofsd holds one for each inode that the guest's kernel has in its cache, and the guest's kernel gives
none back while it has memory. At the limit every lookup of the pod would fail, for ever. So the daemon counts
them, and has the agent drop the guest's unused inodes once half of the limit is in use.

Counting costs a stat(2) per process where the kernel reports the number as the size of /proc/PID/fd (Linux
6.2), and a listing elsewhere. It is rare while the limit is far away: the next count is due when the guest
could have reached the threshold at RATE_PER_S.

The guest is not trusted to comply: a guest that keeps its inodes harms itself alone, and is asked less often.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from sandbox.errors import DeadlineExceeded, GuestError, GuestUnreachable
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient

log = logging.getLogger(__name__)

RATE_PER_S = 20_000  # inodes that a fast guest looks up
SHORTEST_S, LONGEST_S = 0.02, 2.0  # between counts
BACKOFF_S = 5.0  # the longest between requests to a guest that gives nothing back
TIMEOUT_S = 20.0
LISTED = Path("/proc/self/fd").stat().st_size == 0  # before Linux 6.2: counting takes a listing, in a thread


class Server(msgspec.Struct, frozen=True):
    """A process of a virtiofsd, and its soft RLIMIT_NOFILE."""

    pid: int
    limit: int


def find_servers(pids: Sequence[int]) -> list[Server]:
    """Return these processes and their children, in which both virtiofsds serve. Blocks."""
    everyone = [each for pid in pids for each in (pid, *_children(pid))]
    return [Server(pid, limit) for pid in everyone if (limit := _limit(pid))]


def _children(pid: int) -> list[int]:
    """Reads proc(5), /proc/PID/task/TID/children; empty for a process that has exited."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _limit(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/limits").read_text()
    except OSError:
        return 0
    return next((int(line.split()[3]) for line in text.splitlines() if line.startswith("Max open files")), 0)


def count_descriptors(pid: int) -> int:
    """Return how many descriptors a process has open; -1 for one that has exited.

    Linux 6.2 or later: some microseconds. Before, the listing may block for milliseconds.
    """
    directory = Path(f"/proc/{pid}/fd")
    try:
        return directory.stat().st_size or sum(1 for _ in directory.iterdir())
    except OSError:
        return -1


def next_count_s(margin: int) -> float:
    """Return when to count again, in seconds, with so many descriptors left until the threshold."""
    return min(max(margin / RATE_PER_S, SHORTEST_S), LONGEST_S)


async def watch_inodes(pids: Sequence[int], find_client: Callable[[], GuestClient | None]) -> None:
    """Keep the descriptors of these virtiofsds below their limits until cancelled, or until one has exited.

    `find_client` returns the current connection to the agent, if there is one. An agent of an older release
    that cannot give inodes back is not asked again.
    """
    servers = await asyncio.to_thread(find_servers, pids)
    pause_s = SHORTEST_S
    while servers:
        margin = await asyncio.to_thread(_margin, servers) if LISTED else _margin(servers)
        if margin is None:
            return
        if margin > 0:
            pause_s = SHORTEST_S
            await asyncio.sleep(next_count_s(margin))
            continue
        if not await _release(find_client()):
            return
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, BACKOFF_S)


def _margin(servers: Sequence[Server]) -> int | None:
    """Return how many descriptors are left until one has half of its limit; None: one has exited."""
    counts = [count_descriptors(server.pid) for server in servers]
    margins = (server.limit // 2 - count for server, count in zip(servers, counts, strict=True))
    return None if -1 in counts else min(margins)


async def _release(client: GuestClient | None) -> bool:
    """Ask the guest to give inodes back; return whether it can."""
    if client is None:
        return True
    try:
        await client.call(pb.Request(release_inodes=pb.ReleaseInodes()), TIMEOUT_S)
    except GuestError as error:
        log.warning("the guest cannot give back cached inodes: %s", error)
        return False
    except (GuestUnreachable, DeadlineExceeded) as error:
        log.debug("the guest was not asked to give back cached inodes: %s", error)
    return True
