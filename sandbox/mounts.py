"""mount(2) and umount2(2) for this package, and what is mounted below a directory.

Every target here lies in a directory that only root can write and no guest can (the shares are
read-only but for what is mounted in them), so no name on the way can be a planted link.
Failures are OSError with the target as file name.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

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
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY = 1
_SYS_MOUNT_SETATTR = 442

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


def set_propagation(target: Path, flags: int) -> None:
    mount("", target, "", flags)


def mounts_below(root: Path) -> list[Path]:
    """Mount points at and below `root`, in the order in which they were made."""
    text = os.fsencode(root)
    found = []
    with Path("/proc/self/mountinfo").open("rb") as table:
        for line in table:
            # proc(5): space, tab, newline and backslash are octal escapes; ids and names of ours have none
            point = line.split(b" ", 5)[4]
            if point == text or point.startswith(text + b"/"):
                found.append(Path(os.fsdecode(point)))
    return found


def unmount_tree(root: Path) -> None:
    """Detach every mount at and below `root`, newest first. Nothing mounted is fine."""
    for point in reversed(mounts_below(root)):
        result = _libc.umount2(os.fsencode(point), MNT_DETACH | UMOUNT_NOFOLLOW)
        # EINVAL: went with a parent whose propagation took it along
        if result != 0 and ctypes.get_errno() not in (22, 2):
            _check(result, point)
