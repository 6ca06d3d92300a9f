"""What a process on its way into a container still has of the agent: no token, none of its descriptors."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from sandbox.guest import guest_pb2 as pb
from tests.kit.agent import MS_BIND, TOKEN, Agent, Guest, standard_mounts, start, wait_for

LARGEST = 64 << 20  # of a mapping that is searched; the shadow of a sanitizer is terabytes


def knows_the_token(pid: int) -> bool:
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
    """What they point at; some come and go meanwhile."""
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(each.readlink()))
    return found


async def test_on_the_way_into_a_container(agent: Agent, guest: Guest) -> None:
    """So many mounts that there is time to look. /proc/PID of such a process belongs to root alone."""
    mount = pb.Mount(source="/tmp", target="/tmp", flags=MS_BIND)
    id = guest.name()
    request = start(id, agent.rootfs(), ["sleep", "100"], mounts=[*standard_mounts(), *[mount] * 6000])
    before = children_of(agent.pid)
    starting = guest.client.post(pb.Request(start=request))
    for _ in range(2):  # for the request to be written
        await asyncio.sleep(0)
    wait_for(lambda: set(children_of(agent.pid)) - set(before), "the child")
    (child,) = set(children_of(agent.pid)) - set(before)
    wait_for(lambda: not any("eventpoll" in each for each in descriptors(child)), "closed descriptors")
    assert not starting.done(), "there was no time to look"
    assert not knows_the_token(child)
    assert knows_the_token(agent.pid), "the search finds what is there"
    assert Path(f"/proc/{child}").stat().st_uid == 0
    assert len(descriptors(child)) <= 8
    await starting
