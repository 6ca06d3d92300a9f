"""A streaming server on a loopback address, over a fake of pods and containers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

from cri.streaming.server import StreamingServer
from cri.streaming.session import ExecOptions
from tests.fakes.streaming import FakeBackend, FakeConnection, FakeSession, Pipe
from tests.kit.eventually import eventually

V4 = "v4.channel.k8s.io"
V5 = "v5.channel.k8s.io"
TUNNEL = "SPDY/3.1+portforward.k8s.io"
EXEC = ExecOptions("c1", ("sh",), tty=False, stdin=True, stdout=True, stderr=True)
TTY = replace(EXEC, tty=True, stderr=False)
SUCCESS = {"metadata": {}, "status": "Success"}
PIPE_MAX = 512 << 10  # bytes that a pipe of the fake may ever hold while its other end is stopped


@dataclass
class Site:
    """The server, its backend, and the clock of its tokens in seconds."""

    server: StreamingServer
    backend: FakeBackend
    now: list[float] = field(default_factory=lambda: [0.0])

    async def idle(self) -> None:
        """Wait until no connection is left."""
        await eventually(lambda: len(self.server) == 0, describe="every connection has ended")

    async def session(self) -> FakeSession:
        """Wait for the first session that the backend started."""
        await eventually(lambda: bool(self.backend.sessions), describe="a session was started")
        return self.backend.sessions[0]


async def echo(session: FakeSession) -> None:
    """Copy stdin to stdout, write its size to stderr, exit with 3."""
    assert session.stdin is not None
    assert session.stdout is not None
    total = 0
    while chunk := await session.stdin.read():
        total += len(chunk)
        await session.stdout.write(chunk)
    if session.stderr is not None:
        await session.stderr.write(b"%d bytes" % total)
    session.finish(3)


async def echo_service(connection: FakeConnection) -> None:
    """Send back what a connection of port-forward receives."""
    while chunk := await connection.writer.read():
        await connection.reader.write(chunk)
    connection.reader.close()


def stdin_of(session: FakeSession) -> Pipe:
    """Return the pipe to the process's stdin."""
    assert session.stdin is not None
    return session.stdin


def exit_code(status: bytes) -> int:
    """Parse metav1.Status as client-go does."""
    document = json.loads(status)
    if document == SUCCESS:
        return 0
    assert (document["status"], document["reason"]) == ("Failure", "NonZeroExitCode")
    (cause,) = document["details"]["causes"]
    assert cause["reason"] == "ExitCode"
    return int(cause["message"])
