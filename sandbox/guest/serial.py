"""Transport over a virtio-serial port: `serial:/path` of the chardev's unix socket on the host.

The VMM listens there from before the guest runs, holds back what is sent until the guest opens the
port, and serves one connection at a time: the next one waits in its queue until the last is closed.
So connecting says nothing about the guest; only the agent's answer to the preamble does.
"""

from __future__ import annotations

import socket

from sandbox.guest import Transport
from sandbox.guest.unix import connect_unix


class SerialTransport:
    async def connect(self, address: str, timeout_s: float) -> socket.socket:
        return await connect_unix(address, timeout_s)


transport: Transport = SerialTransport()
