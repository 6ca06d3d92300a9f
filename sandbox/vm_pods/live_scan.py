"""Reading a tree of live files from the host, bounded in bytes, entries and depth. Blocking.

The files are the kubelet's, and yet no link is followed: every file is opened by its name in a directory that
is open already. Nothing stays open, as that would keep the kubelet from unmounting a Secret's tmpfs.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.host.ids import to_outside
from sandbox.spec import UserNamespace, Value
from sandbox.vm_pods.live_tree import ROOT, Entry, FileKind, Tree

MAX_DEPTH = 16
MAX_PATH_BYTES = 2048
OVERFLOW_ID = 65534  # of an owner that a user namespace does not map
SETTLED_NS = 100_000_000  # far above the resolution of a file's times
PAGE = 4096
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Limits(Value, frozen=True, kw_only=True):
    """What a tree may have."""

    total_bytes: int
    file_bytes: int
    entries: int


class Unsuitable(Exception):
    """The tree cannot be copied; the text says why."""


class RootGone(Exception):
    """The source's path names another file now, or none. Who has mounted the old one keeps it as it is."""


class Moved(Exception):
    """A file disappeared while the tree was read."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The root of a tree on the host: its path without links, and the inode that it had when it was found."""

    path: str
    device: int
    inode: int
    is_directory: bool
    ids: UserNamespace | None = None  # shifts the owners

    @property
    def key(self) -> str:
        """Return the name of its copy in the guest: the same for the same inode at the same path."""
        ids = () if self.ids is None else (self.ids.uids, self.ids.gids)
        text = repr((self.path, self.device, self.inode, ids))
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]


def find_source(path: str, ids: UserNamespace | None) -> Source:
    """Return what a mount's path names. Raises OSError."""
    real = Path(os.path.realpath(path))
    info = real.lstat()
    return Source(
        path=str(real),
        device=info.st_dev,
        inode=info.st_ino,
        is_directory=stat.S_ISDIR(info.st_mode),
        ids=ids,
    )


def scan(
    source: Source, known: Mapping[str, Entry], limits: Limits, watch: Callable[[int, str], None]
) -> Tree:
    """Read the tree; `watch` is called with each directory (or the single file) before it is read.

    `known` are entries of the last scan: an unchanged file is not read again. Raises Unsuitable, RootGone,
    Moved, and what `watch` raises.
    """
    try:
        root = os.open(source.path, READ)
    except OSError as error:
        raise RootGone(str(error)) from error
    try:
        info = os.fstat(root)
        if (info.st_dev, info.st_ino) != (source.device, source.inode):
            raise RootGone(f"{source.path} was replaced")
        reader = _Reader(source, known, limits, watch)
        watch(root, source.path)
        if source.is_directory:
            reader.add_directory(ROOT, root)
        else:
            reader.add_file(ROOT, root)
        return Tree(entries=reader.entries, content=reader.content, size=reader.size)
    except FileNotFoundError as error:
        raise Moved(str(error)) from error
    except OSError as error:
        if error.errno in (errno.ESTALE, errno.ELOOP, errno.ENOTDIR):
            raise Moved(str(error)) from error
        raise
    finally:
        os.close(root)


@dataclass
class _Reader:
    source: Source
    known: Mapping[str, Entry]
    limits: Limits
    watch: Callable[[int, str], None]
    entries: dict[str, Entry] = field(default_factory=dict)
    content: dict[str, bytes] = field(default_factory=dict)
    size: int = 0

    def add_directory(self, path: str, directory: int) -> None:
        """Add an open directory and all that it holds; links first (a link's target is complete)."""
        if path.count("/") > MAX_DEPTH:
            raise Unsuitable(f"it is deeper than {MAX_DEPTH} directories")
        self._add(path, FileKind.DIRECTORY, os.fstat(directory))
        beneath = []
        for name in sorted(os.listdir(directory)):
            info = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISLNK(info.st_mode):
                target = os.readlink(name, dir_fd=directory)
                self._check_text(target)
                self._add(f"{path}/{name}", FileKind.LINK, info, target=target)
            else:
                beneath.append(name)
        for name in beneath:
            self._add_beneath(f"{path}/{name}", name, directory)

    def _add_beneath(self, path: str, name: str, directory: int) -> None:
        info = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISDIR(info.st_mode) and not stat.S_ISREG(info.st_mode):
            raise Unsuitable(f"{self._shown(path)} is not a file, directory or link")
        file = os.open(name, READ, dir_fd=directory)
        try:
            if os.fstat(file).st_dev != self.source.device:
                raise Unsuitable(f"{self._shown(path)} is on another file system")
            if stat.S_ISDIR(os.fstat(file).st_mode):
                self.watch(file, self._shown(path))
                self.add_directory(path, file)
            else:
                self.add_file(path, file)
        finally:
            os.close(file)

    def add_file(self, path: str, file: int) -> None:
        """Add an open file, with its content unless it is as it was."""
        info = os.fstat(file)
        if not stat.S_ISREG(info.st_mode):
            raise Unsuitable(f"{self._shown(path)} is not a file, directory or link")
        if info.st_size > self.limits.file_bytes:
            raise Unsuitable(f"{self._shown(path)} is larger than {self.limits.file_bytes} bytes")
        stamp = (info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        before = self.known.get(path)
        if before and before.stamp == stamp and before.inode == info.st_ino:
            self._add(path, FileKind.FILE, info, digest=before.digest, stamp=stamp, size=info.st_size)
            return
        content = self._read(path, file)
        # two writes within the resolution of the times have the same stamp: a recent one is read again
        settled = time.time_ns() - info.st_ctime_ns > SETTLED_NS
        self._add(
            path,
            FileKind.FILE,
            info,
            digest=hashlib.sha256(content).digest(),
            stamp=stamp if settled else (),
            size=len(content),
        )
        self.content[path] = content

    def _read(self, path: str, file: int) -> bytes:
        with open(file, "rb", closefd=False) as stream:
            content = stream.read(self.limits.file_bytes + 1)
        if len(content) > self.limits.file_bytes:
            raise Unsuitable(f"{self._shown(path)} is larger than {self.limits.file_bytes} bytes")
        return content

    def _add(
        self,
        path: str,
        kind: FileKind,
        info: os.stat_result,
        *,
        target: str = "",
        digest: bytes = b"",
        stamp: tuple[int, ...] = (),
        size: int = 0,
    ) -> None:
        self._check_text(path)
        self.size += -(-size // PAGE) * PAGE
        if len(self.entries) >= self.limits.entries:
            raise Unsuitable(f"it has more than {self.limits.entries} files")
        if self.size > self.limits.total_bytes:
            raise Unsuitable(f"it has more than {self.limits.total_bytes} bytes")
        ids = self.source.ids
        self.entries[path] = Entry(
            kind=kind,
            mode=0 if kind is FileKind.LINK else stat.S_IMODE(info.st_mode),
            uid=to_outside(ids.uids, info.st_uid, unmapped=OVERFLOW_ID) if ids else info.st_uid,
            gid=to_outside(ids.gids, info.st_gid, unmapped=OVERFLOW_ID) if ids else info.st_gid,
            target=target,
            digest=digest,
            inode=info.st_ino,
            mtime_ns=info.st_mtime_ns,
            stamp=stamp,
        )

    def _check_text(self, text: str) -> None:
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise Unsuitable(f"the name {text!r} is not UTF-8") from error
        if size > MAX_PATH_BYTES:
            raise Unsuitable(f"a name is longer than {MAX_PATH_BYTES} bytes")

    def _shown(self, path: str) -> str:
        return str(Path(self.source.path) / path.removeprefix(ROOT).lstrip("/"))
