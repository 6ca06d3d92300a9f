"""The mount table, /proc/PID/mountinfo (proc(5)), and where in which file system a file lies by it.

Within a file system, a path names each part: `root` of a mount is the path, within its file system, of
the directory or file that is mounted. So two paths of the host that lead to one tree by bind mounts (as the
kubelet makes them for a subPath) are recognised by device and path. The device is that of the file system
as a whole: subvolumes of btrfs share it, and are paths in it.

A path is only a hint where a file system shows none (some network file systems have "/" everywhere): who
relies on a tree compares inodes too.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_ESCAPE = re.compile(rb"\\([0-7]{3})")  # space, tab, newline and backslash
_MOUNT_ID = re.compile(rb"^mnt_id:\s*(\d+)", re.MULTILINE)
_DELETED = "//deleted"
FDINFO_BYTES = 4096  # `mnt_id` is among the first lines
_REMOTE = ("autofs", "nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "fuse")


@dataclass(frozen=True, slots=True)
class Mounted:
    """A line of the table."""

    id: int
    device: str  # "MAJOR:MINOR" of the file system
    root: str
    point: str
    readonly: bool  # the mount, whatever its file system is
    kind: str  # of the file system

    @property
    def remote(self) -> bool:
        """Whether another machine or a program answers for it, so that reading it may hang."""
        return self.kind.partition(".")[0] in _REMOTE


@dataclass(frozen=True, slots=True)
class Tree:
    """A directory or file with all beneath it: its file system, and its path there."""

    device: str
    path: str | None  # None: it has been deleted, so no path leads to it
    readonly: bool = False  # the mount that leads to it
    submounts: Mapping[str, Mounted] = field(default_factory=dict)  # beneath it, by relative path
    kind: str = ""  # of the file system


def read() -> list[Mounted]:
    """Return the caller's own mount table. Raises OSError."""
    return parse(Path("/proc/self/mountinfo").read_bytes())


def parse(text: bytes) -> list[Mounted]:
    """Return the lines of a table. Malformed ones are ignored."""
    found = []
    for line in text.splitlines():
        fields = line.split(b" ")
        if len(fields) < 7 or b"-" not in fields[6:]:
            continue
        root, point = (os.fsdecode(_ESCAPE.sub(_decode, each)) for each in fields[3:5])
        kind = fields[fields.index(b"-", 6) + 1 :][:1]
        found.append(
            Mounted(
                id=int(fields[0]),
                device=fields[2].decode(),
                root=root,
                point=point,
                readonly=b"ro" in fields[5].split(b","),
                kind=kind[0].decode() if kind else "",
            )
        )
    return found


def _decode(found: re.Match[bytes]) -> bytes:
    return bytes([int(found[1], 8)])


def relative(path: str, above: str) -> str | None:
    """Return `path` relative to `above`, "" for the same; None: it is not beneath. Both are absolute."""
    if path == above:
        return ""
    begin = above.rstrip("/") + "/"
    return path[len(begin) :] if path.startswith(begin) else None


class Trees:
    """Finds trees by one state of the caller's own mount table, sorted once: a node has thousands of mounts,
    and a container dozens."""

    def __init__(self, table: Sequence[Mounted]) -> None:
        self._by_id = {line.id: line for line in table}
        self._sorted = sorted(table, key=_point)  # stable: later lines stay behind earlier ones

    def find(self, descriptor: int) -> Tree | None:
        """Return the tree of an open file (an O_PATH descriptor does); None: the mount is not in the table,
        as it has been unmounted or belongs to another namespace."""
        mount = self._by_id.get(mount_id(descriptor))
        if mount is None:
            return None
        place = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115 -- a Path takes longer than the call
        beneath = relative(place, mount.point)
        deleted = mount.root.endswith(_DELETED) or beneath is None or os.fstat(descriptor).st_nlink == 0
        if deleted or beneath is None:
            return Tree(device=mount.device, path=None, readonly=mount.readonly, kind=mount.kind)
        return Tree(
            device=mount.device,
            path=join(mount.root, beneath),
            readonly=mount.readonly,
            submounts=self.beneath(place),
            kind=mount.kind,
        )

    def beneath(self, place: str) -> dict[str, Mounted]:
        """Return what is mounted beneath a path, by relative paths. Later lines cover earlier ones."""
        begin = place.rstrip("/") + "/"
        found = {}
        for number in range(bisect_left(self._sorted, begin, key=_point), len(self._sorted)):
            line = self._sorted[number]
            if not line.point.startswith(begin):
                break
            if line.point != begin:
                found[line.point[len(begin) :]] = line
        return found


def _point(line: Mounted) -> str:
    return line.point


def mount_id(descriptor: int) -> int:
    """Return the id of the mount that an open file is in (proc(5), /proc/PID/fdinfo). Raises OSError."""
    with open(f"/proc/self/fdinfo/{descriptor}", "rb", buffering=0) as file:  # noqa: PTH123 -- as above
        found = _MOUNT_ID.search(file.read(FDINFO_BYTES))
    return int(found[1]) if found else -1  # Linux before 3.15


def join(above: str, beneath: str) -> str:
    """Return the absolute path of what lies at `beneath`, relative to `above`."""
    return f"{above.rstrip('/')}/{beneath}" if beneath else above
