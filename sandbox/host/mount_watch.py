"""Watching the mount table: the kernel reports each change of it by poll(2) (proc(5), /proc/PID/mounts)."""

from __future__ import annotations

import select
from pathlib import Path


class MountWatch:
    """The daemon's own mount table. An event loop that waits for `descriptor` is woken by each change.

    A table itself is always readable, and reports a change as an exceptional condition, for which event loops
    have no callback: hence the epoll(7) descriptor. The kernel reports each change to one poll only: a change
    before the loop began to wait, or during `clear`, may pass unseen. The caller closes it.
    """

    def __init__(self) -> None:
        """Raises OSError."""
        self._table = Path("/proc/self/mountinfo").open("rb", buffering=0)  # noqa: SIM115
        try:
            self._epoll = select.epoll()
            self._epoll.register(self._table, select.EPOLLPRI | select.EPOLLET)
        except BaseException:
            self._table.close()
            raise

    @property
    def descriptor(self) -> int:
        """Return what to wait for; it stays the same."""
        return self._epoll.fileno()

    def clear(self) -> None:
        """Wait for the next change. To be called by the callback, before the table is read."""
        self._epoll.poll(0)

    def close(self) -> None:
        """Stop watching. Idempotent."""
        self._epoll.close()
        self._table.close()
