"""Sessions with containers and pods without a VM.

An exec is a `crun exec` (`execs`), an attachment a connection to conmon (`attach`), a forwarded port a socket
that was connected in the pod's network namespace.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from sandbox.container import Container
from sandbox.errors import GuestError
from sandbox.host_pods import conmon
from sandbox.host_pods.attach import ConmonAttachment
from sandbox.host_pods.execs import CrunExec, run_exec, site_of
from sandbox.host_pods.layout import HostLayout
from sandbox.host_pods.network import run_in_network
from sandbox.host_pods.streams import SocketConnection
from sandbox.plan.values import ProcessPlan
from sandbox.pod import Pod
from sandbox.session import ExecResult

DIAL_TIMEOUT_S = 30.0


class ProcessSessions:
    """See `engine.Sessions`."""

    def __init__(self, layout: HostLayout) -> None:
        self._layout = layout

    async def exec_sync(
        self, container: Container, process: ProcessPlan, timeout_s: float | None, limit: int
    ) -> ExecResult:
        """Run `crun exec` to its end."""
        return await run_exec(site_of(self._layout, container), process, timeout_s, limit)

    async def exec(
        self, container: Container, process: ProcessPlan, *, stdin: bool, stdout: bool, stderr: bool
    ) -> CrunExec:
        """Run `crun exec`. That the program cannot be executed may be raised by `CrunExec.wait` only."""
        site = site_of(self._layout, container)
        return await CrunExec.start(site, process, stdin=stdin, stdout=stdout, stderr=stderr)

    async def attach(
        self, container: Container, *, stdin: bool, stdout: bool, stderr: bool
    ) -> ConmonAttachment:
        """Connect to the container's conmon, which ends stdin with the client if it was started so."""
        bundle = self._layout.bundle(container)
        return await ConmonAttachment.start(bundle, stdin=stdin, stdout=stdout, stderr=stderr)

    async def dial(self, pod: Pod, port: int) -> SocketConnection:
        """Connect in the pod's network namespace: to 127.0.0.1, then to ::1."""
        return SocketConnection(await asyncio.to_thread(run_in_network, pod, lambda: _connect(port)))

    async def reopen_log(self, container: Container) -> None:
        """Let conmon reopen the log, as soon as the old file was renamed."""
        held = container.record.process
        if held is not None and container.record.log_path:
            path = Path(container.record.log_path)
            bundle = self._layout.bundle(container)
            await asyncio.to_thread(conmon.reopen_log, bundle, held.supervisor, path)


def _connect(port: int) -> socket.socket:
    """Raises GuestError."""
    try:
        return socket.create_connection(("127.0.0.1", port), DIAL_TIMEOUT_S)
    except OSError:
        try:
            return socket.create_connection(("::1", port), DIAL_TIMEOUT_S)
        except OSError as error:
            problem = f"port {port}: {error.strerror or error}"
            raise GuestError("connect", error.errno or 0, problem) from error
