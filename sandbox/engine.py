"""The seam between pods and what runs them: four protocols, and `Engine`, one implementation of each.

    PodRuntime         from a specification to a running pod; watching, recovering and destroying one
    ContainerRuntime   starting, signalling and removing a container's processes
    Sessions           exec, attach, port-forward and log rotation
    Control            limits, usage, process ids, facts for a person

`vm_pods` runs each pod in a micro-VM, `host_pods` runs those that share namespaces of the node as
processes of the host. Neither knows the other. Callers (`pods`, `containers`, `stats`) find a pod's
engine by its record and never ask of which kind it is. What passes through is values of ours: plans
(`plan.values`), records and samples (`usage`), never a message of a wire protocol.

An engine keeps nothing that a record does not also hold, apart from connections, which the next daemon
makes again: the daemon may be killed at any instant, and a new one reattaches by the records alone. It
moves containers out of RUNNING only through `exits`.

Errors, unless a method says more: GuestError where the request was refused where the container runs (the
caller's matter; nothing has changed), GuestUnreachable where no answer came (retrying may help), VmmError
where the hypervisor failed, DeadlineExceeded. All are SandboxErrors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sandbox.container import Container
from sandbox.lifecycle import Steps
from sandbox.plan.values import ProcessPlan
from sandbox.pod import Pod
from sandbox.session import ExecResult, PortConnection, Session
from sandbox.spec import ContainerId, Handler, Isolation, PodSpec, Resources
from sandbox.usage import UsageSample


class PodRuntime(Protocol):
    """Pods as a whole. The caller holds `pod.lock` during `acquire`, the steps and `adopt`."""

    @property
    def pod_steps(self) -> Steps[Pod]:
        """Every resource that a pod of this engine can hold, in order; what is taken down, however the pod
        came to be. A step's name is saved in records: once released, it keeps its name and meaning."""

    async def acquire(self, spec: PodSpec, handler: Handler) -> tuple[Pod, Steps[Pod]]:
        """Return a pod for this specification, and the steps that are left to bring it up.

        The pod is new, or one that was prepared ahead and holds resources already (its record says which).
        It belongs to the caller, who must bring it up or take it down, and call `replenish` after that.
        Raises InvalidSpec for what this engine cannot give, MissingProgram; then nothing was acquired.
        """

    def replenish(self) -> None:
        """Prepare pods ahead in place of those that were acquired. Called once an acquired pod is up or gone,
        so that preparing the next one does not slow it down. Returns at once."""

    def watch(self, pod: Pod) -> None:
        """Watch a READY pod, in the task `pod.watch`: when what it runs in ends without a request, make it
        NOT_READY with the reason, and its containers EXITED. Cancelling the task ends the watch."""

    async def adopt(self, pod: Pod) -> None:
        """Reattach to a READY pod that an earlier daemon started, and watch it; or to one that is NOT_READY
        and may still run, to end what is left of it or to finish its logs.

        Settles each of its containers by what has happened meanwhile: still running, ended with a code, or
        lost. A pod whose VM or processes are gone becomes NOT_READY. One that runs but does not answer stays
        READY, and the connection is retried for as long as it runs. Raises SandboxError.
        """

    async def destroy(self, pod_id: str, run_dir: Path) -> None:
        """End everything that runs for a pod, without its record: processes are found by the pod's id and run
        directory alone. Idempotent; a pod of another engine, or one that never was, is fine.
        Raises SandboxError, OSError."""


class ContainerRuntime(Protocol):
    """The processes of containers. The caller holds `container.lock` during `start` and `remove`."""

    @property
    def container_steps(self) -> Steps[Container]:
        """Every resource that a created container holds of the host. Same rules as for `pod_steps`."""

    async def start(self, container: Container) -> None:
        """Run the first process of a CREATED container, by its saved plan, and set `container.pid`.

        Returns once the program was executed (execve(2) succeeded). Raises GuestError if it could not be
        (InvalidContainerConfig where the request or the image is the cause), InvalidSpec for a log path that
        cannot exist; nothing runs then.
        """

    def watch_exit(self, container: Container) -> None:
        """Report the container's end to `exits`, after its last output is in the log. Called once it is
        RUNNING; an end that came earlier is reported too. Returns at once."""

    async def signal(self, container: Container, number: int, *, all: bool) -> None:
        """Send a signal to the first process, or with `all` to every process of the container's cgroup.
        Processes that have ended are fine."""

    async def remove(self, container: Container) -> None:
        """End what still runs of the container, release what `start` made, and detach. Idempotent; works for
        a container that never started, and in a pod that is NOT_READY."""

    def detach(self, container: Container) -> None:
        """Close what the daemon keeps open for a container that has ended, its log above all. Idempotent."""


class Sessions(Protocol):
    """Conversations with a running container or pod. The caller closes every session and connection."""

    async def exec_sync(
        self, container: Container, process: ProcessPlan, timeout_s: float | None, limit: int
    ) -> ExecResult:
        """Run a process to its end and return its output, at most `limit` bytes of each stream; the rest is
        read and dropped. `timeout_s` of None: no timeout.

        Raises GuestError if it could not be executed, DeadlineExceeded after `timeout_s`. When it raises or
        is cancelled, the process and all that it started are killed; a child that a command left in the
        background when it ended by itself lives on, and its output is not waited for.
        """

    async def exec(
        self, container: Container, process: ProcessPlan, *, stdin: bool, stdout: bool, stderr: bool
    ) -> Session:
        """Run a process with live streams. With a terminal, stdout carries both outputs. Raises GuestError if
        it could not be executed."""

    async def attach(self, container: Container, *, stdin: bool, stdout: bool, stderr: bool) -> Session:
        """Connect to the streams of the first process from now on. Any number of clients may be attached;
        closing one ends the container's stdin if the specification says `stdin_once`."""

    async def dial(self, pod: Pod, port: int) -> PortConnection:
        """Connect to a TCP port on the pod's loopback interface. Raises GuestError if nothing listens."""

    async def reopen_log(self, container: Container) -> None:
        """Go on in a new file of the same name: the kubelet has renamed the old one. No line is lost or
        written twice. Without effect for a container that keeps no log."""


class Control(Protocol):
    """Limits and observation."""

    async def limit_pod(self, pod: Pod, resources: Resources, overhead: Resources) -> None:
        """Apply limits to all containers of a READY pod together. `overhead` is what the sandbox itself may
        use beyond them. On failure the previous limits stay in force. Raises InvalidSpec too."""

    async def limit(self, container: Container, resources: Resources) -> None:
        """Apply limits to a running container; for one that is CREATED, make sure that there is space for
        them. On failure the previous limits stay in force. Raises InvalidSpec and BeyondNode too."""

    async def usage(self, pod: Pod, ids: Sequence[ContainerId], *, files: bool) -> UsageSample:
        """Sample the accounting files of the pod and of these containers of it. `files`: count open
        descriptors too, which takes longer. Never waits for a lost connection: raises GuestUnreachable."""

    def pids(self, container: Container) -> Mapping[str, int]:
        """Return the ids by which a running container's first process is known: `pid` is a process of this
        host (in a VM, the VMM). Empty for one that does not run."""

    async def describe(self, pod: Pod) -> Mapping[str, object]:
        """Return facts for a person (`crictl inspectp`): JSON values by name. No secrets."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What runs the pods of one kind of isolation."""

    pods: PodRuntime
    containers: ContainerRuntime
    sessions: Sessions
    control: Control


class Engines:
    """The engines of this node, one for each kind of isolation that it offers."""

    def __init__(self, by_isolation: Mapping[Isolation, Engine]) -> None:
        self._by_isolation = by_isolation

    def __iter__(self) -> Iterator[Isolation]:
        return iter(self._by_isolation)

    def of(self, pod: Pod) -> Engine:
        """Return the engine that runs this pod, by its record."""
        return self.for_isolation(pod.record.isolation)

    def for_isolation(self, isolation: Isolation) -> Engine:
        """Return the engine of a kind of isolation."""
        return self._by_isolation[isolation]
