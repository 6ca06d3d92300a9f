"""System calls that Python's `os` lacks: mounts, namespaces, inotify, and a few of files.

The only module that calls libc through ctypes for these. Each function is one system call, takes and
returns plain numbers and paths, and raises OSError: errno, a text that names the call, and as file name the
path or `what` (what a descriptor stands for, in the caller's words). All of them release the GIL, block for
as long as the kernel does, and need CAP_SYS_ADMIN unless said otherwise.

Flags have the names and values of linux/mount.h (those of mount(2) are in `mount_flags`), linux/fcntl.h,
linux/sched.h and linux/openat2.h.
The numbers of system calls above 424 are the same on every architecture (but alpha).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_long, c_size_t, c_uint, c_uint64, c_ulong
from pathlib import Path

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_IDMAP = 0x00100000
OPEN_TREE_CLONE = 0x1
MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_EMPTY_PATH = 0x40

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_IN_ROOT = 0x10

_OPEN_TREE, _MOVE_MOUNT, _OPENAT2, _MOUNT_SETATTR = 428, 429, 437, 442
# setgroups, setresgid, setresuid, capset: these numbers differ (asm/unistd.h)
_CREDENTIAL_CALLS = {"x86_64": (116, 119, 117, 126), "aarch64": (159, 149, 147, 91)}
_CAPABILITY_VERSION_3 = 0x20080522
_UNCHANGED = c_uint(0xFFFFFFFF)
_STATFS_BYTES = 256  # more than struct statfs of any kernel

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (c_char_p, c_char_p, c_char_p, c_ulong, c_char_p)
_libc.umount2.argtypes = (c_char_p, c_int)
_libc.setns.argtypes = (c_int, c_int)
_libc.unshare.argtypes = (c_int,)
_libc.fstatfs.argtypes = (c_int, c_char_p)
_libc.syncfs.argtypes = (c_int,)
_libc.inotify_init1.argtypes = (c_int,)
_libc.inotify_add_watch.argtypes = (c_int, c_char_p, c_uint)
_libc.inotify_rm_watch.argtypes = (c_int, c_int)
_libc.syscall.restype = c_long


class _MountAttr(ctypes.Structure):  # struct mount_attr, linux/mount.h
    _fields_ = tuple((name, c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd"))


class _OpenHow(ctypes.Structure):  # struct open_how, linux/openat2.h
    _fields_ = tuple((name, c_uint64) for name in ("flags", "mode", "resolve"))


def mount(source: str | Path, target: str | Path, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2). `kind` is the filesystem type; "" passes NULL, as for a bind mount or a change of flags."""
    paths = os.fsencode(source), os.fsencode(target)
    result = _libc.mount(*paths, kind.encode() or None, flags, data.encode() or None)
    _check("mount", result, target)


def umount2(target: str | Path, flags: int) -> None:
    """umount2(2): the mount on top at `target`. Raises OSError: EINVAL where nothing is mounted."""
    _check("umount2", _libc.umount2(os.fsencode(target), flags), target)


def open_tree(directory: int, path: str | Path, flags: int, *, what: str | Path = "") -> int:
    """open_tree(2). Returns a descriptor that the caller owns; with OPEN_TREE_CLONE, of a detached copy of
    the mount, which lasts as long as the descriptor unless it is attached."""
    name = os.fsencode(path)
    result = _libc.syscall(c_long(_OPEN_TREE), c_int(directory), name, c_uint(flags))
    if result < 0:
        raise _error("open_tree", what or path)
    return int(result)


def move_mount(
    source: int,
    source_path: str | Path,
    target: int,
    target_path: str | Path,
    flags: int,
    *,
    what: str | Path = "",
) -> None:
    """move_mount(2): attach the mount at `source` to the mount point at `target`."""
    paths = os.fsencode(source_path), os.fsencode(target_path)
    number = c_long(_MOVE_MOUNT)
    result = _libc.syscall(number, c_int(source), paths[0], c_int(target), paths[1], c_uint(flags))
    _check("move_mount", result, what or target_path)


def mount_setattr(
    directory: int,
    path: str | Path,
    flags: int,
    *,
    set: int = 0,
    clear: int = 0,
    propagation: int = 0,
    user_namespace: int = 0,
    what: str | Path = "",
) -> None:
    """mount_setattr(2): add the attributes `set`, remove `clear`, and change the propagation unless it is 0.

    With MOUNT_ATTR_IDMAP, `user_namespace` is a descriptor of the namespace that maps the ids (EINVAL: the
    filesystem cannot map ids).
    """
    attributes = _MountAttr(set, clear, propagation, user_namespace)
    result = _libc.syscall(
        c_long(_MOUNT_SETATTR),
        c_int(directory),
        os.fsencode(path),
        c_uint(flags),
        ctypes.byref(attributes),
        c_size_t(ctypes.sizeof(attributes)),
    )
    _check("mount_setattr", result, what or path)


def setns(namespace: int, kind: int, *, what: str | Path = "") -> None:
    """setns(2): move the calling thread into the namespace of this descriptor. `kind` is CLONE_NEWNS or
    CLONE_NEWNET; for CLONE_NEWNS the thread must first have unshared CLONE_FS."""
    _check("setns", _libc.setns(namespace, kind), what)


def unshare(flags: int) -> None:
    """unshare(2), for the calling thread."""
    _check("unshare", _libc.unshare(flags), "")


def openat2(directory: int, path: str, flags: int, *, resolve: int) -> int:
    """openat2(2) of something that exists. Needs no capability. Returns a descriptor that the caller owns."""
    how = _OpenHow(flags, 0, resolve)
    result = _libc.syscall(
        c_long(_OPENAT2),
        c_int(directory),
        os.fsencode(path),
        ctypes.byref(how),
        c_size_t(ctypes.sizeof(how)),
    )
    if result < 0:
        raise _error("", path)  # reads like the error of os.open
    return int(result)


def filesystem_magic(descriptor: int, *, what: str | Path = "") -> int:
    """f_type of fstatfs(2), a number of linux/magic.h (os.fstatvfs lacks it). Needs no capability."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    _check("fstatfs", _libc.fstatfs(descriptor, buffer), what)
    return c_long.from_buffer(buffer).value


def syncfs(descriptor: int, *, what: str | Path = "") -> None:
    """syncfs(2): write one filesystem to its disk (os.sync writes all of the machine's). Needs no
    capability."""
    _check("syncfs", _libc.syncfs(descriptor), what)


def inotify_init1() -> int:
    """inotify_init1(2), non-blocking. Needs no capability. Returns a descriptor that the caller owns."""
    result = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if result < 0:
        raise _error("inotify_init1", "")
    return int(result)


def inotify_add_watch(descriptor: int, path: str | Path, mask: int, *, what: str | Path = "") -> int:
    """inotify_add_watch(2). Needs no capability. Returns the watch's number, the same one for the same inode.

    Raises OSError: ENOSPC where the user has no watches left (fs.inotify.max_user_watches).
    """
    result = _libc.inotify_add_watch(descriptor, os.fsencode(path), mask)
    if result < 0:
        raise _error("inotify_add_watch", what or path)
    return int(result)


def inotify_rm_watch(descriptor: int, watch: int) -> None:
    """inotify_rm_watch(2). Needs no capability. Raises OSError: EINVAL for a watch that has ended."""
    _check("inotify_rm_watch", _libc.inotify_rm_watch(descriptor, watch), "")


def set_thread_credentials(uid: int, gid: int, groups: Sequence[int], capabilities: int) -> None:
    """Change the effective ids, groups and permitted capabilities of the calling thread, and of no other.

    For a thread that ends afterwards: it cannot go back. libc's functions would change every thread of the
    process (nptl(7)), so these are the kernel's. The real user stays, so no other user may trace or signal
    the thread. Needs CAP_SETUID and CAP_SETGID. Raises OSError: ENOSYS on an architecture that is not known
    here.
    """
    calls = _CREDENTIAL_CALLS.get(os.uname().machine)
    if calls is None:
        raise OSError(errno.ENOSYS, f"the credentials of a thread on {os.uname().machine}")
    set_groups, set_gid, set_uid, set_capabilities = map(c_long, calls)
    array = (c_uint * len(groups))(*groups)
    _check("setgroups", _libc.syscall(set_groups, c_size_t(len(groups)), array), "")
    _check("setresgid", _libc.syscall(set_gid, _UNCHANGED, c_uint(gid), _UNCHANGED), "")
    _check("setresuid", _libc.syscall(set_uid, _UNCHANGED, c_uint(uid), _UNCHANGED), "")
    low, high = capabilities & 0xFFFFFFFF, capabilities >> 32
    head = (c_uint * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (c_uint * 6)(low, low, 0, high, high, 0)  # effective, permitted, inheritable; twice 32 bits
    _check("capset", _libc.syscall(set_capabilities, head, sets), "")


def _check(call: str, result: int, what: str | Path) -> None:
    if result != 0:
        raise _error(call, what)


def _error(call: str, what: str | Path) -> OSError:
    code = ctypes.get_errno()
    text = f"{call}: {os.strerror(code)}" if call else os.strerror(code)
    return OSError(code, text, str(what) or None)
