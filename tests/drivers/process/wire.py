"""Copy packets between two taps until a process exits: wire.py TAP TAP PID NAME...

The names only let the driver find this process by its arguments.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys

PACKET_MAX = 1 << 16


def main(left: int, right: int, pid: int) -> None:
    """Run until the process `pid` has exited. Packets that a tap does not accept are dropped."""
    poll = select.poll()
    exited = os.pidfd_open(pid)
    for descriptor in (left, right, exited):
        poll.register(descriptor, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready == exited:
                return
            with contextlib.suppress(OSError):  # an interface that is down or gone
                os.write(right if ready == left else left, os.read(ready, PACKET_MAX))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
