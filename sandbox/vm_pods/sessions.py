"""Sessions with containers and pods in VMs: each is a request to the agent and some streams."""

from __future__ import annotations

from sandbox.container import Container
from sandbox.guest.execs import run_exec
from sandbox.guest.sessions import GuestAttachment, GuestExec, GuestPortConnection
from sandbox.plan.encode import encode_process
from sandbox.plan.values import ProcessPlan
from sandbox.pod import Pod
from sandbox.session import ExecResult
from sandbox.vm_pods.link import link_of
from sandbox.vm_pods.propagation import PropagationSync

DIAL_TIMEOUT_S = 30.0


class VmSessions:
    """See `engine.Sessions`. While the connection to the agent is being made again, calls wait for it."""

    def __init__(self, propagation: PropagationSync) -> None:
        self._propagation = propagation

    async def exec_sync(
        self, container: Container, process: ProcessPlan, timeout_s: float | None, limit: int
    ) -> ExecResult:
        """Run the process by one request; then repeat on the host what it mounted."""
        client = await link_of(container.pod).guest()
        result = await run_exec(client, container.id, encode_process(process), timeout_s, limit)
        # a command that mounted something on a bidirectional volume expects to find it on the host now
        await self._propagation.sync(container)
        return result

    async def exec(
        self, container: Container, process: ProcessPlan, *, stdin: bool, stdout: bool, stderr: bool
    ) -> GuestExec:
        """Start the process with a stream for each of its standard files."""
        client = await link_of(container.pod).guest()
        return await GuestExec.start(
            client, container.id, encode_process(process), stdin=stdin, stdout=stdout, stderr=stderr
        )

    async def attach(
        self, container: Container, *, stdin: bool, stdout: bool, stderr: bool
    ) -> GuestAttachment:
        """Connect streams to the first process; the agent replays nothing."""
        client = await link_of(container.pod).guest()
        return await GuestAttachment.start(
            client,
            container.id,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            stdin_once=container.record.spec.stdin_once,
        )

    async def dial(self, pod: Pod, port: int) -> GuestPortConnection:
        """Let the agent connect to the port in the guest."""
        return await GuestPortConnection.dial(await link_of(pod).guest(), port, DIAL_TIMEOUT_S)

    async def reopen_log(self, container: Container) -> None:
        """Let the log's relay go on in a new file."""
        if container.relay is not None:
            await container.relay.reopen()
