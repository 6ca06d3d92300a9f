"""mount(2) and its successors for this package, and what is mounted below a directory.

Every target here lies in a directory that only root can write and no guest can (the shares are
read-only but for what is mounted in them), so no name on the way can be a planted link.
Failures are OSError with the target as file name.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 0x04
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_MOUNT_ATTR_RDONLY = 1
_MOUNT_ATTR_NOSUID = 2
_MOUNT_ATTR_NODEV = 4
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442
_CLONE_FS = 0x200
_CLONE_NEWNS = 0x20000

T = TypeVar("T")

_ESCAPE = re.compile(rb"\\([0-7]{3})")
_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd"))


def _check(result: int, target: Path) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


def mount(source: str, target: Path, kind: str, flags: int, data: str = "") -> None:
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            kind.encode() or None,
            ctypes.c_ulong(flags),
            data.encode() or None,
        ),
        target,
    )


def bind(source: Path, target: Path, *, recursive: bool = True) -> None:
    mount(str(source), target, "", MS_BIND | (MS_REC if recursive else 0))


def make_readonly(target: Path, *, recursive: bool = False) -> None:
    """Make one mount read-only, or with `recursive` all mounts below it too (mount_setattr(2))."""
    attr = _MountAttr(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    _check(
        _libc.syscall(
            ctypes.c_long(_SYS_MOUNT_SETATTR),
            ctypes.c_int(_AT_FDCWD),
            os.fsencode(target),
            ctypes.c_uint(_AT_RECURSIVE if recursive else 0),
            ctypes.byref(attr),
            ctypes.c_size_t(ctypes.sizeof(attr)),
        ),
        target,
    )


def clone_tree(source: int, what: Path) -> int:
    """A copy of the mount that `source` (an O_PATH descriptor) is in, from there on and with all that is
    mounted below it, attached nowhere yet: it lasts as long as the descriptor (open_tree(2))."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH | _AT_RECURSIVE
    tree = _libc.syscall(ctypes.c_long(_SYS_OPEN_TREE), ctypes.c_int(source), b"", ctypes.c_uint(flags))
    _check(min(tree, 0), what)
    return int(tree)


def shape_tree(
    tree: int,
    what: Path,
    *,
    propagation: int,
    readonly: bool = False,
    recursive: bool = False,
    inert: bool = False,
) -> None:
    """Set the propagation of a copy and all below it; make it read-only, alone or with all below it;
    let set-id programs and devices in it do nothing."""
    wishes = [(_AT_RECURSIVE, _MountAttr(0, 0, propagation, 0))]
    if readonly:
        wishes.append((_AT_RECURSIVE if recursive else 0, _MountAttr(_MOUNT_ATTR_RDONLY, 0, 0, 0)))
    if inert:
        wishes.append((_AT_RECURSIVE, _MountAttr(_MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV, 0, 0, 0)))
    for flags, attr in wishes:
        _check(
            _libc.syscall(
                ctypes.c_long(_SYS_MOUNT_SETATTR),
                ctypes.c_int(tree),
                b"",
                ctypes.c_uint(_AT_EMPTY_PATH | flags),
                ctypes.byref(attr),
                ctypes.c_size_t(ctypes.sizeof(attr)),
            ),
            what,
        )


def attach_tree(tree: int, target: int, what: Path) -> None:
    """Mount a copy on `target`, an O_PATH descriptor (move_mount(2))."""
    _check(
        _libc.syscall(
            ctypes.c_long(_SYS_MOVE_MOUNT),
            ctypes.c_int(tree),
            b"",
            ctypes.c_int(target),
            b"",
            ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH),
        ),
        what,
    )


def detach(point: Path) -> None:
    """The mount on top at `point`."""
    _check(_libc.umount2(os.fsencode(point), MNT_DETACH | UMOUNT_NOFOLLOW), point)


def in_namespace(namespace: int, action: Callable[[], T]) -> T:
    """Run `action` in another mount namespace, whose root is its root then.

    In a thread that ends with it, so none of the daemon's is ever left in there.
    """
    result: Future[T] = Future()

    def work() -> None:
        try:
            # setns(2): a thread that shares its root and directory with others may not leave them
            _check(_libc.unshare(ctypes.c_int(_CLONE_FS)), Path("/"))
            _check(_libc.setns(ctypes.c_int(namespace), ctypes.c_int(_CLONE_NEWNS)), Path("/"))
            result.set_result(action())
        except BaseException as error:  # the thread's edge: handed to who waits
            result.set_exception(error)

    threading.Thread(target=work, name="husk-mounts", daemon=True).start()
    return result.result()


def set_propagation(target: Path, flags: int) -> None:
    mount("", target, "", flags)


def mounts_below(root: Path) -> list[Path]:
    """Mount points at and below `root`, in the order in which they were made."""
    text = os.fsencode(root)
    points = (point for _, point in _table() if point == text or point.startswith(text + b"/"))
    return [Path(os.fsdecode(point)) for point in points]


def top_mounts() -> dict[str, int]:
    """By mount point, the id of the mount that was made there last: unique while it is there."""
    return {os.fsdecode(point): id for id, point in _table()}


def _table() -> Iterator[tuple[int, bytes]]:
    """Id and point of each mount. Space, tab, newline and backslash are octal escapes (proc(5))."""
    with Path("/proc/self/mountinfo").open("rb") as table:
        for line in table:
            fields = line.split(b" ", 5)
            yield int(fields[0]), _ESCAPE.sub(lambda found: bytes([int(found[1], 8)]), fields[4])


def unmount_tree(root: Path) -> None:
    """Detach every mount at and below `root`, newest first. Nothing mounted is fine."""
    for point in reversed(mounts_below(root)):
        result = _libc.umount2(os.fsencode(point), MNT_DETACH | UMOUNT_NOFOLLOW)
        # EINVAL: went with a parent whose propagation took it along
        if result != 0 and ctypes.get_errno() not in (22, 2):
            _check(result, point)
