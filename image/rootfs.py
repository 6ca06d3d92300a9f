"""What a container's root filesystem is: a directory of the host, or a disk. Pure.

A store (`image.stores`) gives one of these, a container's record keeps it, and only what attaches the root
filesystem to where the container runs has to distinguish the kinds.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class HostTree(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="tree"):
    """A directory of the host, which a guest sees through a share."""

    path: str


class Disk(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="disk"):
    """A file or block device of the host with a file system on it, for a VM to mount."""

    path: str
    format: Literal["raw", "qcow2"] = "raw"
    read_only: bool = False


Rootfs = HostTree | Disk
