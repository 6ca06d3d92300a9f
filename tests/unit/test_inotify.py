"""inotify: events as bytes, and which owner each one is for."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.host import inotify
from sandbox.host.inotify import Event, Watcher, parse


def raw(watch: int, mask: int, name: bytes = b"", cookie: int = 0) -> bytes:
    return struct.pack("=iIII", watch, mask, cookie, len(name)) + name


@pytest.fixture
def watcher() -> Iterator[Watcher[str]]:
    watcher: Watcher[str] = Watcher()
    yield watcher
    watcher.close()


def watch(watcher: Watcher[str], owner: str, path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return watcher.add(owner, descriptor, str(path))
    finally:
        os.close(descriptor)


def test_events_are_parsed_with_and_without_a_name() -> None:
    data = raw(1, 0x100, b"..data\0\0", 7) + raw(-1, inotify.IN_Q_OVERFLOW) + raw(2, 0x2)
    expected = [Event(1, 0x100, 7, b"..data"), Event(-1, inotify.IN_Q_OVERFLOW, 0, b""), Event(2, 2, 0, b"")]
    assert list(parse(data)) == expected


@pytest.mark.parametrize("cut", [1, 15, 17, 23])
def test_events_that_are_cut_short_are_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="end within"):
        list(parse(raw(1, 0x100, b"name\0\0\0\0")[:cut]))


def test_change_is_reported_once_to_each_owner(watcher: Watcher[str], tmp_path: Path) -> None:
    assert watch(watcher, "a", tmp_path) == watch(watcher, "b", tmp_path)
    assert watcher.read() == []
    (tmp_path / "file").write_text("x")
    (tmp_path / "file").rename(tmp_path / "other")
    assert sorted(watcher.read()) == ["a", "b"]
    assert watcher.read() == []


def test_owner_that_keeps_no_watch_hears_nothing_and_leaves_others(
    watcher: Watcher[str], tmp_path: Path
) -> None:
    shared = watch(watcher, "a", tmp_path)
    watch(watcher, "b", tmp_path)
    (tmp_path / "sub").mkdir()
    watch(watcher, "a", tmp_path / "sub")
    watcher.keep("a", {shared})
    watcher.keep("b", set())
    watcher.read()
    (tmp_path / "sub/x").touch()
    assert watcher.read() == []
    (tmp_path / "x").touch()
    assert watcher.read() == ["a"]
    watcher.keep("a", set())
    watcher.read()
    (tmp_path / "y").touch()
    assert watcher.read() == []


def test_end_of_a_watched_directory_is_reported_and_forgotten(watcher: Watcher[str], tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    watch(watcher, "a", tmp_path / "sub")
    (tmp_path / "sub").rmdir()
    assert watcher.read() == ["a"]
    watcher.keep("a", set())
    assert watcher.read() == []


def test_overflow_is_reported_to_every_owner(watcher: Watcher[str], tmp_path: Path) -> None:
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    (tmp_path / "quiet").mkdir()
    (tmp_path / "busy").mkdir()
    watch(watcher, "quiet", tmp_path / "quiet")
    watch(watcher, "busy", tmp_path / "busy")
    names = [tmp_path / "busy" / name for name in "ab"]
    names[0].touch()
    for _ in range(limit):  # two events each
        names[0].rename(names[1])
        names.reverse()
    assert sorted(watcher.read()) == ["busy", "quiet"]


def test_closed_watcher_reports_nothing_and_takes_no_watch(watcher: Watcher[str], tmp_path: Path) -> None:
    watch(watcher, "a", tmp_path)
    for _ in range(2):
        watcher.close()
    (tmp_path / "x").touch()
    assert watcher.read() == []
    with pytest.raises(OSError, match="inotify_add_watch") as caught:
        watch(watcher, "a", tmp_path)
    assert caught.value.errno == errno.EBADF
