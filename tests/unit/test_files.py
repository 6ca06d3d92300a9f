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


def test_missing_directory_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_atomically(tmp_path / "absent" / "file", b"")
