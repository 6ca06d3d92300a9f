"""A connection to QEMU's monitor (QMP): every wait is bounded, and errors are ours.

The only file that uses the `qemu.qmp` package. Why the VM stopped is kept from the monitor's events, as
it cannot be queried afterwards.
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

# Values of ShutdownCause (QEMU's qapi/run-state.json), the reason of the event SHUTDOWN, in words.
_CAUSES = {
    "guest-shutdown": "the guest powered itself off",
    "guest-reset": "the guest rebooted, as it does after a kernel panic",
    "guest-panic": "the guest's kernel panicked",
    "host-qmp-quit": "QMP quit",
    "host-signal": "QEMU received a signal",
    "host-error": "QEMU hit an error of the host",
}


class _Client(QMPClient):
    """Skips formatting messages for the package's debug log, which it does even when nothing is logged."""

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg


class Monitor:
    """One connection. QEMU serves one at a time; further ones wait until it is closed."""

    def __init__(self, client: QMPClient, connection: socket.socket, listener: EventListener) -> None:
        self._client = client
        self._connection = connection
        self._listener = listener
        self._watch = asyncio.create_task(self._follow(), name="qmp-events")
        self.ending = ""  # why the VM stopped; empty while it runs

    @classmethod
    async def connect(cls, path: Path, timeout_s: float) -> Monitor:
        """Connect and negotiate capabilities. Raises VmmGone when nothing listens at `path`, DeadlineExceeded
        when QEMU does not answer in time."""
        client = _Client("husk")
        client.logger.setLevel(logging.CRITICAL)  # it warns about every disconnect
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
        """Run a QMP command and return its result.

        Raises VmmError when QEMU reports an error, VmmGone when it exits meanwhile, DeadlineExceeded.
        """
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
        """Give QEMU a duplicate of a descriptor under `name` (QMP `getfd`). Raises as `execute` does."""
        await self.execute_with_descriptor("getfd", {"fdname": name}, fd)

    async def execute_with_descriptor(self, command: str, arguments: Mapping[str, object], fd: int) -> object:
        """Run a command that takes a duplicate of a descriptor. Raises as `execute` does."""
        try:
            # Directly, as uvloop hides the socket from the package. QEMU ignores white space.
            socket.send_fds(self._connection, [b" "], [fd])
        except OSError as error:
            raise VmmGone(f"passing a descriptor to QEMU: {error}") from error
        return await self.execute(command, arguments)

    async def close(self) -> None:
        """Close the connection; the VM runs on. Idempotent."""
        await end(self._watch)
        # disconnect() raises the reason of an earlier loss of the connection, which was reported already
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
