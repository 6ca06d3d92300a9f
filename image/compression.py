"""Decompress a layer: gzip (several members too), zstd or plain, detected by the first bytes.

The media type is not used, as some registries and builders state a wrong one. Decompression and hashing run
in a thread beside the unpacker. Both release the GIL, so the two cores of a small node share the work. At
most DEPTH chunks are queued between them.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

import zstandard
from isal import igzip, isal_zlib

from image.errors import LayerRejected

CHUNK = 1 << 20
DEPTH = 8
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_WINDOW_LIMIT = 128 << 20  # what zstd(1) accepts without --long

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


def open_plain(file: BinaryIO) -> BinaryIO:
    """Return a reader of the decompressed bytes. `file` must be seekable, and stays open when it is
    closed."""
    magic = file.read(4)
    file.seek(0)
    if magic.startswith(GZIP_MAGIC):
        return cast(BinaryIO, igzip.IGzipFile(fileobj=file, mode="rb"))  # type: ignore[no-untyped-call]
    if magic == ZSTD_MAGIC:
        inflater = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_LIMIT)
        return cast(BinaryIO, inflater.stream_reader(file, read_across_frames=True, closefd=False))
    return file


class Inflated:
    """The decompressed chunks of a layer, to be iterated once; close it, whether read to the end or not.

    Iterating raises LayerRejected when the compressed stream is invalid or ends early.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
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

    def _produce(self) -> None:
        end: BaseException | None = None
        try:
            plain = open_plain(self._file)
            while not self._closed.is_set() and (chunk := plain.read(CHUNK)):
                self._hash.update(chunk)
                self._chunks.put(chunk)
        except Exception as error:  # the thread's edge: raised again by the iterator
            end = error
        self._chunks.put(end)
