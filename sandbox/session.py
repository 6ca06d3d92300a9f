"""The streams of an exec, an attachment or a forwarded port, as whoever carries them to a client sees them.

Every engine gives such (`engine`), and the streaming server knows no more of them.
"""

from __future__ import annotations

from typing import Protocol


class Sink(Protocol):
    async def write(self, data: bytes) -> None:
        """Returns once it was taken. Raises StreamReset when the reader wants no more."""

    def close(self) -> None:
        """The reader sees the end. Idempotent."""


class Source(Protocol):
    async def read(self) -> bytes:
        """b"" at the end. Asking for more says that the last bytes were dealt with."""

    def stop(self) -> None:
        """Want no more. Idempotent."""


class Session(Protocol):
    """A conversation with a process; streams that were not asked for are None. `close` it in the end."""

    @property
    def stdin(self) -> Sink | None: ...
    @property
    def stdout(self) -> Source | None: ...
    @property
    def stderr(self) -> Source | None: ...

    async def resize(self, rows: int, columns: int) -> None: ...

    async def wait(self) -> int:
        """The exit code, behind the end of the outputs."""

    def close(self) -> None:
        """Hang up; what it started is not killed. Idempotent."""


class Connection(Protocol):
    """To a port in a pod. `close` ends both directions at once."""

    @property
    def writer(self) -> Sink: ...
    @property
    def reader(self) -> Source: ...

    def close(self) -> None: ...
