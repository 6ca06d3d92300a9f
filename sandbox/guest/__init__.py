"""The seam to a guest: how bytes reach the agent. One file per transport, found by the scheme.

A transport address is `scheme:rest`: `serial:/run/husk/pods/ID/agent.sock` (a virtio-serial port's
chardev socket), `vsock:CID:PORT`, `unix:/path` (an agent run as an ordinary process, in tests).
The file `SCHEME.py` in this folder holds the transport in a constant named `transport`.
"""

from __future__ import annotations

import socket
from typing import Protocol


class Transport(Protocol):
    async def connect(self, address: str, timeout_s: float) -> socket.socket:
        """Open the duplex byte stream. `address` comes without the scheme.

        The socket is connected, does not block, and says that it is AF_UNIX: that is the only
        family that the event loop takes as it is, and a socket (not streams) lets the client read
        into its own buffer. Raises GuestUnreachable with what was tried.
        """
