"""Progress of pulls and imports on the command line: bars on a terminal, plain lines elsewhere."""

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
    """Shows progress messages of the daemon."""

    def report(self, progress: pb.Progress) -> None:
        """Show one message: a blob, its step, and how many of its bytes are done."""


class Bars:
    """A terminal: one progress bar for each blob and step."""

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
        """Move the bar of this blob and step, or add it."""
        key = (progress.item, progress.step)
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(_title(progress), total=None)
        total = progress.total or None
        self._progress.update(self._tasks[key], completed=progress.current, total=total)


class Lines:
    """A file or pipe: one line when a blob's step begins, and one when it is complete."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun: set[tuple[str, str]] = set()
        self._ended: set[tuple[str, str]] = set()

    def report(self, progress: pb.Progress) -> None:
        """Print a line for the first and the last message of this blob and step."""
        key = (progress.item, progress.step)
        if key not in self._begun:
            self._begun.add(key)
            size = f" ({_size(progress.total)})" if progress.total else ""
            self._print(f"{_title(progress)}{size}")
        if progress.total and progress.current >= progress.total and key not in self._ended:
            self._ended.add(key)
            self._print(f"{_title(progress)}: done")

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


@contextmanager
def reporter(stream: TextIO | None = None) -> Iterator[Reporter]:
    """Report to `stream` (default: standard error, so that standard output has only the result)."""
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
