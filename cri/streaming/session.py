"""What the streaming server asks of pods and containers: the seam to `sandbox`, as it sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ExecWish:
    container_id: str
    cmd: tuple[str, ...]
    tty: bool
    stdin: bool
    stdout: bool
    stderr: bool


@dataclass(frozen=True, slots=True)
class AttachWish:
    container_id: str
    tty: bool
    stdin: bool
    stdout: bool
    stderr: bool


@dataclass(frozen=True, slots=True)
class ForwardWish:
    pod_id: str
    ports: tuple[int, ...]  # only WebSocket clients need them; in SPDY each connection names its own


Wish = ExecWish | AttachWish | ForwardWish


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
    """A process with the streams that were asked for; the others are None."""

    @property
    def stdin(self) -> Sink | None: ...
    @property
    def stdout(self) -> Source | None: ...
    @property
    def stderr(self) -> Source | None: ...

    async def resize(self, rows: int, columns: int) -> None: ...

    async def wait(self) -> int:
        """The exit code, once the outputs have ended."""

    def close(self) -> None:
        """Hang up. Idempotent."""


class Connection(Protocol):
    """To a port in a pod."""

    @property
    def writer(self) -> Sink: ...
    @property
    def reader(self) -> Source: ...

    def close(self) -> None:
        """Both directions at once. Idempotent."""


class Backend(Protocol):
    """Every call may raise SandboxError, and then holds nothing."""

    async def exec(self, wish: ExecWish) -> Session: ...
    async def attach(self, wish: AttachWish) -> Session: ...
    async def dial(self, pod_id: str, port: int) -> Connection: ...
