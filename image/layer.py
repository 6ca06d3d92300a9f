"""Unpack one layer's archive into an empty directory, in the form that overlayfs mounts.

The archive is untrusted and this code runs as root. This module decides what each kind of entry may do;
`tree` keeps every path inside the directory; `tar` bounds numbers and lengths.

    .wh.NAME       hides NAME of the layers below: becomes a character device 0/0
    .wh..wh..opq   hides the directory's content in the layers below: becomes trusted.overlay.opaque
    last wins      an entry replaces an earlier one of the same name, whatever the kinds

Owners, modes and times of directories are set at the end. Until then directories belong to root and have no
set-group-id bit, so most files need no chown; and each new entry would change its directory's time again.

Rules: OCI image-spec, layer.md; Linux Documentation/filesystems/overlayfs.rst, "whiteouts and opaque
directories".
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from image import tar, tree
from image.attributes import Attributes, DeferredAttributes, set_xattrs
from image.budget import Budget, Limits, OverLimit, Watch, check
from image.errors import DiskFull, LayerRejected, StorageFailed
from image.free_space import describe_free
from image.tar import Entry
from image.tree_ops import Usage
from sandbox.host.ids import ID_MAX

WHITEOUT_PREFIX = b".wh."
OPAQUE_MARKER = b".wh..wh..opq"
AUFS_PREFIX = b".wh..wh."  # other metadata of aufs, which layer.md reserves: ignored

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TIME_LIMIT_NS = (1 << 33) * 1_000_000_000  # until the year 2242; filesystems clamp it further
_PAGE = 4096
_COPY = 64 << 20  # bytes copied between two checks for cancellation

# Errors that the entry itself causes; any other is a failure of the host.
_REJECTED = frozenset(
    (
        errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.EMLINK, errno.ENAMETOOLONG, errno.ENOENT,
        errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM, errno.EFBIG, errno.E2BIG, errno.ERANGE, errno.EILSEQ,
        errno.EOVERFLOW, errno.ENOTSUP,
    )
)  # fmt: skip
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))


def unpack(
    chunks: Iterator[bytes],
    target: str,
    *,
    lowers: Sequence[str] | None = (),
    limits: Limits | None = None,
    watch: Watch | None = None,
) -> Usage:
    """Unpack into `target`, an empty directory; `lowers` are the layers below, nearest first, or None where
    these are not there yet.

    Reads `chunks` to their end, as their digest covers what follows the archive too. Returns what the layer
    occupies. Blocking; checks `watch` at every read and entry. Raises LayerRejected (the archive is at
    fault), DiskFull, StorageFailed, Stopped, and NeedsBelow where the result depends on what
    lies below and that is not there yet; then `target` is left partly filled, for the caller to delete.
    Memory does not grow with the archive.
    """
    limits = limits or Limits()
    watch = watch or Watch(limits, "unpack_s")
    unpacker = _Unpacker(target, lowers, limits, watch)
    try:
        return unpacker.run(tar.Chunks(_watched(chunks, watch)))
    finally:
        unpacker.close()


def _watched(chunks: Iterator[bytes], watch: Watch) -> Iterator[bytes]:
    """Yield the chunks. Every read passes here: an entry's data, extension headers, what follows the end."""
    for chunk in chunks:
        watch.check()
        yield chunk


class _Unpacker:
    def __init__(self, target: str, lowers: Sequence[str] | None, limits: Limits, watch: Watch) -> None:
        self._target = target
        self._limits = limits
        self._watch = watch
        Path(target).chmod(0o755)
        os.chown(target, 0, 0)
        _drop_default_acl(target)
        self._tree = tree.Tree(target, lowers, limits)
        self._umask = _umask()
        self._directories = DeferredAttributes(str(Path(target).parent))
        self._entries = Budget(limits, "layer_entries")
        self._claimed = Budget(limits, "layer_bytes")
        self._pages = 0
        self._inodes = 1
        # parent of the previous entry: archives list a directory's entries one after the other
        self._last_parent: bytes | None = None
        self._last_path: tree.Path = ()
        self._entry: Entry | None = None
        self._before = b""  # name of the last entry that was made

    def close(self) -> None:
        self._tree.close()
        self._directories.close()

    # ------------------------------------------------------------------------------ entries

    def run(self, chunks: tar.Chunks) -> Usage:
        try:
            for entry in tar.entries(chunks, self._limits):
                self._entry = entry
                self._check(entry)
                self._make(entry, chunks)
                self._entry, self._before = None, entry.name
            chunks.drain(Budget(self._limits, "layer_tail_bytes"))
            self._finish_directories()
        except (tar.TarError, tree.TreeError, OverLimit) as error:
            raise LayerRejected(self._where(), error.reason) from error
        except OSError as error:
            raise self._image_error(error) from error
        directories = self._tree.directories_made
        return Usage(bytes=_PAGE * (self._pages + directories), inodes=self._inodes + directories)

    def _where(self) -> str:
        if self._entry is not None:
            return self._entry.name.decode("utf-8", "backslashreplace")
        before = self._before.decode("utf-8", "backslashreplace")
        return f"what follows {before}" if before else ""

    def _image_error(self, error: OSError) -> Exception:
        if error.errno in _FULL:
            return DiskFull(self._target, "unpacking a layer", describe_free(Path(self._target)))
        problem = error.strerror or str(error)
        if error.errno in _REJECTED and self._entry is not None:
            return LayerRejected(self._where(), problem)
        return StorageFailed(self._target, f"unpacking {self._where()!r}", error.errno or 0, problem)

    def _check(self, entry: Entry) -> None:
        self._watch.check()
        self._entries.spend()
        self._claimed.spend(entry.size)
        if not 0 <= entry.uid <= ID_MAX or not 0 <= entry.gid <= ID_MAX:
            raise tar.TarError(f"impossible owner {entry.uid}:{entry.gid}")
        entry.mtime_ns = max(-_TIME_LIMIT_NS, min(entry.mtime_ns, _TIME_LIMIT_NS))
        if entry.xattrs:
            entry.xattrs = tuple((name, value) for name, value in entry.xattrs if _is_kept_xattr(name))

    def _make(self, entry: Entry, chunks: tar.Chunks) -> None:
        parent, name = self._split(entry.name)
        if not name:
            self._make_directory((), entry)  # "./", the layer's root
        elif name.startswith(WHITEOUT_PREFIX):
            self._white_out((*parent, name))
        elif entry.kind == tar.REGULAR:
            self._make_file((*parent, name), entry, chunks)
            return
        elif entry.kind == tar.DIRECTORY:
            self._make_directory((*parent, name), entry)
        else:
            self._make_other((*parent, name), entry)
        if entry.stored:
            chunks.skip(entry.stored)
            tar.skip_padding(chunks, entry.stored)

    def _split(self, name: bytes) -> tuple[tree.Path, bytes]:
        """Return an entry's parent and last name. "." and ".." are resolved as text, without following links,
        and the path may not leave the layer (layer.md: paths are relative to the layer's root)."""
        parent, _, base = name.rpartition(b"/")
        if parent == self._last_parent and base not in (b"", b".", b".."):
            return self._last_path, base
        parts: list[bytes] = []
        for part in name.split(b"/"):
            if part == b"..":
                if not parts:
                    raise tar.TarError("the path climbs out of the layer")
                parts.pop()
            elif part not in (b"", b"."):
                parts.append(part)
        if b"\0" in name:
            raise tar.TarError("a zero byte in a name")
        check(self._limits, "layer_depth", len(parts))
        if not parts:
            return (), b""
        path = tuple(parts[:-1])
        if base == parts[-1]:
            self._last_parent, self._last_path = parent, path
        return path, parts[-1]

    # --------------------------------------------------------------------------------- kinds

    def _make_file(self, path: tree.Path, entry: Entry, chunks: tar.Chunks) -> None:
        name = path[-1]
        if b"\0" in name:
            raise tar.TarError("a zero byte in a name")
        at = self._tree.directory(path[:-1])
        # only root may open the file before its owner and mode are set
        plain = not (entry.mode & self._umask or entry.mode & 0o7000)
        mode = entry.mode if plain else 0o600
        try:
            fd = os.open(name, _CREATE, mode, dir_fd=at)
        except FileExistsError:
            self._tree.clear(path, at)
            fd = os.open(name, _CREATE, mode, dir_fd=at)
        try:
            if entry.segments is not None:
                _write_sparse(fd, entry, chunks)
            elif entry.stored:
                for piece in chunks.pieces(entry.stored):
                    _write_all(fd, piece)
            if entry.uid or entry.gid:
                os.fchown(fd, entry.uid, entry.gid)
                plain = False
            if not plain:
                os.fchmod(fd, entry.mode)  # after chown, which clears set-id bits (chown(2))
            if entry.xattrs:
                set_xattrs(fd, entry.xattrs)  # after chown, which clears file capabilities (capabilities(7))
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)
        tar.skip_padding(chunks, entry.stored)
        self._inodes += 1
        self._pages += (entry.stored + _PAGE - 1) // _PAGE

    def _make_directory(self, path: tree.Path, entry: Entry) -> None:
        if path:
            at = self._tree.directory(path[:-1])
            self._ensure_directory(path, at)
        # set at the end, as entries that follow change the times
        xattrs = tuple((os.fsencode(name), value) for name, value in entry.xattrs)
        attributes = Attributes(entry.mode, entry.uid, entry.gid, entry.mtime_ns, xattrs)
        self._directories.append(path, attributes)

    def _ensure_directory(self, path: tree.Path, at: int) -> None:
        name = path[-1]
        replaced = False
        try:
            os.mkdir(name, 0o700, dir_fd=at)
        except FileExistsError:
            if stat.S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
                return
            self._tree.clear(path, at)
            os.mkdir(name, 0o700, dir_fd=at)
            # the file, link or whiteout that was here hid a directory below: the new one must not merge
            replaced = True
        self._inodes += 1
        self._pages += 1
        if replaced:
            self._make_opaque(path)

    def _make_other(self, path: tree.Path, entry: Entry) -> None:
        """Make a link, device or FIFO. Each is one call, so "last wins" is one removal before it."""
        name = path[-1]
        if b"\0" in name or b"\0" in entry.link:
            raise tar.TarError("a zero byte in a name")
        if entry.kind == tar.HARD_LINK:
            self._link(path, entry)
            return
        at = self._tree.directory(path[:-1])
        self._clear(path, at)
        match entry.kind:
            case tar.SYMLINK:
                if not entry.link:
                    raise tar.TarError("a symbolic link to nothing")
                os.symlink(entry.link, name, dir_fd=at)
            case tar.CHAR | tar.BLOCK_DEVICE:
                os.mknod(name, _device_mode(entry), os.makedev(entry.major, entry.minor), dir_fd=at)
            case tar.FIFO:
                os.mkfifo(name, 0o600, dir_fd=at)
            case _:
                raise tar.TarError(f"unknown kind of entry {entry.kind!r}")
        os.chown(name, entry.uid, entry.gid, dir_fd=at, follow_symlinks=False)
        if entry.kind != tar.SYMLINK:
            # chmod follows links, but this was just made and is not one, and nothing else writes here
            os.chmod(name, entry.mode, dir_fd=at)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=at, follow_symlinks=False)
        self._inodes += 1

    def _clear(self, path: tree.Path, at: int) -> None:
        try:
            self._tree.clear(path, at)
        except FileNotFoundError:
            return

    # --------------------------------------------------------------------------------- links

    def _link(self, path: tree.Path, entry: Entry) -> None:
        """Make a second name of a file of this layer, or of a layer below, which is first copied up.

        A target that is a symbolic link is linked itself, not followed, as tar(1) does.
        """
        target_parent, target_name = self._split(entry.link)
        target = (*target_parent, target_name)
        if not target_name or target_name.startswith(WHITEOUT_PREFIX):
            raise tar.TarError("a hard link to something that cannot be linked")
        if target == path:
            raise tar.TarError("a hard link to itself")
        try:
            source = os.dup(self._tree.directory(target_parent, make=False))
        except FileNotFoundError:
            source = self._copy_up(target)
        try:
            info = self._target_status(target, source)
            if stat.S_ISDIR(info.st_mode) or tree.is_whiteout(info):
                raise tar.TarError("a hard link to something that cannot be linked")
            at = self._tree.directory(path[:-1])
            if _is_same_file(at, path[-1], info):
                return
            self._clear(path, at)
            os.link(target_name, path[-1], src_dir_fd=source, dst_dir_fd=at, follow_symlinks=False)
        finally:
            os.close(source)

    def _target_status(self, target: tree.Path, source: int) -> os.stat_result:
        try:
            return os.stat(target[-1], dir_fd=source, follow_symlinks=False)
        except FileNotFoundError:
            os.close(self._copy_up(target))
            return os.stat(target[-1], dir_fd=source, follow_symlinks=False)

    def _copy_up(self, target: tree.Path) -> int:
        """Copy a file of a layer below into this one, as overlayfs does before a link(2) to it.

        Returns a descriptor of its new parent, which the caller closes.
        """
        target = self._tree.real_path(target)
        found = self._tree.below(target)
        if found is None:
            raise tar.TarError("a hard link to a file that is not there")
        parent, info = found
        try:
            if stat.S_ISDIR(info.st_mode):
                raise tar.TarError("a hard link to something that cannot be linked")
            self._claimed.spend(info.st_size)
            at = os.dup(self._tree.directory(target[:-1]))
            try:
                if stat.S_ISREG(info.st_mode):
                    self._copy_file(parent, at, target[-1], info)
                else:
                    tree.copy_special(parent, at, target[-1], info)
            except BaseException:
                os.close(at)
                raise
        finally:
            os.close(parent)
        self._inodes += 1
        self._pages += (info.st_size + _PAGE - 1) // _PAGE
        return at

    def _copy_file(self, parent: int, at: int, name: bytes, info: os.stat_result) -> None:
        source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            fd = os.open(name, _CREATE, 0o600, dir_fd=at)
            try:
                while os.copy_file_range(source, fd, _COPY):
                    self._watch.check()
                tree.copy_attributes(source, fd, info)
            finally:
                os.close(fd)
        finally:
            os.close(source)

    # ----------------------------------------------------------------------------- whiteouts

    def _white_out(self, path: tree.Path) -> None:
        name = path[-1]
        parent = path[:-1]
        if name == OPAQUE_MARKER:
            self._tree.directory(parent)
            self._make_opaque(parent)
            return
        if name.startswith(AUFS_PREFIX):
            return
        hidden = name.removeprefix(WHITEOUT_PREFIX)
        if hidden in (b"", b".", b"..") or b"\0" in hidden:
            raise tar.TarError("a whiteout of something outside its directory")
        if not self._tree.has_lowers:
            return  # the lowest layer has nothing to hide
        self._hide((*parent, hidden))

    def _hide(self, path: tree.Path) -> None:
        """Hide a path of the layers below. Whiteouts do not apply to entries of the same layer (layer.md,
        "Whiteouts"), so a directory that this layer has here stays, and becomes opaque."""
        at = self._tree.directory(path[:-1])
        try:
            info = os.stat(path[-1], dir_fd=at, follow_symlinks=False)
        except FileNotFoundError:
            os.mknod(path[-1], stat.S_IFCHR | 0o000, os.makedev(0, 0), dir_fd=at)
            self._inodes += 1
            return
        if stat.S_ISDIR(info.st_mode):
            self._make_opaque(path)

    def _make_opaque(self, path: tree.Path) -> None:
        if self._tree.has_lowers:
            os.setxattr(self._tree.directory(path), tree.OPAQUE, b"y")

    # --------------------------------------------------------------------------- directories

    def _finish_directories(self) -> None:
        """Set the attributes of directories, in the archive's order: the last entry of a name wins."""
        for path, attributes in self._directories:
            self._watch.check()
            try:
                fd = self._open_directory(path)
            except (OSError, tree.TreeError):
                continue  # a later entry replaced it
            try:
                attributes.apply(fd)
            except tar.TarError as error:
                raise LayerRejected(os.fsdecode(b"/".join(path)), error.reason) from error
            finally:
                os.close(fd)

    def _open_directory(self, path: tree.Path) -> int:
        """Open a directory of this layer, but no link that took its place. Raises OSError, TreeError."""
        parent = self._tree.directory(path[:-1], make=False)
        return os.open(path[-1] if path else b".", tree.OPEN_DIRECTORY, dir_fd=parent)


# ---------------------------------------------------------------------------------- helpers


def _is_kept_xattr(name: str) -> bool:
    """Return whether an extended attribute of the archive is set; raise TarError for a forbidden one.

    trusted.overlay.* controls overlayfs (redirect, metacopy, opaque), so no trusted.* may come from an image,
    and user.overlay.* is its form for mounts with `userxattr`. Labels of the builder's host
    (security.selinux, security.ima) have no meaning here; security.capability is part of the file.
    """
    if name.startswith("trusted."):
        raise tar.TarError(f"extended attribute {name} is not allowed")
    return name == "security.capability" or (
        name.startswith("user.") and not name.startswith("user.overlay.")
    )


def _device_mode(entry: Entry) -> int:
    if entry.kind == tar.BLOCK_DEVICE:
        return stat.S_IFBLK | 0o600
    if entry.major == 0 and entry.minor == 0:
        raise tar.TarError("a device 0/0 would be taken for a whiteout")
    return stat.S_IFCHR | 0o600


def _write_all(fd: int, piece: memoryview) -> None:
    while (written := os.write(fd, piece)) < len(piece):
        piece = piece[written:]


def _write_sparse(fd: int, entry: Entry, chunks: tar.Chunks) -> None:
    for offset, length in entry.segments or ():
        os.lseek(fd, offset, os.SEEK_SET)
        for piece in chunks.pieces(length):
            _write_all(fd, piece)
    os.ftruncate(fd, entry.size)


def _is_same_file(at: int, name: bytes, info: os.stat_result) -> bool:
    """Return whether both names are already one file: making the link would first remove it."""
    try:
        existing = os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (existing.st_dev, existing.st_ino) == (info.st_dev, info.st_ino)


def _drop_default_acl(target: str) -> None:
    """Remove the default ACL that `target` inherited: every file in it would inherit it too (acl(5))."""
    try:
        os.removexattr(target, "system.posix_acl_default")
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.ENOTSUP):
            raise


def _umask() -> int:
    """Return the process's umask. To read it by umask(2) would change it for other threads meanwhile."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o777  # unknown: set every mode explicitly
