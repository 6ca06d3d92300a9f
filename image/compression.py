"""Decompress a layer: gzip (several members too), zstd or plain, detected by the first bytes.

The media type is not used, as some registries and builders state a wrong one. Decompression and hashing run
in a thread beside the unpacker. Both release the GIL, so the two cores of a small node share the work. At
most DEPTH chunks are queued between them.

A zstd frame says how much memory its decoder needs, up to gigabytes. Above SMALL_WINDOW bytes one layer at a
time is decompressed, in the whole process, and above the limit `window_bytes` none.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import queue
import threading
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import BinaryIO, cast

import zstandard
from isal import igzip, isal_zlib

from image.budget import Limits, OverLimit, Stopped, check
from image.errors import LayerRejected

CHUNK = 256 << 10
DEPTH = 8
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
SMALL_WINDOW = 8 << 20  # what every decoder should support (RFC 8878, 3.1.1.1.2)
_SKIPPABLE = bytes.fromhex("2a4d18")  # after a byte 0x50 to 0x5f (RFC 8878, 3.1.2)
_HEADER_MAX = 18
_WINDOW_MIN = 1024  # libzstd accepts no lower limit
_PAUSE_S = 0.1

_BROKEN: tuple[type[Exception], ...] = (  # type: ignore[assignment]
    EOFError,
    zlib.error,
    isal_zlib.error,
    igzip.BadGzipFile,
    zstandard.ZstdError,
)


def broken_stream() -> tuple[type[Exception], ...]:
    """Return the exceptions that reading raises when the compressed bytes are invalid or end early."""
    return _BROKEN


def is_compressed(magic: bytes) -> bool:
    """Return whether a file that begins with these four bytes is one that `inflate` decompresses."""
    return magic.startswith(GZIP_MAGIC) or _is_zstd(magic)


def _is_zstd(magic: bytes) -> bool:
    return magic == ZSTD_MAGIC or (magic[1:] == _SKIPPABLE and magic[0] >> 4 == 5)


class LargeWindows:
    """The permission to decompress zstd frames with large windows, which one thread has at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def hold(self, check: Callable[[], None]) -> Iterator[None]:
        """Wait for it and hold it. Ends with what `check` raises."""
        while not self._lock.acquire(timeout=_PAUSE_S):
            check()
        try:
            yield
        finally:
            self._lock.release()


def inflate(
    file: BinaryIO, limits: Limits, watch: Callable[[], None], large: LargeWindows
) -> Generator[bytes]:
    """Yield the decompressed chunks of a file, which must be seekable and is read from its start.

    `watch` is called at every read: a compressed stream may go on for gigabytes without any output. Raises
    OverLimit, what `watch` raises, OSError, and what `broken_stream` returns.
    """
    file.seek(0)
    magic = file.read(4)
    file.seek(0)
    watched = cast(BinaryIO, _Watched(file, watch))
    if magic.startswith(GZIP_MAGIC):
        yield from _chunks(cast(BinaryIO, igzip.IGzipFile(fileobj=watched, mode="rb")))  # type: ignore[no-untyped-call]
    elif _is_zstd(magic):
        yield from _zstd(watched, limits, watch, large)
    else:
        yield from _chunks(watched)


class _Watched(io.RawIOBase):
    """A file that calls `watch` before each read."""

    def __init__(self, file: BinaryIO, watch: Callable[[], None]) -> None:
        self._file = file
        self._watch = watch

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        self._watch()
        return self._file.readinto(buffer)  # type: ignore[attr-defined, no-any-return]

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)


def _chunks(plain: BinaryIO) -> Iterator[bytes]:
    while chunk := plain.read(CHUNK):
        yield chunk


def _zstd(file: BinaryIO, limits: Limits, watch: Callable[[], None], large: LargeWindows) -> Iterator[bytes]:
    """Decompress with a small window as far as possible. Any frame may have another window, so what comes
    after is decompressed again from the start, with the permission for a large one."""
    window = _first_window(file)
    check(limits, "window_bytes", window)
    done = 0
    small = min(SMALL_WINDOW, limits.window_bytes)
    if window <= small:
        try:
            for chunk in _chunks(_zstd_reader(file, small)):
                done += len(chunk)
                yield chunk
        except zstandard.ZstdError:
            if small == limits.window_bytes:
                raise
        else:
            return
    with large.hold(watch):
        file.seek(0)
        for chunk in _chunks(_zstd_reader(file, limits.window_bytes)):
            if len(chunk) > done:
                yield chunk[done:]
            done = max(0, done - len(chunk))


def _zstd_reader(file: BinaryIO, window: int) -> BinaryIO:
    inflater = zstandard.ZstdDecompressor(max_window_size=max(window, _WINDOW_MIN))
    return cast(BinaryIO, inflater.stream_reader(file, read_across_frames=True, closefd=False))


def _first_window(file: BinaryIO) -> int:
    """Return the window of the first frame in bytes; 0 for a skippable or a broken one."""
    header = file.read(_HEADER_MAX)
    file.seek(0)
    try:
        return int(zstandard.get_frame_parameters(header).window_size)
    except zstandard.ZstdError:
        return 0


class Inflated:
    """The decompressed chunks of a layer, to be iterated once; close it, whether read to the end or not.

    Iterating raises LayerRejected when the compressed stream is invalid, ends early or is above a limit, and
    what `watch` raises.
    """

    def __init__(
        self,
        file: BinaryIO,
        limits: Limits | None = None,
        watch: Callable[[], None] = lambda: None,
        large: LargeWindows | None = None,
    ) -> None:
        self._file = file
        self._limits = limits or Limits()
        self._watch = watch
        self._large = large or LargeWindows()
        self._hash = hashlib.sha256()
        self._chunks: queue.Queue[bytes | BaseException | None] = queue.Queue(DEPTH)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="husk-inflate", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            item = self._chunks.get()
            if item is None:
                return
            if isinstance(item, _BROKEN):
                raise LayerRejected("", f"the compressed stream is broken: {item}") from item
            if isinstance(item, OverLimit):
                raise LayerRejected("", item.reason) from item
            if isinstance(item, BaseException):
                raise item
            yield item

    @property
    def digest(self) -> str:
        """The sha256 digest of the decompressed bytes (the layer's DiffID); valid after the last chunk."""
        self._thread.join()
        return f"sha256:{self._hash.hexdigest()}"

    def close(self) -> None:
        """Stop the thread and wait for its end. Idempotent."""
        self._closed.set()
        while self._thread.is_alive():
            # the producer may be blocked by the full queue
            try:
                self._chunks.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def _check(self) -> None:
        if self._closed.is_set():
            raise Stopped
        self._watch()

    def _produce(self) -> None:
        end: BaseException | None = None
        try:
            with contextlib.closing(inflate(self._file, self._limits, self._check, self._large)) as chunks:
                for chunk in chunks:
                    self._hash.update(chunk)
                    self._chunks.put(chunk)
                    if self._closed.is_set():
                        break
        except Exception as error:  # the thread's edge: raised again by the iterator
            end = error
        self._chunks.put(end)
