"""Files are replaced as a whole, and a failed write leaves the old content."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from sandbox.host import files


@pytest.mark.parametrize("durable", [False, True])
def test_write_replaces_the_content(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "record.json"
    files.write_atomically(path, b"one", durable=durable)
    inode = path.stat().st_ino
    files.write_atomically(path, b"two", durable=durable)
    assert path.read_bytes() == b"two"
    assert path.stat().st_ino != inode
    assert [each.name for each in tmp_path.iterdir()] == ["record.json"]


def test_write_json_is_read_back(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a", {"key": [1, 2]})
    assert json.loads((tmp_path / "a").read_text()) == {"key": [1, 2]}


def test_leftover_of_a_crash_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    files.temporary_of(path).write_bytes(b"half of a much longer cont")
    files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert not files.temporary_of(path).exists()


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_failed_write_keeps_the_old_content_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail) if failing == "fsync" else monkeypatch.setattr(
        Path, "rename", fail
    )
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        files.write_atomically(path, b"new", durable=True)
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["record.json"]


def test_durable_write_syncs_the_file_before_its_name_and_then_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, order, fsync = tmp_path / "record.json", [], os.fsync

    def record(descriptor: int) -> None:
        order.append((Path(f"/proc/self/fd/{descriptor}").readlink(), path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    files.write_atomically(path, b"new", durable=True)
    assert order == [(files.temporary_of(path), False), (tmp_path, True)]


def test_any_flipped_bit_of_a_file_with_a_checksum_is_found(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    files.write_atomically(path, b"content", checksum=True)
    files.check(path, path.read_bytes())
    for position in range(8 * len(b"content")):
        damaged = bytearray(b"content")
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(files.Damaged, match="checksum"):
            files.check(path, path.read_bytes())
    files.write_atomically(path, b"new", checksum=True)
    files.check(path, path.read_bytes())


def test_file_without_a_checksum_is_believed(tmp_path: Path) -> None:
    """Those of releases before there were any, and those that such a release has replaced."""
    path = tmp_path / "record.json"
    files.write_atomically(path, b"old", checksum=True)
    files.write_atomically(path, b"replaced")
    files.check(path, path.read_bytes())


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EPERM])
def test_filesystem_without_attributes_keeps_files_without_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "setxattr", fail)
    monkeypatch.setattr(os, "getxattr", fail)
    files.write_atomically(tmp_path / "a", b"content", checksum=True)
    files.check(tmp_path / "a", b"content")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_checksum_that_cannot_be_written_fails_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "record.json"
    files.write_atomically(path, b"old", checksum=True)

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "setxattr", fail)
    with pytest.raises(OSError, match=f"{os.strerror(code)}.*record.json"):
        files.write_atomically(path, b"new", checksum=True)
    assert path.read_bytes() == b"old" and not files.temporary_of(path).exists()


def test_missing_directory_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_atomically(tmp_path / "absent" / "file", b"")
