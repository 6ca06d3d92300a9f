"""Processes that outlive the daemon: how they are started, known again, watched and ended.

One door: nothing else in `sandbox` starts a process. Children are started with `subprocess` from
worker threads (never asyncio's: see STYLE), detached into a session of their own.
"""

from __future__ import annotations

from sandbox.spec import Value


class ProcessIdentity(Value, frozen=True, kw_only=True):
    """A process for good: pids are reused, (pid, start time, boot) is not.

    `start_time` is field 22 of /proc/PID/stat, in clock ticks since boot (proc(5)).
    """

    pid: int
    start_time: int
    boot_id: str
