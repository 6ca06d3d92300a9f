"""A layer's directory while it is filled: paths of the archive never lead outside it.

A path is resolved one component at a time from an open directory, each opened with O_NOFOLLOW, so the kernel
follows no link for us and no other path of the host can be reached, whatever the archive made before.
Symbolic links on the way are resolved here, as the container's root will see them: ".." stops at the top, and
absolute targets start there. openat2(2) with RESOLVE_IN_ROOT cannot do that, because a path resolves through
the layer and all layers below, which merge only when the overlay is mounted.

A parent directory that the archive does not contain gets the attributes of the one in the layers below, or
mode 0755 and owner root.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Sequence

from image import tree_ops
from image.budget import Limits, check

Path = tuple[bytes, ...]

OPAQUE = "trusted.overlay.opaque"
LINK_LIMIT = 40  # the kernel's MAXSYMLINKS
_CACHED = 64  # open directories
OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class TreeError(Exception):
    """A path of the archive cannot be made; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def is_whiteout(info: os.stat_result) -> bool:
    """Return whether a file is overlayfs's whiteout: a character device 0/0."""
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


class NeedsBelow(Exception):
    """Something of the layers below is needed, which are not there yet."""


class Tree:
    """The directory `root`, being filled, above the layers `lowers`, nearest first. Close it.

    With None for `lowers` there are some, not there yet: what needs them raises NeedsBelow.

    Paths are tuples of names relative to the root. Which of the layers below are hidden, and where, is read
    from the directory itself, so that memory does not grow with the number of whiteouts. Methods raise
    OverLimit for a directory that would lie deeper than `limits` allow.
    """

    def __init__(self, root: str, lowers: Sequence[str] | None, limits: Limits) -> None:
        self._limits = limits
        self._root = os.open(root, OPEN_DIRECTORY)
        self._lowers: list[int] = []
        self._awaits_lowers = lowers is None
        self._cache: dict[Path, int] = {}
        self.directories_made = 0
        try:
            for lower in lowers or ():
                self._lowers.append(os.open(lower, OPEN_DIRECTORY))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all descriptors."""
        for fd in (*self._cache.values(), *self._lowers, self._root):
            os.close(fd)
        self._cache.clear()
        self._lowers.clear()
        self._root = -1

    @property
    def has_lowers(self) -> bool:
        """Whether there are layers below."""
        return self._awaits_lowers or bool(self._lowers)

    # ---------------------------------------------------------------------------- resolving

    def directory(self, path: Path, *, make: bool = True) -> int:
        """Return a descriptor of this directory, valid until the next call; make what is missing.

        Raises TreeError when a component is a file, or is too deep or reached through too many links, and
        FileNotFoundError when `make` is false and the directory is not in this layer.
        """
        if not path:
            return self._root
        fd = self._cache.pop(path, None)
        if fd is None:
            return self._resolve(path, make)
        self._cache[path] = fd  # moved to the end: least recently used first
        return fd

    def _resolve(self, wanted: Path, make: bool) -> int:
        real = self._follow(wanted, lambda parent, name: self._step(parent, name, make))
        return self.directory(real) if real else self._root

    def real_path(self, path: Path) -> Path:
        """Return where a path leads in this layer and those below, without its last name, which is not
        followed. Makes nothing. Raises TreeError."""
        return (*self._follow(path[:-1], self._peek), path[-1])

    def _peek(self, parent: Path, name: bytes) -> bytes | None:
        """Return a link's target, or None for anything else, in this layer or below."""
        with contextlib.suppress(FileNotFoundError):
            at = self.directory(parent, make=False)
            info = os.stat(name, dir_fd=at, follow_symlinks=False)
            return os.readlink(name, dir_fd=at) if stat.S_ISLNK(info.st_mode) else None
        found = self.below((*parent, name))
        if found is None:
            return None
        holder, info = found
        try:
            return os.readlink(name, dir_fd=holder) if stat.S_ISLNK(info.st_mode) else None
        finally:
            os.close(holder)

    def _follow(self, wanted: Path, step: Callable[[Path, bytes], bytes | None]) -> Path:
        """Resolve a path name by name; `step` returns the target of a link, or None for a directory."""
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
            # `layer` limits names of entries; a link's target may lie deeper
            check(self._limits, "layer_depth", len(real) + 1)
            target = step(tuple(real), name)
            if target is None:
                real.append(name)
                continue
            links += 1
            if links > LINK_LIMIT:
                raise TreeError("too many symbolic links on the way")
            if target.startswith(b"/"):
                real.clear()
            todo.extend(reversed(target.split(b"/")))
        return tuple(real)

    def _step(self, parent: Path, name: bytes, make: bool) -> bytes | None:
        """Open `parent`/`name` of this layer into the cache and return None, or return a link's target."""
        path = (*parent, name)
        if path in self._cache:
            return None
        at = self._cache[parent] if parent else self._root
        try:
            fd = os.open(name, OPEN_DIRECTORY, dir_fd=at)
        except FileNotFoundError:
            target = self._from_below(at, path, make)
            if target is not None:
                return target
            fd = os.open(name, OPEN_DIRECTORY, dir_fd=at)
        except OSError:
            info = os.stat(name, dir_fd=at, follow_symlinks=False)
            if stat.S_ISLNK(info.st_mode):
                return os.readlink(name, dir_fd=at)
            if not is_whiteout(info):
                raise TreeError("a parent is not a directory") from None
            fd = self._replace_whiteout(at, name, make)
        self._remember(path, fd)
        return None

    def _replace_whiteout(self, at: int, name: bytes, make: bool) -> int:
        """Make a directory that hides what the whiteout in its place hid; return its descriptor."""
        if not make:
            raise FileNotFoundError
        os.unlink(name, dir_fd=at)
        os.mkdir(name, 0o755, dir_fd=at)
        self.directories_made += 1
        fd = os.open(name, OPEN_DIRECTORY, dir_fd=at)
        os.setxattr(fd, OPAQUE, b"y")
        return fd

    def _remember(self, path: Path, fd: int) -> None:
        self._cache[path] = fd
        if len(self._cache) > _CACHED:
            # close the least recently used, but no ancestor of `path`: they are still needed to resolve it
            for old in self._cache:
                if old != path[: len(old)]:
                    os.close(self._cache.pop(old))
                    break

    # -------------------------------------------------------------------------------- below

    def _hides(self, path: Path) -> bool:
        """Return whether this layer hides a path of the layers below: by a whiteout, an opaque directory, or
        anything else in place of a directory on the way."""
        at = os.dup(self._root)
        try:
            for name in path:
                if is_opaque(at):
                    return True
                try:
                    child = os.open(name, OPEN_DIRECTORY, dir_fd=at)
                except FileNotFoundError:
                    return False
                except OSError:
                    return True
                os.close(at)
                at = child
            return is_opaque(at)
        finally:
            os.close(at)

    def below(self, path: Path) -> tuple[int, os.stat_result] | None:
        """Find a path in the merged layers below, without following links.

        Returns a descriptor of its parent in the layer that has it, which the caller closes, and its status;
        None when it is absent or hidden. Raises NeedsBelow.
        """
        if self._hides(path):
            return None
        if self._awaits_lowers:
            raise NeedsBelow
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
        """Make a directory like the one below, or a plain one where there is none, and return None; return
        the target where the layers below have a symbolic link."""
        found = self.below(path) if self.has_lowers else None
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
        source = os.open(name, OPEN_DIRECTORY, dir_fd=parent)
        fd = os.open(name, OPEN_DIRECTORY, dir_fd=at)
        try:
            copy_attributes(source, fd, info)
        finally:
            os.close(fd)
            os.close(source)

    # ----------------------------------------------------------------------------- changing

    def clear(self, path: Path, at: int) -> None:
        """Delete what this layer has at `path`; `at` is the parent's descriptor. Raises FileNotFoundError."""
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
    """Return the directories `name` of a stack of directories, as overlayfs merges them (topmost first).

    Closes `holders`.
    """
    found: list[int] = []
    ended = False
    for fd in holders:
        try:
            if not ended:
                child = os.open(name, OPEN_DIRECTORY, dir_fd=fd)
                found.append(child)
                ended = is_opaque(child)
        except FileNotFoundError:
            pass
        except OSError:
            ended = True  # a whiteout or a file hides the layers further down
        finally:
            os.close(fd)
    return found


def is_opaque(fd: int | str) -> bool:
    """Return whether a directory hides what the layers below have in it."""
    try:
        return os.getxattr(fd, OPAQUE) == b"y"
    except OSError:
        return False


def copy_attributes(source: int, fd: int, info: os.stat_result) -> None:
    """Copy owner, mode, extended attributes and time, but not overlayfs's own attributes (trusted.*)."""
    os.fchown(fd, info.st_uid, info.st_gid)
    os.fchmod(fd, stat.S_IMODE(info.st_mode))
    for name in os.listxattr(source):
        if not name.startswith("trusted."):
            os.setxattr(fd, name, os.getxattr(source, name))
    os.utime(fd, ns=(info.st_mtime_ns, info.st_mtime_ns))


def copy_special(parent: int, at: int, name: bytes, info: os.stat_result) -> None:
    """Copy a symbolic link, FIFO, device or socket from directory `parent` to `at`, with owner, mode and
    time. Raises OSError."""
    if stat.S_ISLNK(info.st_mode):
        os.symlink(os.readlink(name, dir_fd=parent), name, dir_fd=at)
    else:
        os.mknod(name, stat.S_IFMT(info.st_mode) | 0o600, info.st_rdev, dir_fd=at)
    os.chown(name, info.st_uid, info.st_gid, dir_fd=at, follow_symlinks=False)
    if not stat.S_ISLNK(info.st_mode):
        os.chmod(name, stat.S_IMODE(info.st_mode), dir_fd=at)
    os.utime(name, ns=(info.st_mtime_ns, info.st_mtime_ns), dir_fd=at, follow_symlinks=False)
