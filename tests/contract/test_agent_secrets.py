"""What a child that enters a container still has of the agent: neither its token nor its descriptors."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from sandbox.guest import guest_pb2 as pb
from sandbox.host.mount_flags import MS_BIND
from tests.kit.agent import TOKEN, Agent, Guest, standard_mounts, start
from tests.kit.eventually import eventually_sync

LARGEST = 64 << 20  # of a mapping that is searched: a sanitizer's shadow memory is terabytes


def has_token(pid: int) -> bool:
    """Whether the token is in the process's writable memory."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            bounds, access, *_ = line.split()
            begin, end = (int(bound, 16) for bound in bounds.split("-"))
            if "r" in access and "w" in access and end - begin <= LARGEST:
                memory.seek(begin)
                if TOKEN in memory.read(end - begin):
                    return True
    return False


def children_of(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descriptors(pid: int) -> list[str]:
    """Return the targets of a process's descriptors; some may be closed meanwhile."""
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(each.readlink()))
    return found


async def test_child_entering_a_container_has_no_token_and_few_descriptors(
    agent: Agent, guest: Guest
) -> None:
    """Thousands of mounts give time to inspect it. /proc/PID of such a process belongs to root."""
    mount = pb.Mount(source="/tmp", target="/tmp", flags=MS_BIND)
    id = guest.name()
    request = start(id, agent.rootfs(), ["sleep", "100"], mounts=[*standard_mounts(), *[mount] * 6000])
    before = children_of(agent.pid)
    starting = guest.client.post(pb.Request(start=request))
    for _ in range(2):  # for the request to be written
        await asyncio.sleep(0)
    eventually_sync(lambda: set(children_of(agent.pid)) - set(before), describe="the child exists")
    (child,) = set(children_of(agent.pid)) - set(before)
    eventually_sync(
        lambda: not any("eventpoll" in each for each in descriptors(child)),
        describe="it has closed descriptors",
    )
    assert not starting.done(), "the child was inspected before it ran its program"
    assert not has_token(child)
    assert has_token(agent.pid), "the search works"
    assert Path(f"/proc/{child}").stat().st_uid == 0
    assert len(descriptors(child)) <= 8
    await starting
