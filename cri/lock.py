"""A lock that allows one daemon per state directory.

A second daemon would recover the first one's pods, take over their connections and undo what is being
started, long before it finds the socket in use. The lock is flock(2) on an open directory, so it ends with
its process in any case; the descriptor is not inherited.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

# The lock of a daemon that was just killed is held a moment longer by a child that has not run exec yet.
WAIT_S = 2.0
PAUSE_S = 0.05


class DirectoryTaken(Exception):
    """Another daemon uses this directory."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is in use by another daemon; stop it, or choose another --root")
        self.path = path


@contextmanager
def hold(directories: Sequence[Path], wait_s: float = WAIT_S) -> Iterator[None]:
    """Lock the directories for this process, and create those that do not exist (mode 0711).

    Waits up to `wait_s` seconds for a lock. Raises DirectoryTaken, OSError.
    """
    with ExitStack() as held:
        for directory in directories:
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, fd)
            _lock(fd, directory, time.monotonic() + wait_s)
        yield


def _lock(fd: int, directory: Path, until: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= until:
                raise DirectoryTaken(directory) from error
            time.sleep(PAUSE_S)
        else:
            return
