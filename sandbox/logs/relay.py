"""From the guest's log stream to the container's log file, without a line lost or doubled.

The guest formats the lines and keeps what is not acknowledged; the host alone writes files. So a
relay moves bytes: it appends them in large pieces, and gives credit, which is the acknowledgement,
only for what is in the file. Whatever ends the daemon or the connection, the next relay asks for
the byte after the last one in the file (`offset`); how that is known is told in `log_file`.

What a hostile guest can do here: fill its own log with lines of its choice. The bytes go verbatim,
since a parse of each line would cost more than all the rest and protects nobody (the kubelet skips
a line that it cannot read). But only whole lines are written, and a line longer than MAX_LINE (cut
lines have 16 KiB) that does not end within the DATA frame in which it got too long is a
ProtocolError: no reader meets a line above MAX_LINE + 64 KiB. Memory is bounded by the window, the
rate by the speed of the disk, and the size by rotation.

Files are touched in a worker thread, one call at a time: a slow disk must not stop other pods.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from sandbox.errors import ProtocolError
from sandbox.guest.streams import StreamSink
from sandbox.host import threads
from sandbox.logs.file import LogFile, open_log
from sandbox.records import LogPosition

MAX_LINE = 32 << 10
WINDOW = 512 << 10  # half of what the guest keeps for a container
_RETRY_S = 0.1
_RETRY_MAX_S = 5.0

Save = Callable[[LogPosition], Awaitable[None] | None]
OnProblem = Callable[[Exception | None], None]
T = TypeVar("T")

log = logging.getLogger(__name__)


class InputClient(Protocol):
    """What a relay needs of a `GuestClient`."""

    def open_input(self, sink: StreamSink, window: int) -> int: ...

    def grant(self, stream: int, count: int) -> None: ...

    def reset_input(self, stream: int) -> None: ...


def _log_problem(problem: Exception | None) -> None:
    if problem is not None:
        log.warning("log not written, will be tried again: %s", problem)


class LogRelay:
    """One container's log, and the sink of its stream.

    open -> (attach -> begin)* -> close: `attach` and `begin` once for each connection.
    """

    def __init__(self, file: LogFile | None, save: Save, on_problem: OnProblem) -> None:
        self._file = file  # None: discard
        self._save = save
        self._on_problem = on_problem
        self._unsaved = False  # the record on the disk may tell of another file than is written
        self._lock = asyncio.Lock()  # held while the file is touched
        self._client: InputClient | None = None
        self._stream = 0
        self._lines: list[bytes] = []  # received, whole lines
        self._rest = b""  # behind the last newline
        self._ended = False  # CLOSE was seen
        self._stopping = False
        self._closing = False
        self._wake = asyncio.Event()
        self._complete = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        path: Path | str,
        position: LogPosition,
        save: Save,
        *,
        on_problem: OnProblem = _log_problem,
    ) -> LogRelay:
        """Open or create the file where `position` says, and save where that is now.

        An empty path discards the log. `on_problem` is told what keeps lines from being written,
        and None when that is over; they are kept and tried again. Raises OSError, or what `save`
        raises.
        """
        if not str(path) or Path(path) == Path():
            return cls(None, save, on_problem)
        relay = cls(None, save, on_problem)
        file = await _in_thread(open_log, Path(path), position)
        try:
            if file.position != position:
                await _saved(save, file.position)
        except BaseException:
            file.discard()
            raise
        relay._file = file
        return relay

    # ------------------------------------------------------------------------- where we are

    @property
    def position(self) -> LogPosition:
        return self._file.position if self._file else LogPosition()

    @property
    def offset(self) -> int:
        """Of the byte to ask the guest for. It stands still only between `attach` and `begin`."""
        return self._file.written if self._file else 0

    async def complete(self) -> None:
        """Return when the guest has sent its last byte and all is written."""
        await self._complete.wait()

    # ---------------------------------------------------------------------------- connection

    async def attach(self, client: InputClient, window: int = WINDOW) -> int:
        """Number the stream to be named in Start or OpenLog, with the same window.

        What an older connection brought and was not written is forgotten: `offset` tells from
        where it is needed again. Raises GuestUnreachable.
        """
        await self.detach()
        self._lines, self._rest, self._ended = [], b"", False
        self._client = client
        self._stream = client.open_input(self, window)
        return self._stream

    async def begin(self, opened: int = 0) -> None:
        """Start writing: the stream really starts at byte `opened` (LogOpened.offset).

        It differs from `offset` when bytes are gone, or when someone else changed the file; the
        guest is right. Raises OSError, or what saving raises: then nothing is written.
        """
        if self._file is not None:
            if opened != self._file.written:
                position = await _in_thread(self._file.rebased, opened)
                await _saved(self._save, position)
                self._file.position, self._file.written = position, opened
            self._stopping = False
            self._pump = asyncio.create_task(self._run())

    async def detach(self) -> None:
        """Stop writing, wait for the piece that is being written, forget the rest. Idempotent."""
        pump, self._pump = self._pump, None
        self._stopping = True
        self._wake.set()
        if pump is not None:
            await asyncio.wait({pump})
        if self._client is not None:
            self._client.reset_input(self._stream)
            self._client = None

    def close(self) -> None:
        """Write what was received, then let go of the file; in the background. Idempotent."""
        self._closing = True
        self._wake.set()
        if self._pump is None and not self._lock.locked():
            self._release()

    async def wait_closed(self) -> None:
        """After `close`: return when the file was let go of."""
        if self._pump is not None:
            await asyncio.wait({self._pump})

    # ------------------------------------------------------------------------- the sink's side

    def data(self, chunk: memoryview) -> None:
        """Raises ProtocolError on a line without an end."""
        if self._file is None:
            self._grant(len(chunk))
            return
        data = self._rest + bytes(chunk)
        end = data.rfind(b"\n") + 1
        self._rest = data[end:]
        if len(self._rest) > MAX_LINE:
            raise ProtocolError(f"the guest sent a log line of more than {MAX_LINE} bytes")
        if end:
            self._lines.append(data[:end])
            self._wake.set()

    def closed(self) -> None:
        if self._rest:
            log.warning("the guest ended a log within a line; %d bytes are dropped", len(self._rest))
        self._ended = True
        self._wake.set()
        if self._file is None:
            self._complete.set()

    def _grant(self, count: int) -> None:
        if self._client is not None:
            self._client.grant(self._stream, count)

    # ---------------------------------------------------------------------------- the writer

    async def _run(self) -> None:
        """Write what comes, until `detach` or `close`."""
        try:
            await self._write_all()
        except Exception:
            # The edge of a task. The guest keeps what is not acknowledged, its writer blocks, and
            # the next connection takes it up again.
            log.exception("the relay of a log ended")
        if self._closing:
            async with self._lock:
                self._release()

    async def _write_all(self) -> None:
        retry_s = 0.0
        failing = False
        while not self._stopping:
            if not self._lines:
                if self._ended:
                    self._complete.set()
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            done, problem = await self._write_once()
            if failing is (problem is None):  # it began, or is over
                self._on_problem(problem)
            failing = problem is not None
            if not failing:
                continue
            if self._closing:
                return
            retry_s = _RETRY_S if done else min(max(retry_s * 2, _RETRY_S), _RETRY_MAX_S)
            await self._pause(retry_s)

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()

    async def _write_once(self) -> tuple[int, Exception | None]:
        """Append all lines that are there, and acknowledge those that are written."""
        async with self._lock:
            assert self._file is not None
            if self._unsaved:
                try:
                    await _saved(self._save, self._file.position)
                except Exception as error:
                    return 0, error
                self._unsaved = False
            lines, self._lines = self._lines, []
            data = lines[0] if len(lines) == 1 else b"".join(lines)
            done, problem = await _in_thread(self._file.append, data)
            if done < len(data):
                self._lines.insert(0, data[done:])
        self._grant(done)
        return done, problem

    async def _pause(self, pause_s: float) -> None:
        """Until a retry is due, or nobody wants it any more. New lines are no reason to hurry."""
        loop = asyncio.get_running_loop()
        until = loop.time() + pause_s
        while not (self._stopping or self._closing):
            self._wake.clear()
            try:
                async with asyncio.timeout_at(until):
                    await self._wake.wait()
            except TimeoutError:
                return

    # ------------------------------------------------------------------------------ rotation

    async def reopen(self, save: Save | None = None) -> None:
        """Go on in a new file if ours was renamed or removed (CRI, ReopenContainerLog).

        Afterwards a file exists at the path and the old one grows no more. Raises OSError, or what
        saving raises: then no new file is left and the old one goes on.
        """
        if self._file is None:
            return
        save = save or self._save
        async with self._lock:
            old = self._file
            if old.fd < 0 or await _in_thread(old.in_place):
                return
            await _saved(save, msgspec.structs.replace(old.position, next_base=old.written))
            try:
                self._file = await self._make_next(old, save)
                self._unsaved = False
            except (Exception, asyncio.CancelledError):
                self._unsaved = True  # before the old file grows, the record must name it again
                with suppress(Exception):
                    await _saved(save, old.position)
                    self._unsaved = False
                raise
            old.close()
            if self._closing and self._pump is None:
                self._release()

    async def _make_next(self, old: LogFile, save: Save) -> LogFile:
        new = await _in_thread(old.make_next)
        try:
            await _saved(save, new.position)
        except (Exception, asyncio.CancelledError):
            await _in_thread(new.discard)
            raise
        return new


async def _in_thread(function: Callable[..., T], *args: object) -> T:
    """A thread cannot be stopped, so a cancelled caller waits for it: nothing else may use the file
    meanwhile. A new file that is opened after the cancellation is discarded."""
    return await threads.run(
        functools.partial(function, *args), "husk-log", discard=_discard_file, pooled=True
    )


def _discard_file(made: object) -> None:
    if isinstance(made, LogFile):
        made.discard()


async def _saved(save: Save, position: LogPosition) -> None:
    result = save(position)
    if inspect.isawaitable(result):
        await result
