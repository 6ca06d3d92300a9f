"""Progress of long work on the command line: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)

from cri.proto import husk_v1_pb2 as pb


class Reporter(Protocol):
    def report(self, progress: pb.Progress) -> None: ...


class Bars:
    """One bar for each blob and step."""

    def __init__(self, stream: TextIO) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=Console(file=stream),
        )
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def report(self, progress: pb.Progress) -> None:
        key = (progress.item, progress.step)
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(_title(progress), total=None)
        total = progress.total or None
        self._progress.update(self._tasks[key], completed=progress.current, total=total)


class Lines:
    """A line when a blob or step begins, and one when it is complete."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun: set[tuple[str, str]] = set()
        self._ended: set[tuple[str, str]] = set()

    def report(self, progress: pb.Progress) -> None:
        key = (progress.item, progress.step)
        if key not in self._begun:
            self._begun.add(key)
            size = f" ({_size(progress.total)})" if progress.total else ""
            self._say(f"{_title(progress)}{size}")
        if progress.total and progress.current >= progress.total and key not in self._ended:
            self._ended.add(key)
            self._say(f"{_title(progress)}: done")

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


@contextmanager
def reporter(stream: TextIO | None = None) -> Iterator[Reporter]:
    """On standard error, so that standard output holds nothing but the result."""
    stream = stream or sys.stderr
    if stream.isatty():
        with Bars(stream) as bars:
            yield bars
    else:
        yield Lines(stream)


def _title(progress: pb.Progress) -> str:
    return f"{progress.step} {progress.item.removeprefix('sha256:')[:12]}".strip()


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count} B"
