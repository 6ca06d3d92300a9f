"""What the streaming server asks of pods and containers: the seam to `sandbox`, as it sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sandbox.session import PortConnection, Session


@dataclass(frozen=True, slots=True)
class ExecOptions:
    container_id: str
    cmd: tuple[str, ...]
    tty: bool
    stdin: bool
    stdout: bool
    stderr: bool


@dataclass(frozen=True, slots=True)
class AttachOptions:
    container_id: str
    tty: bool
    stdin: bool
    stdout: bool
    stderr: bool


@dataclass(frozen=True, slots=True)
class PortForwardOptions:
    pod_id: str
    ports: tuple[int, ...]  # only WebSocket clients need them; in SPDY each connection names its own


SessionOptions = ExecOptions | AttachOptions | PortForwardOptions


class Backend(Protocol):
    """Every call may raise SandboxError, and then holds nothing."""

    async def exec(self, wish: ExecOptions) -> Session: ...
    async def attach(self, wish: AttachOptions) -> Session: ...
    async def dial(self, pod_id: str, port: int) -> PortConnection: ...
