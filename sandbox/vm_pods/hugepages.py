"""Volumes on huge pages: an emptyDir whose medium is HugePages, as the kubelet prepares it.

Its host path lies on a hugetlbfs of the host, which cannot be exported to a guest: files there can only be
mapped, not read or written. So the mount becomes a directory on a hugetlbfs of the guest, the same
one for all containers of the pod that mount the same path. Files that the host has there are not visible.
"""

from __future__ import annotations

import hashlib
import os
import stat

from sandbox.errors import InvalidSpec
from sandbox.host import syscalls
from sandbox.plan import HUGE_PAGE_MIB
from sandbox.plan.values import HugeDirectory
from sandbox.spec import MountSpec

GUEST_HUGE = "/run/husk/huge"
HUGETLBFS_MAGIC = 0x958458F6  # linux/magic.h


def find_directory(source: int, number: int, mount: MountSpec) -> HugeDirectory | None:
    """Return the guest's directory that replaces a mount on huge pages; None: the mount is on other storage.

    `source` is the descriptor of the mount's source, `number` its index in the request, for errors. Raises
    InvalidSpec for a file, for pages of a size other than 2 MiB, and for shifted owners.
    """
    if mount.image or syscalls.filesystem_magic(source) != HUGETLBFS_MAGIC:
        return None
    at = f"config.mounts[{number}]"
    info, size = os.fstat(source), os.fstatvfs(source).f_bsize
    if not stat.S_ISDIR(info.st_mode):
        raise InvalidSpec(f"{at}.host_path", f"{mount.host_path!r} is a file on huge pages", "a directory")
    if size != HUGE_PAGE_MIB << 20:
        kib = size >> 10
        problem = f"{mount.host_path!r} lies on pages of {kib} KiB, which a guest cannot allocate at run time"
        raise InvalidSpec(f"{at}.host_path", problem, f"a volume on pages of {HUGE_PAGE_MIB} MiB")
    if mount.ids:
        raise InvalidSpec(f"{at}.uidMappings", "huge pages of a guest are not shifted", "an empty list")
    name = hashlib.sha256(os.path.realpath(mount.host_path).encode()).hexdigest()[:32]
    return HugeDirectory(name=name, mode=stat.S_IMODE(info.st_mode), uid=info.st_uid, gid=info.st_gid)


def guest_path(directory: HugeDirectory) -> str:
    """Return where the guest has such a directory."""
    return f"{GUEST_HUGE}/{directory.name}"
