"""Both ends of a log relay in memory: a guest that streams a log, and a host with its record and files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sandbox.guest.streams import StreamSink
from sandbox.logs.relay import LogRelay
from sandbox.records import LogPosition


def lines(count: int, start: int = 0) -> bytes:
    return b"".join(
        b"2026-01-01T00:00:00.%09dZ stdout F line %d %s\n" % (n, n, b"x" * (n * 7 % 90))
        for n in range(start, start + count)
    )


class LogGuest:
    """The other end of one relay, in memory: sends from the requested offset, drops what is acknowledged,
    and checks that credit and acknowledgements are kept."""

    def __init__(self, stream: bytes = b"", piece: int = 1000) -> None:
        self.stream = bytearray(stream)
        self.acknowledged = 0
        self.piece = piece
        self.sink: StreamSink | None = None
        self._sent = 0
        self._credit = 0

    # ---- as a GuestClient
    def open_input(self, sink: StreamSink, window: int) -> int:
        self.sink = sink
        self._credit = window
        return 1

    def grant(self, stream: int, count: int) -> None:
        self._credit += count
        self.acknowledged += count
        assert self.acknowledged <= self._sent

    def reset_input(self, stream: int) -> None:
        self.sink = None

    # ---- as a guest
    def open_log(self, offset: int) -> int:
        """The reply to OpenLog."""
        self.acknowledged = self._sent = min(max(offset, self.acknowledged), len(self.stream))
        return self._sent

    def pump(self) -> bool:
        """Send one piece, if credit and stream allow."""
        count = min(self.piece, self._credit, len(self.stream) - self._sent)
        if count <= 0 or self.sink is None:
            return False
        self._sent += count
        self._credit -= count
        self.sink.data(memoryview(self.stream[self._sent - count : self._sent]))
        return True

    @property
    def written(self) -> bool:
        return self.acknowledged == len(self.stream)


class Inline(ThreadPoolExecutor):
    """Runs work at once, in the event loop's thread, so that a test knows which call is next."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class LogHost:
    """What outlives the daemon: the record and the files. `problems` are those that the relay reports."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "c" / "0.log"
        self.position = LogPosition()
        self.problems: list[Exception | None] = []

    def save(self, position: LogPosition) -> None:
        self.position = position

    async def open(self, guest: LogGuest, *, inline: bool = False) -> LogRelay:
        if inline:
            asyncio.get_running_loop().set_default_executor(Inline())
        relay = await LogRelay.open(self.path, self.position, self.save, on_problem=self.problems.append)
        await relay.attach(guest)
        await relay.begin(guest.open_log(relay.offset))
        return relay

    def rotate(self, name: str) -> None:
        """Rename the file, as the kubelet does."""
        self.path.rename(self.path.with_name(f"{self.path.name}.{name}"))

    def files(self) -> list[Path]:
        """All files of the log, oldest first."""
        rotated = sorted(path for path in self.path.parent.iterdir() if path != self.path)
        return [*rotated, self.path] if self.path.exists() else rotated

    def joined(self) -> bytes:
        return b"".join(path.read_bytes() for path in self.files())


async def settle(guest: LogGuest) -> None:
    async with asyncio.timeout(20):
        while not guest.written:
            guest.pump()
            await asyncio.sleep(0)


async def finish(relay: LogRelay) -> None:
    relay.close()
    await relay.wait_closed()
