"""What the streaming server asks of pods and containers: the seam to `sandbox`, as it sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sandbox.session import Connection, Session


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


class Backend(Protocol):
    """Every call may raise SandboxError, and then holds nothing."""

    async def exec(self, wish: ExecWish) -> Session: ...
    async def attach(self, wish: AttachWish) -> Session: ...
    async def dial(self, pod_id: str, port: int) -> Connection: ...
