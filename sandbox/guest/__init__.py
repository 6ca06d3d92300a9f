"""Transports to a guest: how bytes reach its agent. One file per transport, found by the scheme.

A transport address is `scheme:rest`: `serial:/run/husk/pods/ID/agent.sock` (a virtio-serial port's
chardev socket), `vsock:CID:PORT`, `unix:/path` (an agent run as an ordinary process, in tests).
The file `SCHEME.py` in this folder holds the transport in a constant named `transport`.
"""

from __future__ import annotations

import socket
from typing import Protocol


class Transport(Protocol):
    """Opens byte streams to agents."""

    async def connect(self, address: str, timeout_s: float) -> socket.socket:
        """Open the duplex byte stream; `address` comes without the scheme. The caller owns the socket.

        It is connected, non-blocking, and wrapped as AF_UNIX, the only family that the event loop accepts
        for an existing descriptor. A socket (rather than asyncio streams) lets the client read into its own
        buffer. Raises GuestUnreachable with the address that was tried.
        """
