"""How containers end: the one place where an ended container's state, code, time and reason are set.

Engines report ends here; `containers` does for what it ends itself. Nothing is released: the engine
detaches from an ended container, RemoveContainer releases the rest.
"""

from __future__ import annotations

import time

from sandbox.container import Container
from sandbox.inventory import Inventory
from sandbox.pod import Pod
from sandbox.records import ContainerState
from sandbox.spec import ExitCode, Value


class Exit(Value, frozen=True, kw_only=True):
    """How a container's first process ended, as its engine reports it.

    `exit_code` is 128 + signal where a signal ended it. `at_ns` is the wall clock of the kernel that it ran
    under, 0 if unknown. `oom_kills` counts the OOM kills in the container's cgroup during its whole life.
    """

    exit_code: int
    at_ns: int = 0
    oom_kills: int = 0


class Exits:
    """Records the ends of containers."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory

    def exited(self, container: Container, end: Exit) -> None:
        """Make a running container EXITED. Call it once its last line is in the log file: clients read
        the log as soon as they see the state. Without effect for one that does not run."""
        if container.running:
            now = time.time_ns()
            # by the guest's clock, which need not be ours: not before the start, and not in the future
            at_ns = min(max(end.at_ns, container.record.started_at_ns), now) if end.at_ns else now
            container.record_exit(end.exit_code, at_ns, exit_reason(end))

    def lost(self, pod: Pod, reason: str) -> None:
        """Make every container EXITED that ran in the pod: it was killed with what it ran in. Idempotent."""
        for container in self._inventory.containers_of(pod):
            if container.record.state in (ContainerState.RUNNING, ContainerState.UNKNOWN):
                container.record_exit(ExitCode.KILLED, time.time_ns(), "Error", reason)


def exit_reason(end: Exit) -> str:
    """Return the CRI's reason: OOMKilled also where the first process survived the kill of a child."""
    if end.oom_kills:
        return "OOMKilled"
    return "Completed" if end.exit_code == 0 else "Error"
