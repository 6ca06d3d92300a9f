"""Transport over a virtio-serial port: `serial:/path` of the chardev's unix socket on the host.

The VMM listens there before the guest runs, buffers what is sent until the guest opens the port, and serves
one connection at a time: the next one waits in the listen queue until the last is closed. So a successful
connect does not show that the guest runs; only the agent's answer to the preamble does.
"""

from __future__ import annotations

import socket

from sandbox.guest import Transport
from sandbox.guest.unix import connect_unix


class SerialTransport:
    """Connects to the chardev's socket."""

    async def connect(self, address: str, timeout_s: float) -> socket.socket:
        return await connect_unix(address, timeout_s)


transport: Transport = SerialTransport()
