"""Layers of an image as a user namespace sees them: the same files, with shifted owners.

An idmapped mount (mount_setattr(2)) shows a file of user 0 as one of the namespace's root. overlayfs takes
such mounts as lower layers since Linux 5.19, where the layers' file system can map ids.

The mounts are made in a mount namespace of the thread's own that ends with it: nothing of them can be
left on the host, which matters, as whoever removes a directory with a layer mounted in it removes the layer.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from sandbox.host import syscalls, threads
from sandbox.host.ids import IdRange, to_outside

# Ends when its standard input does.
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
    """A descriptor of a new one with these ids. Blocks a little. Raises OSError."""
    with subprocess.Popen(_HOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            raise OSError(f"{_HOLDER[0]}: no user namespace can be made")
        for name, ranges in (("uid_map", ids.uids), ("gid_map", ids.gids)):
            text = "".join(f"{each.inside} {each.outside} {each.length}\n" for each in ranges)
            # in one write, as the kernel takes a map only once
            with Path(f"/proc/{holder.pid}/{name}").open("wb", buffering=0) as file:
                file.write(text.encode())
        descriptor = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        holder.stdin.close()
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def clone(source: Path, namespace: int | None = None) -> int:
    """A copy of the mount at `source`, attached nowhere, with shifted ids if a namespace is given."""
    flags = syscalls.OPEN_TREE_CLONE | os.O_CLOEXEC
    tree = syscalls.open_tree(syscalls.AT_FDCWD, source, flags)
    try:
        if namespace is not None:
            shift(tree, namespace, source)
    except OSError:
        os.close(tree)
        raise
    return tree


def shift(tree: int, namespace: int, what: Path) -> None:
    """Raises OSError (EINVAL: the file system cannot map ids)."""
    syscalls.mount_setattr(
        tree,
        "",
        syscalls.AT_EMPTY_PATH,
        set=syscalls.MOUNT_ATTR_IDMAP,
        user_namespace=namespace,
        what=what,
    )


def attach(tree: int, target: Path) -> None:
    syscalls.move_mount(tree, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)


def mounted_shifted(
    layers: Sequence[Path], ids: IdMap, scratch: Path, mount: Callable[[Sequence[Path], Path], None]
) -> int:
    """A mount that `mount` makes over the shifted layers, attached nowhere yet (see `clone`).

    `scratch` is an empty directory of the caller's, for mount points. Raises OSError.
    """
    points = [scratch / str(number) for number in range(len(layers))]
    merged = scratch / "merged"
    for point in (*points, merged):
        point.mkdir()

    def work() -> int:
        syscalls.unshare(syscalls.CLONE_FS | syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
        for layer, point in zip(layers, points, strict=True):
            tree = clone(layer, namespace)
            try:
                attach(tree, point)
            finally:
                os.close(tree)
        mount(points, merged)
        return clone(merged)

    with user_namespace(ids) as namespace:
        return threads.call(work, "husk-idmap")


def find_obstacle(scratch: Path) -> str:
    """Why the file system of this empty directory has no shifted layers; empty when it has. Blocking."""
    shifted = IdRange(inside=0, outside=65536, length=65536)
    ids = IdMap(uids=(shifted,), gids=(shifted,))
    for each in ("layer", "upper", "work", "points"):
        (scratch / each).mkdir()

    def mount(lowers: Sequence[Path], target: Path) -> None:
        data = f"lowerdir={lowers[0]},upperdir={scratch}/upper,workdir={scratch}/work"
        syscalls.mount("husk", target, "overlay", 0, data)

    try:
        os.close(mounted_shifted([scratch / "layer"], ids, scratch / "points", mount))
    except OSError as error:
        return f"the file system of {scratch.parent} cannot map ids: {error.strerror or error}"
    return ""
