"""The free space that pulls leave on the filesystem of images, for pods, records and logs that share it."""

from __future__ import annotations

import os
from pathlib import Path

from image.errors import DiskFull


def describe_free(path: Path) -> str:
    """Return what is free on the filesystem of `path`, for an error message; empty if it is not known."""
    try:
        found = os.statvfs(path)
    except OSError:
        return ""
    return f"{found.f_bavail * found.f_frsize} bytes and {found.f_favail} inodes are free"


class SpaceFloor:
    """Refuses what would leave less than `min_bytes` free on the filesystem of `path`; 0: nothing."""

    def __init__(self, path: Path, min_bytes: int) -> None:
        self._path = path
        self._min_bytes = min_bytes

    def check(self, what: str, size: int = 0) -> None:
        """Raise DiskFull unless `size` bytes may be written now. `what` is being done."""
        if not self._min_bytes:
            return
        found = os.statvfs(self._path)
        free = found.f_bavail * found.f_frsize
        missing = size + self._min_bytes - free
        if missing > 0:
            detail = f"{free} bytes are free, {size} are needed and {self._min_bytes} must stay free"
            raise DiskFull(str(self._path), what, f"{detail}: {missing} are missing")
