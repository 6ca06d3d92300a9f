"""What the streaming server knows of pods and containers: the options of a session, and its backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sandbox.session import PortConnection, Session


@dataclass(frozen=True, slots=True)
class ExecOptions:
    """A command to run in a container, and which of its streams the client opens."""

    container_id: str
    cmd: tuple[str, ...]
    tty: bool
    stdin: bool
    stdout: bool
    stderr: bool


@dataclass(frozen=True, slots=True)
class AttachOptions:
    """A container's first process to attach to, and which of its streams the client opens."""

    container_id: str
    tty: bool
    stdin: bool
    stdout: bool
    stderr: bool


@dataclass(frozen=True, slots=True)
class PortForwardOptions:
    """A pod whose ports may be connected to."""

    pod_id: str
    ports: tuple[int, ...]  # used by WebSocket clients only; in SPDY each connection names its port


SessionOptions = ExecOptions | AttachOptions | PortForwardOptions


class Backend(Protocol):
    """Starts sessions in pods. Every method raises SandboxError on failure and then holds nothing."""

    async def exec(self, options: ExecOptions) -> Session:
        """Start the command. The caller closes the session."""

    async def attach(self, options: AttachOptions) -> Session:
        """Attach to the container's first process. The caller closes the session."""

    async def dial(self, pod_id: str, port: int) -> PortConnection:
        """Connect to a TCP port in the pod. The caller closes the connection."""
