"""The seam to a guest: how bytes reach the agent. One file per transport, found by the scheme.

A transport address is `scheme:rest`: `serial:/run/husk/pods/ID/agent.sock` (a virtio-serial port's
chardev socket), `vsock:CID:PORT`, `unix:/path` (an agent run as an ordinary process, in tests).
"""

from __future__ import annotations

import asyncio
from typing import Protocol


class Transport(Protocol):
    async def connect(self, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open the duplex byte stream. `address` comes without the scheme.

        Raises GuestUnreachable with what was tried.
        """
