"""The descriptors that a pod's virtiofsds hold: kept below their limit, whatever the pod does.

A virtiofsd holds one for each inode that the guest's kernel has in its cache, and the guest's kernel gives
none back while it has memory. At the limit every lookup of the pod would fail, for ever. Two watch over it:

The agent counts the inodes of all shares, and drops the unused ones at `guest_bound` (see agent/inodes.c). It
counts before that many could have been added, is not delayed by what containers do, and needs no daemon.

The daemon counts what the agent cannot: the descriptors themselves, with those of open files and of inodes
whose release virtiofsd has not processed yet. It has the agent drop inodes at `host_bound`, which is
reached where the agent does not count (one of an older release, a kernel without SLUB_DEBUG), and seldom
elsewhere.

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
SMALL = 1 << 16  # a limit below which what is added during a drop is a large part of it
LISTED = Path("/proc/self/fd").stat().st_size == 0  # before Linux 6.2: counting takes a listing, in a thread


class Server(msgspec.Struct, frozen=True):
    """A process of a virtiofsd, and its soft RLIMIT_NOFILE."""

    pid: int
    limit: int


def guest_bound(limit: int) -> int:
    """Return how many inodes the guest may have in memory, for a limit of descriptors of each virtiofsd.

    A quarter of a small limit: as many again are on their way to be forgotten, as many are looked up
    meanwhile, and the rest is for those in use. The half of a large one is enough for all that.
    """
    return limit // 4 if limit < SMALL else limit // 2


def host_bound(limit: int) -> int:
    """Return how many descriptors a virtiofsd may have before the daemon has the guest drop inodes."""
    return guest_bound(limit) + limit // 4


def lowest_limit(pids: Sequence[int]) -> int:
    """Return the lowest limit of descriptors among these virtiofsds; 0 if there are none. Blocks."""
    return min((server.limit for server in find_servers(pids)), default=0)


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
    """Return how many descriptors are left until one has too many; None: one has exited."""
    counts = [count_descriptors(server.pid) for server in servers]
    margins = (host_bound(server.limit) - count for server, count in zip(servers, counts, strict=True))
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
