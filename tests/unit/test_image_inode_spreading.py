"""The flag that has layers lie apart: asked for beside what is set already, and never a reason to fail."""

from __future__ import annotations

import errno
import fcntl
import struct
from pathlib import Path

import pytest

from image import inode_spreading
from image.image_store import ImageStore

GET, SET = 0x80086601, 0x40086602
TOP_OF_TREES, INDEXED = 0x20000, 0x1000


class Disk:
    """A file system with flags of inodes; `refusal` is its errno for what it does not know."""

    def __init__(self, flags: int = 0, refusal: int = 0) -> None:
        self.flags = flags
        self.sets = 0
        self._refusal = refusal

    def ioctl(self, fd: int, request: int, data: bytes) -> bytes:
        if request == GET:
            return struct.pack("=i4x", self.flags)
        assert request == SET
        if self._refusal:
            raise OSError(self._refusal, "refused")
        self.flags = struct.unpack("=i4x", data)[0]
        self.sets += 1
        return data


def test_flag_is_added_once_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(INDEXED)
    monkeypatch.setattr(fcntl, "ioctl", disk.ioctl)
    inode_spreading.spread_directories(tmp_path)
    inode_spreading.spread_directories(tmp_path)
    assert disk.flags == INDEXED | TOP_OF_TREES and disk.sets == 1


@pytest.mark.parametrize("refusal", [errno.ENOTTY, errno.EOPNOTSUPP, errno.EPERM])
def test_filesystem_without_the_flag_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    monkeypatch.setattr(fcntl, "ioctl", Disk(refusal=refusal).ioctl)
    inode_spreading.spread_directories(tmp_path)


def test_staging_directory_gets_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    monkeypatch.setattr(fcntl, "ioctl", disk.ioctl)
    ImageStore(tmp_path).load()
    assert disk.flags == TOP_OF_TREES


def test_real_filesystem_accepts_or_refuses_the_flag(tmp_path: Path) -> None:
    inode_spreading.spread_directories(tmp_path)
    (tmp_path / "layer").mkdir()
    assert (tmp_path / "layer").is_dir()
