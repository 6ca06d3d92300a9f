"""Run a program in a time namespace whose monotonic clock starts now: clock.py PROGRAM ARGUMENT...

unshare(1) sets such a clock to whole seconds, which is too coarse for the daemon's check of guests' clocks.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

CLONE_NEWTIME = 0x80


def main(argv: list[str]) -> None:
    """Replace this process by the program. Its children are in the namespace (time_namespaces(7))."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWTIME) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    seconds, nanoseconds = divmod(-time.monotonic_ns(), 10**9)
    Path("/proc/self/timens_offsets").write_text(f"monotonic {seconds} {nanoseconds}\n")
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    main(sys.argv[1:])
