"""Copies the guest's log stream to the container's log file, without a line lost or duplicated.

The guest formats the lines and keeps what is not acknowledged; only the host writes files. So a relay copies
bytes: it appends them in large pieces, and grants credit, which is the acknowledgement, only for what is in
the file. Whatever ends the daemon or the connection, the next relay requests the byte after the last one in
the file (`offset`); how that is known is described in `logs.file`.

A hostile guest can fill its own log with lines of its choice. The bytes are written verbatim, since parsing
each line would cost more than all the rest and protect no reader (the kubelet skips a line that it cannot
parse). But only whole lines are written, and a line longer than MAX_LINE (the agent cuts lines at 16 KiB)
that does not end within the DATA frame in which it became too long is a ProtocolError: no reader meets a line
above MAX_LINE + 64 KiB. Memory is bounded by the window, the rate by the speed of the disk, the size by
rotation.

Files are written in a worker thread, one call at a time: a slow disk must not stop other pods.
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

    def open_input(self, sink: StreamSink, window: int) -> int:
        """Open a stream from the guest with `window` bytes of credit, and return its number."""

    def grant(self, stream: int, count: int) -> None:
        """Allow the guest to send `count` bytes more."""

    def reset_input(self, stream: int) -> None:
        """Stop the stream; data that is still on its way is dropped. Idempotent."""


class LogRelay:
    """One container's log: the sink of its stream, and the writer of its file.

    open -> (attach -> begin)* -> close: `attach` and `begin` once for each connection. For one event loop.
    """

    def __init__(self, path: Path, save: Save, on_problem: OnProblem | None) -> None:
        self._path = path
        self._file: LogFile | None = None  # None: discard
        self._save = save
        self._on_problem = on_problem or self._log_problem
        self._unsaved = False  # the record on disk may name another file than the one in use
        self._lock = asyncio.Lock()  # held while the file is used
        self._client: InputClient | None = None
        self._stream = 0
        self._lines: list[bytes] = []  # received, whole lines
        self._rest = b""  # after the last newline
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
        on_problem: OnProblem | None = None,
    ) -> LogRelay:
        """Open or create the file that `position` describes, and save its position now.

        An empty path discards the log. `on_problem` is called with what keeps lines from being written, and
        with None when they are written again; meanwhile they are kept and retried. The default logs a
        warning. Raises OSError, or what `save` raises; then no file is left that was created.
        """
        relay = cls(Path(path), save, on_problem)
        if relay._path == Path():
            return relay
        file = await _in_thread(open_log, relay._path, position)
        try:
            if file.position != position:
                await _saved(save, file.position)
        except BaseException:
            file.discard()
            raise
        relay._file = file
        return relay

    def _log_problem(self, problem: Exception | None) -> None:
        if problem is not None:
            log.warning("cannot write container log %s, retrying: %s", self._path, problem)
        else:
            log.info("container log %s is written again", self._path)

    # ---------------------------------------------------------------------------- position

    @property
    def position(self) -> LogPosition:
        """What the record must hold for a later daemon to go on with this file."""
        return self._file.position if self._file else LogPosition()

    @property
    def offset(self) -> int:
        """Offset in the stream of the next byte to request. Stable only between `attach` and `begin`."""
        return self._file.written if self._file else 0

    async def complete(self) -> None:
        """Wait until the guest has sent its last byte and all lines are written."""
        await self._complete.wait()

    # ---------------------------------------------------------------------------- connection

    async def attach(self, client: InputClient, window: int = WINDOW) -> int:
        """Allocate the stream to be named in Start or OpenLog, with the same window in bytes.

        Drops what an earlier connection delivered and was not written: `offset` is where it has to be sent
        again from. Raises GuestUnreachable.
        """
        await self.detach()
        self._lines, self._rest, self._ended = [], b"", False
        self._client = client
        self._stream = client.open_input(self, window)
        return self._stream

    async def begin(self, opened: int = 0) -> None:
        """Start writing. The stream starts at byte `opened` (LogOpened.offset).

        It differs from `offset` when the guest no longer has these bytes, or when the file was changed by
        another program; then `opened` counts. Raises OSError, or what saving raises: then nothing is written.
        """
        if self._file is not None:
            if opened != self._file.written:
                position = await _in_thread(self._file.rebased, opened)
                await _saved(self._save, position)
                self._file.position, self._file.written = position, opened
            self._stopping = False
            self._pump = asyncio.create_task(self._run())

    async def detach(self) -> None:
        """Stop writing, wait for the current write, and reset the stream; the rest is dropped. Idempotent."""
        pump, self._pump = self._pump, None
        self._stopping = True
        self._wake.set()
        if pump is not None:
            await asyncio.wait({pump})
        if self._client is not None:
            self._client.reset_input(self._stream)
            self._client = None

    def close(self) -> None:
        """Write what was received, then close the file; in the background. Idempotent."""
        self._closing = True
        self._wake.set()
        if self._pump is None and not self._lock.locked():
            self._release()

    async def wait_closed(self) -> None:
        """Wait until the file is closed, after `close`."""
        if self._pump is not None:
            await asyncio.wait({self._pump})

    # ------------------------------------------------------------------------- stream sink

    def data(self, chunk: memoryview) -> None:
        """Queue the lines of a DATA frame. Raises ProtocolError for a line longer than MAX_LINE."""
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
        """Note the end of the stream; a last line without newline is dropped, as the agent sends none."""
        if self._rest:
            log.warning(
                "the guest closed the log %s within a line: dropping its %d bytes",
                self._path,
                len(self._rest),
            )
        self._ended = True
        self._wake.set()
        if self._file is None:
            self._complete.set()

    def _grant(self, count: int) -> None:
        if self._client is not None:
            self._client.grant(self._stream, count)

    # ---------------------------------------------------------------------------- the writer

    async def _run(self) -> None:
        """Write what arrives, until `detach` or `close`."""
        try:
            await self._write_all()
        except Exception:
            # The task's edge. The guest keeps what is not acknowledged, its writers block, and the next
            # connection sends it again.
            log.exception("stopped writing container log %s until the next connection", self._path)
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
            if failing is (problem is None):  # it has started, or stopped, failing
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
        """Append all queued lines, and acknowledge those that are written."""
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
        """Wait until a retry is due, or until `detach` or `close`. New lines do not shorten it."""
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
        """Continue in a new file if the current one was renamed or removed (CRI, ReopenContainerLog).

        On success a file exists at the path and the old one does not grow any more. Raises OSError, or what
        saving raises: then no new file is left, and the old one stays in use.
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
