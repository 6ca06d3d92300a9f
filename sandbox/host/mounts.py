"""What the daemon does with mounts: bind them, copy trees of them, and unmount what lies below a directory.

Every target here lies in a directory that only root can write and no guest can (shares are read-only but
for what is mounted in them), so no component of the path can be a planted symbolic link. All functions
block and need CAP_SYS_ADMIN; failures are OSError with the target as file name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from sandbox.host import mount_flags, syscalls, threads

T = TypeVar("T")

_DETACH = syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW
_ESCAPE = re.compile(rb"\\([0-7]{3})")


def bind(source: Path, target: Path, *, recursive: bool = True) -> None:
    """Bind-mount `source` on `target`; `recursive` includes the mounts below it (mount(2), MS_BIND)."""
    syscalls.mount(source, target, flags=mount_flags.MS_BIND | (mount_flags.MS_REC if recursive else 0))


def make_readonly(target: Path, *, recursive: bool = False) -> None:
    """Make one mount read-only, or with `recursive` all mounts below it too (mount_setattr(2))."""
    flags = syscalls.AT_RECURSIVE if recursive else 0
    syscalls.mount_setattr(syscalls.AT_FDCWD, target, flags, set=syscalls.MOUNT_ATTR_RDONLY)


def make_writable(target: Path) -> None:
    """Make one mount writable, but not those below it (mount_setattr(2))."""
    syscalls.mount_setattr(syscalls.AT_FDCWD, target, 0, clear=syscalls.MOUNT_ATTR_RDONLY)


def set_propagation(target: Path, flags: int) -> None:
    """Set the propagation of a mount: MS_PRIVATE, MS_SLAVE or MS_SHARED, with MS_REC of all below it too
    (mount_namespaces(7))."""
    syscalls.mount("", target, flags=flags)


def clone_tree(source: int, what: Path, *, recursive: bool = True) -> int:
    """Copy the mount that `source` (an O_PATH descriptor) is in, from there on.

    `recursive` includes all mounts below it.

    Returns a descriptor that the caller owns. The copy is attached nowhere yet: it lasts as long as the
    descriptor, unless `attach_tree` mounts it (open_tree(2), OPEN_TREE_CLONE). `what` names the source in
    errors.
    """
    flags = syscalls.OPEN_TREE_CLONE | os.O_CLOEXEC | syscalls.AT_EMPTY_PATH
    flags |= syscalls.AT_RECURSIVE if recursive else 0
    return syscalls.open_tree(source, "", flags, what=what)


def set_tree_attributes(
    tree: int,
    what: Path,
    *,
    propagation: int,
    readonly: bool = False,
    recursive: bool = False,
    inert: bool = False,
) -> None:
    """Set the propagation of a copied tree, top and below, and add attributes to it (mount_setattr(2)).

    `readonly` applies to the top, with `recursive` also to all below it. `inert` is nosuid and nodev of all:
    set-id programs and device nodes have no effect.
    """
    below = syscalls.AT_RECURSIVE
    _set(tree, what, below, propagation=propagation)
    if readonly:
        _set(tree, what, below if recursive else 0, attributes=syscalls.MOUNT_ATTR_RDONLY)
    if inert:
        _set(tree, what, below, attributes=syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV)


def _set(tree: int, what: Path, flags: int, *, attributes: int = 0, propagation: int = 0) -> None:
    syscalls.mount_setattr(
        tree, "", syscalls.AT_EMPTY_PATH | flags, set=attributes, propagation=propagation, what=what
    )


def attach_tree(tree: int, target: int, what: Path) -> None:
    """Mount a copied tree on `target`, an O_PATH descriptor (move_mount(2)). `what` names it in errors."""
    flags = syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_T_EMPTY_PATH
    syscalls.move_mount(tree, "", target, "", flags, what=what)


def detach(point: Path) -> None:
    """Unmount the mount on top at `point`; what still uses it keeps it (umount2(2), MNT_DETACH)."""
    syscalls.umount2(point, _DETACH)


def in_namespace(namespace: int, action: Callable[[], T]) -> T:
    """Run `action` in the mount namespace of this descriptor, with that namespace's root as its root.

    It runs in a thread that ends with it, so no thread of the daemon stays in there. Returns what `action`
    returns, and raises what it raises.
    """
    return threads.call_in_namespace(namespace, syscalls.CLONE_NEWNS, action, "husk-mounts")


def mounts_below(root: Path) -> list[Path]:
    """List the mount points at and below `root`, in the order in which they were made."""
    text = os.fsencode(root)
    points = (point for _, point in _table() if point == text or point.startswith(text + b"/"))
    return [Path(os.fsdecode(point)) for point in points]


def top_mounts() -> dict[str, int]:
    """Map each mount point to the id of the newest mount there. An id is unique while its mount exists."""
    return {os.fsdecode(point): id for id, point in _table()}


def mounted_roots() -> set[str]:
    """Return what is mounted in any mount namespace that has a process: each mount's root, as a path in its
    file system (proc(5), mountinfo).

    A process that ends meanwhile is left out.
    """
    roots: set[str] = set()
    seen: set[Path] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            namespace = (process / "ns/mnt").readlink()
            if namespace not in seen:
                lines = (process / "mountinfo").read_bytes().splitlines()
                seen.add(namespace)
                roots |= {os.fsdecode(_unescaped(line.split(b" ", 4)[3])) for line in lines}
    return roots


def _unescaped(field: bytes) -> bytes:
    return _ESCAPE.sub(lambda found: bytes([int(found[1], 8)]), field)


def _table() -> Iterator[tuple[int, bytes]]:
    """Id and point of each mount. Space, tab, newline and backslash are octal escapes (proc(5))."""
    with Path("/proc/self/mountinfo").open("rb") as table:
        for line in table:
            fields = line.split(b" ", 5)
            yield int(fields[0]), _unescaped(fields[4])


def unmount_tree(root: Path) -> None:
    """Detach every mount at and below `root`, newest first. Idempotent."""
    for point in reversed(mounts_below(root)):
        try:
            detach(point)
        except OSError as error:
            # EINVAL: propagation already unmounted it together with its parent
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise


def unmount_beneath(root: Path, names: Iterable[str]) -> None:
    """Detach every mount at and below these names in `root`, as `unmount_tree` does. Idempotent."""
    wanted = set(names)
    for top in {point.relative_to(root).parts[:1] for point in mounts_below(root)}:
        if top and top[0] in wanted:
            unmount_tree(root / top[0])


def unmount_all(point: Path) -> None:
    """Detach every mount at `point`, of which there may be several on top of one another. Idempotent."""
    while True:
        try:
            detach(point)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return
            raise
