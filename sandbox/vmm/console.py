"""The guest's console: read from a socket, the last of it kept in memory and on disk.

    console.log     the latest output, up to 64 KiB
    console.log.1   the output before that, up to 64 KiB

A guest can print without end, so everything is bounded. The files let a new daemon show what the guest
printed before it started. While no daemon is connected, the VMM drops the guest's output.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

from sandbox.host.tasks import end

LIMIT = 64 << 10


class Console:
    """Reads one console until it is closed. Owns the connection."""

    def __init__(self, connection: socket.socket, directory: Path) -> None:
        self._connection = connection
        self._path = directory / "console.log"
        self._tail = bytearray(read_tail(directory))
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size
        self._reader = asyncio.create_task(self._follow(), name="console")

    def tail(self) -> str:
        """Return the latest output, at most LIMIT bytes, made printable."""
        return printable(bytes(self._tail))

    async def drain(self, timeout_s: float = 1.0) -> None:
        """Read the rest of the output of a VMM that has exited, for `timeout_s` at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.wait({self._reader})

    async def close(self) -> None:
        """Idempotent."""
        if self._file < 0:
            return
        await end(self._reader)
        self._connection.close()
        os.close(self._file)
        self._file = -1

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # the connection is reset when the VMM exits
            while chunk := await loop.sock_recv(self._connection, 1 << 14):
                self._keep(chunk)

    def _keep(self, chunk: bytes) -> None:
        self._tail += chunk
        del self._tail[:-LIMIT]
        with contextlib.suppress(OSError):  # a full disk must not stop the reader
            if self._size + len(chunk) > LIMIT:
                self._path.rename(self._path.with_suffix(".log.1"))
                os.close(self._file)
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                self._size = 0
            self._size += os.write(self._file, chunk)


def read_tail(directory: Path) -> bytes:
    """Return the latest output that is on disk, at most LIMIT bytes; empty where there are no files."""
    kept = b""
    for name in ("console.log.1", "console.log"):
        with contextlib.suppress(FileNotFoundError):
            kept += (directory / name).read_bytes()
    return kept[-LIMIT:]


def printable(text: bytes) -> str:
    """Decode a guest's output, replacing control sequences, which could attack a terminal or a log reader."""
    lines = text.decode(errors="replace").replace("\r\n", "\n")
    return "".join(c if c == "\n" or c == "\t" or c.isprintable() else "?" for c in lines).strip("\n")
