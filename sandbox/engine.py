"""Where a pod's containers run: the seam between the verbs of pods and containers and what does them.

`vm_engine` runs them in a micro-VM, `host_pods` as processes of the host. Whatever they run in, the
records, the states and the steps are the same; an engine keeps nothing that a record would have to tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from sandbox.container import Container
from sandbox.guest.execs import ExecResult
from sandbox.lifecycle import Step, Steps
from sandbox.plan.values import ProcessPlan
from sandbox.pod import Pod
from sandbox.session import Connection, Session
from sandbox.spec import ContainerId, Handler, Isolation, PodSpec, Resources
from sandbox.usage import UsageSample


class Engine(Protocol):
    """One for all pods of a kind. Calls raise SandboxError; GuestError where the request is refused."""

    pod_steps: Steps[Pod]  # from nothing to a pod, and back
    container_steps: Sequence[Step[Container]]  # what a container holds of the host

    # ------------------------------------------------------------------------------- pods

    async def take(self, spec: PodSpec, handler: Handler) -> tuple[Pod, Steps[Pod]]:
        """A pod for this specification, and the steps that are left. Raises InvalidSpec, MissingProgram."""

    def settled(self) -> None:
        """A pod that was taken has been started, or undone."""

    def watch(self, pod: Pod) -> None:
        """From READY on, in `pod.watch`: when what it runs in ends, it is NOT_READY."""

    async def adopt(self, pod: Pod) -> None:
        """Take up a READY pod of an earlier daemon, and its containers as they are now."""

    async def describe(self, pod: Pod) -> Mapping[str, object]:
        """Facts for a person."""

    async def limit_pod(self, pod: Pod, resources: Resources, overhead: Resources) -> None:
        """All containers together. After a failure what was in force is so still."""

    async def dial(self, pod: Pod, port: int) -> Connection:
        """A TCP port that something in the pod listens on."""

    async def usage(self, pod: Pod, ids: Sequence[ContainerId], *, files: bool) -> UsageSample:
        """Sample the pod and these containers; `files` counts open descriptors and sockets too."""

    async def destroy(self, pod_id: str, run_dir: Path) -> None:
        """End what runs of a pod without a record. Nothing is fine."""

    # ------------------------------------------------------------------------------- containers

    async def start(self, container: Container) -> None:
        """Run the first process, with `container.pid` as it sees itself from outside."""

    def pids(self, container: Container) -> Mapping[str, int]:
        """Of a running one: `pid` on this host, and what else it is known by."""

    def follow(self, container: Container) -> None:
        """It is RUNNING now: tell of its end."""

    async def signal(self, container: Container, number: int, *, all: bool) -> None: ...

    async def remove(self, container: Container) -> None:
        """End what is left of it, and forget it. Unknown ones are fine."""

    def let_go(self, container: Container) -> None:
        """It has ended, or its pod has. Idempotent."""

    async def exec_sync(
        self, container: Container, process: ProcessPlan, timeout_s: float | None, limit: int
    ) -> ExecResult:
        """To its end; see `guest.execs`."""

    async def exec(
        self, container: Container, process: ProcessPlan, *, stdin: bool, stdout: bool, stderr: bool
    ) -> Session: ...

    async def attach(self, container: Container, *, stdin: bool, stdout: bool, stderr: bool) -> Session: ...

    async def reopen_log(self, container: Container) -> None: ...

    async def limit(self, container: Container, resources: Resources) -> None:
        """Of a running container. After a failure what was in force is so still."""


class Engines:
    """The engines of this node, one for each kind of isolation that it offers."""

    def __init__(self, by_isolation: Mapping[Isolation, Engine]) -> None:
        self._by_isolation = by_isolation

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._by_isolation.values())

    def of(self, pod: Pod) -> Engine:
        """Return the engine that runs this pod, by its record."""
        return self.for_isolation(pod.record.isolation)

    def for_isolation(self, isolation: Isolation) -> Engine:
        """Return the engine of a kind of isolation."""
        return self._by_isolation[isolation]
