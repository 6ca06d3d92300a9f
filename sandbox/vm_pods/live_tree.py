"""A tree of live files as a value, and the changes that lead from one to the next. Pure.

The order of the changes is that of a writer whose readers see whole states alone, as the kubelet is
(AtomicWriter: a new directory and its files, the link `..data` renamed over the old one, links to new keys,
then removals): nothing refers to what is not there yet or no longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum

from sandbox.spec import Value

ROOT = "root"  # path of the tree's root, a directory or a single file
BATCH_BYTES = 1 << 20
_CHANGE_BYTES = 64  # of a change besides its strings, at most


class FileKind(StrEnum):
    """What an entry of a tree is."""

    DIRECTORY = "directory"
    FILE = "file"
    LINK = "link"


class Entry(Value, frozen=True, kw_only=True):
    """A file of the tree as it was read. The inode and `stamp` say whether it must be read again."""

    kind: FileKind
    mode: int
    uid: int
    gid: int
    target: str = ""  # of a link
    digest: bytes = b""  # of a file's content
    inode: int = 0
    mtime_ns: int = 0
    stamp: tuple[int, ...] = ()  # size and times; empty: read it again in any case

    def looks_like(self, other: Entry) -> bool:
        """Return whether a process that reads both sees a difference in neither content nor rights."""
        return self._seen() == other._seen()

    def _seen(self) -> tuple[object, ...]:
        return self.kind, self.mode, self.uid, self.gid, self.target, self.digest


class Tree(Value, frozen=True, kw_only=True):
    """All entries by their paths, and the content of those files that were read for it."""

    entries: Mapping[str, Entry]
    content: Mapping[str, bytes]
    size: int  # bytes that its files take in the guest's memory


class Change(Value, frozen=True, kw_only=True):
    """What the guest does to one path of its copy. `entry` None: it removes it, with what lies beneath."""

    path: str
    entry: Entry | None = None
    content: bytes = b""
    replace: bool = False  # another inode took the place of the file, so a rename shows the new one

    @property
    def size(self) -> int:
        """Its part of a request, in bytes, at most."""
        target = self.entry.target if self.entry else ""
        return len(self.path.encode()) + len(target.encode()) + len(self.content) + _CHANGE_BYTES


def diff(old: Mapping[str, Entry], new: Tree) -> list[Change]:
    """Return the changes that turn the copy of `old` into one of `new`, in the order of the writer."""
    changed = {
        path: entry
        for path, entry in new.entries.items()
        if path not in old or not entry.looks_like(old[path])
    }
    converted = [path for path in changed if path in old and old[path].kind is not changed[path].kind]
    removed = [*converted, *(path for path in old if path not in new.entries)]
    return [
        *(Change(path=path) for path in _topmost(converted)),
        *_made(changed, FileKind.DIRECTORY, old, new),
        *_made(changed, FileKind.FILE, old, new),
        *_made(changed, FileKind.LINK, old, new),
        *(
            Change(path=path)
            for path in sorted(_topmost(removed), key=lambda path: (_is_directory(old[path]), path))
            if path not in changed
        ),
    ]


def _made(
    changed: Mapping[str, Entry], kind: FileKind, old: Mapping[str, Entry], new: Tree
) -> Iterator[Change]:
    """Changes of one kind: those of existing paths first, then new ones; parents before what is in them."""
    paths = [path for path, entry in changed.items() if entry.kind is kind]
    for path in sorted(paths, key=lambda path: (path not in old, path)):
        before = old.get(path)
        replaced = before is not None and before.kind is kind and before.inode != changed[path].inode
        yield Change(
            path=path,
            entry=changed[path],
            content=new.content.get(path, b""),
            replace=replaced and kind is FileKind.FILE,
        )


def _topmost(paths: Iterable[str]) -> list[str]:
    """The paths that lie beneath no other of them."""
    found: list[str] = []
    for path in sorted(paths, key=lambda path: path.split("/")):
        if not (found and path.startswith(found[-1] + "/")):
            found.append(path)
    return found


def _is_directory(entry: Entry) -> bool:
    return entry.kind is FileKind.DIRECTORY


def batches(changes: Iterable[Change]) -> Iterator[list[Change]]:
    """Split the changes into requests: of BATCH_BYTES, or of one change that is larger."""
    batch: list[Change] = []
    size = 0
    for change in changes:
        if batch and size + change.size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(change)
        size += change.size
    if batch:
        yield batch
