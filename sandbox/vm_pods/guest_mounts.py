"""Mounts whose source the agent has, so that virtiofsd exports nothing: live files, sockets of the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sandbox.container import Container
from sandbox.plan import MountSource
from sandbox.pod import Pod


class Recoverable(Protocol):
    """What follows the host for pods, and may have missed something while there was no connection."""

    async def recover(self, pod: Pod) -> None:
        """Bring all up to date, after a new connection to the agent was made. Failures are logged."""


class GuestSources(Recoverable, Protocol):
    """One kind of them."""

    async def attach(self, container: Container) -> Mapping[int, MountSource]:
        """Let the agent make what the container mounts; return where it is there, by the mount's index. What
        cannot be made is missing in the result. `container.live` has those of the kinds before."""

    async def release(self, container: Container) -> None:
        """Remove what no other container uses, from the guest if it can be reached. Idempotent."""


@dataclass(frozen=True, slots=True)
class GuestMounts:
    """The step of a container's mounts of all these kinds. Its name is the first one's, for records."""

    kinds: Sequence[GuestSources]
    name = "live"

    async def up(self, container: Container) -> None:
        """Make them in the guest. Raises GuestError, GuestUnreachable, DeadlineExceeded, OSError."""
        container.live = {}
        if container.record.spec.mounts:
            for kind in self.kinds:
                container.live = {**container.live, **await kind.attach(container)}

    async def down(self, container: Container) -> None:
        """Remove what no other container uses. Idempotent."""
        for kind in reversed(self.kinds):
            await kind.release(container)
