"""A directory that is filled by someone else's wishes, with no way out of it.

Paths are walked one component at a time from an open directory, each opened with O_NOFOLLOW, so the
kernel never follows a link for us and no other path of the host can be reached, whatever the
archive made before. Links on the way are resolved here, in user space, as the final root would see
them: ".." stops at the top and absolute targets begin there. (openat2's RESOLVE_IN_ROOT cannot do
that job: what is walked is the layer and, behind it, all layers below, which only merge when the
overlay is mounted.)

A directory that the archive does not mention is made like the one below of that name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from image import tree_ops

Path = tuple[bytes, ...]

OPAQUE = "trusted.overlay.opaque"
LINK_LIMIT = 40  # as the kernel's MAXSYMLINKS
_CACHED = 64
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class TreeError(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def is_whiteout(info: os.stat_result) -> bool:
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


class Tree:
    """Owns its file descriptors: close it. `lowers` are the layers below, the nearest first."""

    def __init__(self, root: str, lowers: Sequence[str] = (), *, max_depth: int) -> None:
        self._max_depth = max_depth
        self._root = os.open(root, _OPEN)
        self._lowers: list[int] = []
        self._cache: dict[Path, int] = {}
        self._hidden: set[Path] = set()
        self.directories_made = 0
        try:
            for lower in lowers:
                self._lowers.append(os.open(lower, _OPEN))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for fd in (*self._cache.values(), *self._lowers, self._root):
            os.close(fd)
        self._cache.clear()
        self._lowers.clear()
        self._root = -1

    @property
    def has_lowers(self) -> bool:
        return bool(self._lowers)

    # ------------------------------------------------------------------------------ walking

    def directory(self, path: Path, *, make: bool = True) -> int:
        """A descriptor of this directory, valid until the next call.

        Raises TreeError where something is in the way, FileNotFoundError if `make` is false and it
        is not in this layer.
        """
        if not path:
            return self._root
        fd = self._cache.pop(path, None)
        if fd is None:
            return self._walk(path, make)
        self._cache[path] = fd  # the latest is at the end
        return fd

    def _walk(self, wanted: Path, make: bool) -> int:
        real: list[bytes] = []
        todo = list(reversed(wanted))
        links = 0
        while todo:
            name = todo.pop()
            if name in (b"", b"."):
                continue
            if name == b"..":
                del real[-1:]
                continue
            if len(real) == self._max_depth:
                # an entry's own name is limited before; here a link's target lies deeper
                raise TreeError(f"more than {self._max_depth} directories deep")
            target = self._step(tuple(real), name, make)
            if target is None:
                real.append(name)
                continue
            links += 1
            if links > LINK_LIMIT:
                raise TreeError("too many symbolic links on the way")
            if target.startswith(b"/"):
                real.clear()
            todo.extend(reversed(target.split(b"/")))
        return self.directory(tuple(real)) if real else self._root

    def _step(self, parent: Path, name: bytes, make: bool) -> bytes | None:
        """Make `parent`/`name` an open directory of this layer, or give the link's target."""
        path = (*parent, name)
        if path in self._cache:
            return None
        at = self._cache[parent] if parent else self._root
        try:
            fd = os.open(name, _OPEN, dir_fd=at)
        except FileNotFoundError:
            target = self._from_below(at, path, make)
            if target is not None:
                return target
            fd = os.open(name, _OPEN, dir_fd=at)
        except OSError:
            return self._link_target(at, name)
        self._remember(path, fd)
        return None

    def _link_target(self, at: int, name: bytes) -> bytes:
        if not stat.S_ISLNK(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
            raise TreeError("a parent is not a directory")
        return os.readlink(name, dir_fd=at)

    def _remember(self, path: Path, fd: int) -> None:
        self._cache[path] = fd
        if len(self._cache) > _CACHED:
            # ancestors of what was just opened are needed while walking: drop another
            for old in self._cache:
                if old != path[: len(old)]:
                    os.close(self._cache.pop(old))
                    break

    # -------------------------------------------------------------------------------- below

    def hide(self, path: Path) -> None:
        """From now on nothing below shines through here: a whiteout, or an opaque directory."""
        self._hidden.add(path)

    def is_hidden(self, path: Path) -> bool:
        return path in self._hidden

    def below(self, path: Path) -> tuple[int, os.stat_result] | None:
        """Where the layers below, merged, have this path: a descriptor of its parent (the caller
        closes it), and what it is. Links on the way are not followed."""
        if any(path[:n] in self._hidden for n in range(1, len(path) + 1)):
            return None
        holders = [os.dup(fd) for fd in self._lowers]
        try:
            for name in path[:-1]:
                holders = _merged(holders, name)
            for fd in holders:
                try:
                    info = os.stat(path[-1], dir_fd=fd, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                return None if is_whiteout(info) else (os.dup(fd), info)
            return None
        finally:
            for fd in holders:
                os.close(fd)

    def _from_below(self, at: int, path: Path, make: bool) -> bytes | None:
        """Copy the directory up, or make a plain one; a link below gives its target instead."""
        found = self.below(path) if self._lowers else None
        if found is None:
            if not make:
                raise FileNotFoundError
            os.mkdir(path[-1], 0o755, dir_fd=at)
            self.directories_made += 1
            return None
        parent, info = found
        try:
            if stat.S_ISLNK(info.st_mode):
                return os.readlink(path[-1], dir_fd=parent)
            if not stat.S_ISDIR(info.st_mode):
                raise TreeError("a parent is not a directory")
            if not make:
                raise FileNotFoundError
            self._copy_directory(at, parent, path[-1], info)
        finally:
            os.close(parent)
        return None

    def _copy_directory(self, at: int, parent: int, name: bytes, info: os.stat_result) -> None:
        os.mkdir(name, 0o700, dir_fd=at)
        self.directories_made += 1
        source = os.open(name, _OPEN, dir_fd=parent)
        fd = os.open(name, _OPEN, dir_fd=at)
        try:
            copy_attributes(source, fd, info)
        finally:
            os.close(fd)
            os.close(source)

    # ----------------------------------------------------------------------------- changing

    def clear(self, path: Path, at: int) -> None:
        """Remove what this layer has here so far; `at` is the parent's descriptor."""
        name = path[-1]
        if stat.S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
            self._forget(path)
            tree_ops.remove(name, at=at)
        else:
            os.unlink(name, dir_fd=at)

    def _forget(self, path: Path) -> None:
        for old in [p for p in self._cache if p[: len(path)] == path]:
            os.close(self._cache.pop(old))


def _merged(holders: list[int], name: bytes) -> list[int]:
    """Descend by one name in a stack of directories, as overlayfs merges them. Closes `holders`."""
    found: list[int] = []
    ended = False
    for fd in holders:
        try:
            if not ended:
                child = os.open(name, _OPEN, dir_fd=fd)
                found.append(child)
                ended = _is_opaque(child)
        except FileNotFoundError:
            pass
        except OSError:
            ended = True  # a whiteout or a file hides what is further down
        finally:
            os.close(fd)
    return found


def _is_opaque(fd: int) -> bool:
    try:
        return os.getxattr(fd, OPAQUE) == b"y"
    except OSError:
        return False


def copy_attributes(source: int, fd: int, info: os.stat_result) -> None:
    """Owner, mode, extended attributes and time. What overlayfs noted for itself stays behind."""
    os.fchown(fd, info.st_uid, info.st_gid)
    os.fchmod(fd, stat.S_IMODE(info.st_mode))
    for name in os.listxattr(source):
        if not name.startswith("trusted."):
            os.setxattr(fd, name, os.getxattr(source, name))
    os.utime(fd, ns=(info.st_mtime_ns, info.st_mtime_ns))
