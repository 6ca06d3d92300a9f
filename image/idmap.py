"""Mount layers with the ids of a user namespace: the same files, with mapped owners.

An idmapped mount (mount_setattr(2), MOUNT_ATTR_IDMAP) shows a file of user 0 as one of the namespace's root.
overlayfs accepts such mounts as lower layers since Linux 5.19, if the layers' filesystem supports them.

The mounts of single layers are made in a private mount namespace of a thread, and end with it. Left on the
host, they would be dangerous: to delete a directory in which a layer is mounted deletes the layer.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from sandbox.host import mount_flags, syscalls, threads
from sandbox.host.ids import IdRange, to_outside

# Holds a user namespace open until its standard input is closed.
_HOLDER = ["unshare", "--user", "sh", "-c", "echo ready; read line"]


class IdMap(msgspec.Struct, frozen=True, kw_only=True):
    """The ids of a user namespace; `outside` are ids of the host (user_namespaces(7))."""

    uids: tuple[IdRange, ...]
    gids: tuple[IdRange, ...]

    @property
    def root(self) -> tuple[int, int]:
        """The host's ids of user 0 and group 0 inside; -1 where they are not mapped."""
        return self.to_outside(0, 0)

    def to_outside(self, uid: int, gid: int) -> tuple[int, int]:
        """Return the host's ids of a user and group inside; -1 where they are not mapped."""
        return to_outside(self.uids, uid, unmapped=-1), to_outside(self.gids, gid, unmapped=-1)


@contextlib.contextmanager
def user_namespace(ids: IdMap) -> Iterator[int]:
    """Yield a descriptor of a new user namespace with these ids. Blocking: starts a process. Raises
    OSError."""
    with subprocess.Popen(_HOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            raise OSError(f"{_HOLDER[0]}: cannot make a user namespace")
        for name, ranges in (("uid_map", ids.uids), ("gid_map", ids.gids)):
            text = "".join(f"{each.inside} {each.outside} {each.length}\n" for each in ranges)
            # in one write: the kernel accepts a map only once (user_namespaces(7))
            with Path(f"/proc/{holder.pid}/{name}").open("wb", buffering=0) as file:
                file.write(text.encode())
        descriptor = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        holder.stdin.close()
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def clone_mount(source: Path, namespace: int | None = None) -> int:
    """Return a descriptor of a detached copy of the mount at `source`, which the caller closes.

    With the descriptor of a user namespace its ids are mapped. The copy lasts as long as the descriptor, or
    until it is attached and unmounted. Raises OSError.
    """
    flags = syscalls.OPEN_TREE_CLONE | os.O_CLOEXEC
    tree = syscalls.open_tree(syscalls.AT_FDCWD, source, flags)
    try:
        if namespace is not None:
            map_ids(tree, namespace, source)
    except OSError:
        os.close(tree)
        raise
    return tree


def map_ids(tree: int, namespace: int, what: Path) -> None:
    """Map the ids of a detached mount by a user namespace. `what` names it in errors.

    Raises OSError (EINVAL: the filesystem does not support idmapped mounts).
    """
    syscalls.mount_setattr(
        tree,
        "",
        syscalls.AT_EMPTY_PATH,
        set=syscalls.MOUNT_ATTR_IDMAP,
        user_namespace=namespace,
        what=what,
    )


def attach_mount(tree: int, target: Path) -> None:
    """Attach a detached mount at `target`. Raises OSError."""
    syscalls.move_mount(tree, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)


def mount_mapped(
    layers: Sequence[Path], ids: IdMap, scratch: Path, mount: Callable[[Sequence[Path], Path], None]
) -> int:
    """Return a detached mount of what `mount` mounts over the layers with mapped ids (see `clone_mount`).

    `mount` is called with the mapped layers and its mount point. `scratch` is an empty directory, for mount
    points. Blocking. Raises OSError.
    """
    points = [scratch / str(number) for number in range(len(layers))]
    merged = scratch / "merged"
    for point in (*points, merged):
        point.mkdir()

    def work() -> int:
        syscalls.unshare(syscalls.CLONE_FS | syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", flags=mount_flags.MS_REC | mount_flags.MS_PRIVATE)
        for layer, point in zip(layers, points, strict=True):
            tree = clone_mount(layer, namespace)
            try:
                attach_mount(tree, point)
            finally:
                os.close(tree)
        mount(points, merged)
        return clone_mount(merged)

    with user_namespace(ids) as namespace:
        return threads.call(work, "husk-idmap")


def find_obstacle(scratch: Path) -> str:
    """Return why layers on the filesystem of this empty directory cannot be mounted with mapped ids; empty
    if they can. Blocking: tries it."""
    shifted = IdRange(inside=0, outside=65536, length=65536)
    ids = IdMap(uids=(shifted,), gids=(shifted,))
    for each in ("layer", "upper", "work", "points"):
        (scratch / each).mkdir()

    def mount(lowers: Sequence[Path], target: Path) -> None:
        data = f"lowerdir={lowers[0]},upperdir={scratch}/upper,workdir={scratch}/work"
        syscalls.mount("husk", target, "overlay", 0, data)

    try:
        os.close(mount_mapped([scratch / "layer"], ids, scratch / "points", mount))
    except OSError as error:
        return f"the filesystem of {scratch.parent} cannot map ids: {error.strerror or error}"
    return ""
