"""One daemon to a state directory.

A second one would take up the pods of the first, end their conversations and undo what is just being
started, long before it comes to the socket and finds that it is taken. The lock is the kernel's
(flock(2)) on an open file, so it ends with its process, however that ends; children do not get it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

# A daemon that was just killed may live on for a moment in a child that is about to exec.
PATIENCE_S = 2.0
PAUSE_S = 0.05


class DirectoryTaken(Exception):
    """Another daemon works with this directory."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: another daemon works there; stop it, or choose another --root")
        self.path = path


@contextmanager
def hold(directories: Sequence[Path], patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Make the directories, if they are not there, and keep other daemons out of them.

    Raises DirectoryTaken, OSError.
    """
    with ExitStack() as held:
        for directory in directories:
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, fd)
            _lock(fd, directory, time.monotonic() + patience_s)
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
