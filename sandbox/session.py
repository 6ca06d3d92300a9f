"""The streams of an exec, an attachment or a forwarded port, as the streaming server uses them.

Every engine implements these (see `engine`). Reads and writes carry back-pressure: a client that does not
read stops the process's output, not the daemon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sandbox.errors import SandboxError

# How long an attached client that reads nothing may hold back a container's output: longer than a short
# outage of the network, far shorter than a container may be blocked by a forgotten terminal.
STALL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ExecResult:
    """The end of an exec that was run to its end. `exit_code` is 128 + signal where a signal ended it."""

    exit_code: int
    stdout: bytes
    stderr: bytes


# Of both outputs of an exec that is run to its end (CRI, ExecSyncResponse: 16 MB), so that the message with
# them, and `_CUT`, is not larger than what clients of the CRI receive: 16 MiB.
OUTPUT_MAX = (16 << 20) - 1024
_CUT = "husk: {what} cut, as a response has at most 16 MiB of output\n"


def within_limit(result: ExecResult) -> ExecResult:
    """Cut the outputs to OUTPUT_MAX bytes together, and add a line to stderr that says so. Pure.

    Each gets at least half of them.
    """
    stdout, stderr = result.stdout, result.stderr
    if len(stdout) + len(stderr) <= OUTPUT_MAX:
        return result
    kept_out = stdout[: max(OUTPUT_MAX // 2, OUTPUT_MAX - len(stderr))]
    kept_err = stderr[: OUTPUT_MAX - len(kept_out)]
    both = len(kept_out) < len(stdout) and len(kept_err) < len(stderr)
    what = "both outputs are" if both else f"{'stdout' if len(kept_out) < len(stdout) else 'stderr'} is"
    return ExecResult(result.exit_code, kept_out, kept_err + _CUT.format(what=what).encode())


class AttachmentStalled(SandboxError):
    """An attachment was ended: its client read nothing for STALL_TIMEOUT_S while output was waiting."""

    def __init__(self) -> None:
        super().__init__(f"detached: no output was read for {STALL_TIMEOUT_S:g} s")


class Sink(Protocol):
    """Where bytes are written: a process's stdin, a port."""

    async def write(self, data: bytes) -> None:
        """Write all of `data`; returns once it was accepted. Raises StreamReset if the reader has closed."""

    def close(self) -> None:
        """Let the reader see the end of the stream. Idempotent."""


class Source(Protocol):
    """Where bytes are read from: a process's output, a port."""

    async def read(self) -> bytes:
        """Return the next bytes; b"" at the end. Each call acknowledges the bytes of the one before."""

    def stop(self) -> None:
        """Discard everything that is still to come. Idempotent."""


class Session(Protocol):
    """A running conversation with a process. The caller must `close` it.

    Streams that were not asked for are None.
    """

    @property
    def stdin(self) -> Sink | None:
        """The process's standard input."""

    @property
    def stdout(self) -> Source | None:
        """Its standard output; both outputs where it has a terminal."""

    @property
    def stderr(self) -> Source | None:
        """Its standard error."""

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of the process's terminal. Without effect where it has none."""

    async def wait(self) -> int:
        """Wait for the end of the process and of its outputs; return the exit code."""

    def close(self) -> None:
        """Disconnect the streams. Processes that were started are not killed. Idempotent."""


class PortConnection(Protocol):
    """A TCP connection to a port in a pod. `close` ends both directions at once; idempotent."""

    @property
    def writer(self) -> Sink:
        """To the port; closing it shuts down that direction alone."""

    @property
    def reader(self) -> Source:
        """From the port."""

    def close(self) -> None:
        """End both directions."""
