"""A conversation with QEMU's monitor: bounded in time, and with our errors.

The only file that knows the `qemu.qmp` package. Why the VM ended is remembered from the monitor's
events, as it can no longer be asked for then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Mapping
from pathlib import Path

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
)

from sandbox.errors import DeadlineExceeded, VmmError, VmmGone
from sandbox.host import unix_sockets
from sandbox.host.tasks import end

# What QEMU gives as the reason of SHUTDOWN (its qapi/run-state.json, ShutdownCause), for people.
_CAUSES = {
    "guest-shutdown": "the guest powered itself off",
    "guest-reset": "the guest rebooted, as it does after a kernel panic",
    "guest-panic": "the guest's kernel panicked",
    "host-qmp-quit": "it was told to quit",
    "host-signal": "a signal ended it",
    "host-error": "QEMU met an error of the host",
}


class _Client(QMPClient):
    """Without the text of each message, which the package would make for its debug log also where
    nobody keeps that."""

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg


class Monitor:
    """One connection; QEMU serves one at a time and lets the next wait."""

    def __init__(self, client: QMPClient, connection: socket.socket, listener: EventListener) -> None:
        self._client = client
        self._connection = connection
        self._listener = listener
        self._watch = asyncio.create_task(self._follow(), name="qmp-events")
        self.ending = ""  # why the VM stopped, once it has

    @classmethod
    async def connect(cls, path: Path, timeout_s: float) -> Monitor:
        """Raises VmmGone when nobody listens, DeadlineExceeded when nobody answers."""
        client = _Client("husk")
        client.logger.setLevel(logging.CRITICAL)  # it warns of every disconnect
        listener = EventListener(names=("SHUTDOWN", "GUEST_PANICKED"))
        client.register_listener(listener)
        try:
            async with asyncio.timeout(timeout_s):
                connection = unix_sockets.connect(path)
                await client.connect(connection)
        except TimeoutError as error:
            raise DeadlineExceeded("connecting to QEMU's monitor", timeout_s) from error
        except (OSError, ConnectError) as error:
            raise VmmGone(f"QEMU's monitor at {path}: {error}") from error
        return cls(client, connection, listener)

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float = 10.0
    ) -> object:
        """Raises VmmError when QEMU refuses, VmmGone when it ends meanwhile, DeadlineExceeded."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, dict(arguments or {}))
        except TimeoutError as error:
            raise DeadlineExceeded(f"QMP {command}", timeout_s) from error
        except ExecuteError as error:
            raise VmmError(f"QMP {command}: {error}") from error
        except (ExecInterruptedError, QMPError) as error:
            raise VmmGone(f"QMP {command}: QEMU closed its monitor") from error

    async def pass_descriptor(self, name: str, fd: int) -> None:
        """Give QEMU a copy of a descriptor, called `name` from now on. Raises as `execute` does."""
        try:
            # Directly, as uvloop hides the socket from the package. A space means nothing to QEMU.
            socket.send_fds(self._connection, [b" "], [fd])
        except OSError as error:
            raise VmmGone(f"a descriptor cannot be passed to QEMU: {error}") from error
        await self.execute("getfd", {"fdname": name})

    async def close(self) -> None:
        """Let go of the monitor; the VM runs on. Idempotent."""
        await end(self._watch)
        # Disconnecting reports why the connection was lost, if it was: known by then.
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()

    async def _follow(self) -> None:
        async for event in self._listener:
            data = event.get("data")
            if event["event"] == "GUEST_PANICKED":
                self.ending = _CAUSES["guest-panic"]
            elif isinstance(data, dict) and not self.ending:
                reason = str(data.get("reason", ""))
                self.ending = _CAUSES.get(reason, reason)
