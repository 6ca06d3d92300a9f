"""Receive blobs: written to a staging file and hashed as they arrive, used only when complete and verified.

Compressed blobs are not kept after a layer was unpacked, so a blob is a file in a staging directory, which
its owner deletes. A blob that exceeds its announced size is rejected at once, not at its end.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec

from image.errors import DigestMismatch, DiskFull, StorageFailed
from image.free_space import describe_free
from image.manifest import Descriptor
from sandbox.host import threads

BATCH = 256 << 10  # bytes written at a time: each connection holds so many


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far one step of one blob is, in bytes of the blob.

    Steps are "download", "unpack" and, for a layer that is stored already, "present".
    """

    item: str  # digest
    step: str
    current: int
    total: int


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest or index as it came, with its verified digest and the media type that the source states.

    It may have megabytes: who gets one decodes and drops it before the next await.
    """

    data: bytes
    digest: str
    media_type: str = ""

    @property
    def descriptor(self) -> Descriptor:
        """What refers to it."""
        return Descriptor(media_type=self.media_type, digest=self.digest, size=len(self.data))


class Source(Protocol):
    """Where an image comes from: a registry or an archive. All methods raise ImageError."""

    async def manifest(self, target: str, size: int | None = None) -> Fetched:
        """Return the manifest or index of this tag or digest, verified by its digest and size if known."""

    async def small_blob(self, descriptor: Descriptor, key: str) -> bytes:
        """Return a whole blob, verified, as `manifest` does. `key` names the limit of its size."""

    async def blob(self, descriptor: Descriptor, into: BlobWriter, *, parallel: bool = True) -> None:
        """Write the blob, from where `into` ends, and call its `finish`. `parallel` allows more than one
        connection for it."""

    async def close(self) -> None:
        """Release connections or files."""


class BlobWriter:
    """The staging file of one blob, made at `path`; its first `written` bytes are written and hashed.

    For one task; close it. Its methods raise DiskFull and StorageFailed when writing fails, DigestMismatch
    when the bytes are not the blob's. `on_progress` is called with `written` after each batch.
    """

    def __init__(
        self, path: Path, descriptor: Descriptor, on_progress: Callable[[int], None] | None = None
    ) -> None:
        self.path = path
        self.descriptor = descriptor
        self.written = 0
        self._on_progress = on_progress
        self._buffer = bytearray()
        self._algorithm = descriptor.digest.partition(":")[0]
        self._hash = hashlib.new(self._algorithm)
        self._parts: list[BlobPart] = []
        self._hashing = asyncio.Lock()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def close(self) -> None:
        """Close the file, which stays. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def what(self) -> str:
        """The blob's name in errors."""
        return f"blob {self.descriptor.digest}"

    async def append(self, chunks: AsyncIterator[bytes]) -> None:
        """Append a whole stream. After an error, what came before it stays and counts as written."""
        try:
            async for chunk in chunks:
                if self.written + len(self._buffer) + len(chunk) > self.descriptor.size:
                    raise DigestMismatch(f"{self.what}: size", str(self.descriptor.size), "more")
                self._buffer += chunk
                if len(self._buffer) >= BATCH:
                    await self._flush()
        finally:
            await self._flush()

    def part(self, begin: int, end: int) -> BlobPart:
        """Return a writer of the bytes from `begin` to before `end`, beyond what is written in order.

        Parts must not overlap, and may be written at once. `written` follows as soon as all before is there.
        """
        part = BlobPart(self, begin, end)
        self._parts.append(part)
        return part

    async def hash_parts(self) -> None:
        """Hash what parts have completed, and report progress."""
        async with self._hashing:
            while (end := self._complete_to()) > self.written:
                size = min(BATCH, end - self.written)
                await threads.run(partial(self._hash_next, size), "husk-download", pooled=True)
        if self._on_progress is not None:
            ahead = sum(
                part.at - max(part.begin, self.written) for part in self._parts if part.at > self.written
            )
            self._on_progress(self.written + ahead)

    def _complete_to(self) -> int:
        return max((part.at for part in self._parts if part.begin <= self.written), default=0)

    def forget_parts(self) -> None:
        """Drop what is not written in order. No part may be in use. Idempotent."""
        if self._parts:
            self._parts.clear()
            os.ftruncate(self._fd, self.written)
            os.lseek(self._fd, 0, os.SEEK_END)

    def restart(self) -> None:
        """Truncate the file: the server sends the blob from its start, or what came was wrong."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._buffer.clear()
        self.written = 0
        self._hash = hashlib.new(self._algorithm)

    async def finish(self) -> None:
        """Verify size and digest. Raises DigestMismatch."""
        await self._flush()
        if self.written != self.descriptor.size:
            raise DigestMismatch(f"{self.what}: size", str(self.descriptor.size), str(self.written))
        actual = f"{self._algorithm}:{self._hash.hexdigest()}"
        if actual != self.descriptor.digest:
            raise DigestMismatch(self.what, self.descriptor.digest, actual)

    async def _flush(self) -> None:
        """Write in a thread. A cancelled caller waits for it: the buffer must not be written twice."""
        if not self._buffer:
            return
        data, self._buffer = self._buffer, bytearray()
        await threads.run(lambda: self._write(data), "husk-download", pooled=True)
        self.written += len(data)
        if self._on_progress is not None:
            self._on_progress(self.written)

    def _hash_next(self, size: int) -> None:
        """Hash and count what a part has written: it was received a moment ago, so it is in the page cache.

        A cancelled caller waits for this, and does nothing after it.
        """
        try:
            data = os.pread(self._fd, size, self.written)
        except OSError as error:
            raise storage_error(error, self.path, "reading") from error
        self._hash.update(data)
        self.written += len(data)

    def write_at(self, at: int, data: bytearray) -> None:
        """Write bytes at an offset, for a part. Blocking."""
        view = memoryview(data)
        try:
            while view:
                done = os.pwrite(self._fd, view, at)
                view, at = view[done:], at + done
        except OSError as error:
            raise storage_error(error, self.path, "downloading") from error

    def _write(self, data: bytearray) -> None:
        self._hash.update(data)
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise storage_error(error, self.path, "downloading") from error


class BlobPart:
    """A range of a blob that is written beside others; `at` is up to where. Made by `BlobWriter.part`."""

    def __init__(self, blob: BlobWriter, begin: int, end: int) -> None:
        self.begin = begin
        self.at = begin
        self.end = end
        self._blob = blob

    async def append(self, chunks: AsyncIterator[bytes]) -> None:
        """Append a stream up to the part's end. After an error, what came before it stays.

        Raises DiskFull and StorageFailed.
        """
        buffer = bytearray()
        try:
            async for chunk in chunks:
                buffer += chunk[
                    : self.end - self.at - len(buffer)
                ]  # a server may send more than was asked for
                if len(buffer) >= BATCH:
                    data, buffer = buffer, bytearray()
                    await self._write(data)
                if self.at + len(buffer) == self.end:
                    return
        finally:
            await self._write(buffer)

    async def _write(self, data: bytearray) -> None:
        if not data:
            return
        await threads.run(lambda: self._write_next(data), "husk-download", pooled=True)
        await self._blob.hash_parts()

    def _write_next(self, data: bytearray) -> None:
        """Write and count. A cancelled caller waits for this, and does nothing after it."""
        self._blob.write_at(self.at, data)
        self.at += len(data)


def storage_error(error: OSError, path: Path, what: str) -> DiskFull | StorageFailed:
    """Return the ImageError for a system call on the store that failed; `what` was being done."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(str(path.parent), what, describe_free(path.parent))
    return StorageFailed(str(path), what, error.errno or 0, error.strerror or str(error))
