"""inotify(7): what the kernel reports of files that change, and which watch stands for which owner.

One descriptor serves all owners of the daemon. The kernel counts inodes: two owners that watch the same one
share a watch, which is removed with the last of them. An event is in the queue before the system call that
caused it returns, so a queue that is empty after files were read shows that they did not change meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

from sandbox.host import syscalls
from sandbox.host.tasks import Tasks

IN_MODIFY, IN_ATTRIB, IN_CLOSE_WRITE = 0x2, 0x4, 0x8
IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x40, 0x80, 0x100, 0x200
IN_DELETE_SELF, IN_MOVE_SELF = 0x400, 0x800
IN_Q_OVERFLOW, IN_IGNORED = 0x4000, 0x8000

# Whatever changes a file, a directory or their attributes. One mask for all, as owners share watches.
CHANGES = (
    IN_MODIFY | IN_ATTRIB | IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
    | IN_DELETE_SELF | IN_MOVE_SELF
)  # fmt: skip
BUFFER_BYTES = 64 << 10
_EVENT = struct.Struct("=iIII")

T = TypeVar("T")


class Event(NamedTuple):
    """A struct inotify_event; `watch` is -1 and the mask IN_Q_OVERFLOW where events were lost."""

    watch: int
    mask: int
    cookie: int
    name: bytes


def parse(data: bytes) -> Iterator[Event]:
    """Yield the events of one read. Raises ValueError for bytes that end within one. Pure."""
    at = 0
    while at < len(data):
        if len(data) - at < _EVENT.size:
            raise ValueError("the bytes end within the head of an event")
        watch, mask, cookie, length = _EVENT.unpack_from(data, at)
        at += _EVENT.size
        if len(data) - at < length:
            raise ValueError("the bytes end within the name of an event")
        yield Event(watch, mask, cookie, data[at : at + length].rstrip(b"\0"))
        at += length


class Watcher(Generic[T]):
    """An inotify descriptor and the owners of its watches. Owners are compared by identity.

    Any thread may call `add`, `keep` and `release`; `read` is for one thread. The caller closes it.
    """

    def __init__(self) -> None:
        """Raises OSError: EMFILE where the user has no instances left (fs.inotify.max_user_instances)."""
        self.descriptor = syscalls.inotify_init1()
        self._lock = threading.Lock()
        self._owners: dict[int, dict[int, T]] = {}  # by watch, then by id()

    def close(self) -> None:
        """End all watches. Idempotent."""
        with self._lock:
            self._owners.clear()
            if self.descriptor >= 0:
                os.close(self.descriptor)
                self.descriptor = -1

    def add(self, owner: T, file: int, what: str) -> int:
        """Watch the file or directory of this descriptor, an O_PATH one too, for CHANGES.

        Returns the watch. Raises OSError: ENOSPC where there are no watches left.
        """
        with self._lock:
            watch = syscalls.inotify_add_watch(self.descriptor, f"/proc/self/fd/{file}", CHANGES, what=what)
            self._owners.setdefault(watch, {})[id(owner)] = owner
            return watch

    def keep(self, owner: T, watches: set[int]) -> None:
        """Remove the owner's watches but these. Idempotent."""
        with self._lock:
            for watch in [watch for watch, owners in self._owners.items() if id(owner) in owners]:
                if watch not in watches:
                    self._remove(watch, owner)

    def _remove(self, watch: int, owner: T) -> None:
        owners = self._owners[watch]
        del owners[id(owner)]
        if not owners:
            del self._owners[watch]
            with contextlib.suppress(OSError):  # it ended with its inode
                syscalls.inotify_rm_watch(self.descriptor, watch)

    def read(self) -> list[T]:
        """Return the owners of files that have changed since the last call, each once, without waiting.

        After a lost event (IN_Q_OVERFLOW) that is every owner.
        """
        changed: dict[int, T] = {}
        while self.descriptor >= 0:
            try:
                data = os.read(self.descriptor, BUFFER_BYTES)
            except BlockingIOError:
                break
            with self._lock:
                for event in parse(data):
                    changed |= self._owners_of(event)
        return list(changed.values())

    def _owners_of(self, event: Event) -> dict[int, T]:
        if event.mask & IN_Q_OVERFLOW:
            return {key: owner for owners in self._owners.values() for key, owner in owners.items()}
        if event.mask & IN_IGNORED:
            return self._owners.pop(event.watch, {})
        return self._owners.get(event.watch, {})


class Watching(Generic[T]):
    """A Watcher that is opened with the first use, and belongs to the daemon's tasks, which close it.

    `changed` is called with each owner of a file that has changed. All methods must be called in the event
    loop's thread.
    """

    def __init__(self, tasks: Tasks, name: str, changed: Callable[[T], None]) -> None:
        """`name` says what is watched, for the log."""
        self._tasks = tasks
        self._name = name
        self._changed = changed
        self._watcher: Watcher[T] | None = None

    def open(self) -> Watcher[T]:
        """Return the watcher. Raises OSError as its constructor does."""
        if self._watcher is None:
            self._watcher = Watcher()
            self._tasks.spawn(self._follow(self._watcher), self._name)
        return self._watcher

    def forget(self, owner: T) -> None:
        """Remove all watches of an owner. Idempotent."""
        if self._watcher is not None:
            self._watcher.keep(owner, set())

    def read(self) -> None:
        """Report what has changed until now, without waiting."""
        if self._watcher is not None:
            for owner in self._watcher.read():
                self._changed(owner)

    async def _follow(self, watcher: Watcher[T]) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(watcher.descriptor, self.read)
        try:
            await asyncio.Event().wait()
        finally:
            loop.remove_reader(watcher.descriptor)
            watcher.close()
            self._watcher = None
