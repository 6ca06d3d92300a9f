"""The errors of this package, named by what a caller can do about them.

Each keeps its facts in fields; only `cri/errors.py` maps them to gRPC codes.
"""

from __future__ import annotations


class SandboxError(Exception):
    """Base of all errors of this package."""


class NotFound(SandboxError):
    """No pod or container has this id."""

    def __init__(self, kind: str, id: str) -> None:
        super().__init__(f"{kind} {id!r} does not exist")
        self.kind = kind
        self.id = id


class InvalidSpec(SandboxError):
    """A field of the request has a value that is invalid or not supported; nothing was changed."""

    def __init__(self, field: str, problem: str, accepted: str = "") -> None:
        super().__init__(f"{field}: {problem}" + (f"; accepted: {accepted}" if accepted else ""))
        self.field = field
        self.problem = problem
        self.accepted = accepted


class Reserved(SandboxError):
    """The name is in use by another pod or container."""

    def __init__(self, name: str, owner: str) -> None:
        super().__init__(f"name {name!r} is reserved for {owner}")
        self.name = name
        self.owner = owner


class WrongState(SandboxError):
    """The state of the object does not allow the call."""

    def __init__(self, kind: str, id: str, state: str, wanted: str) -> None:
        super().__init__(f"{kind} {id} is {state}, not {wanted}")
        self.kind = kind
        self.id = id
        self.state = state
        self.wanted = wanted


class DeadlineExceeded(SandboxError):
    """An operation did not end within its time limit, in seconds."""

    def __init__(self, what: str, timeout_s: float) -> None:
        super().__init__(f"{what}: not done within {timeout_s:g} s")
        self.what = what
        self.timeout_s = timeout_s


class MissingProgram(SandboxError):
    """A program or file that Husk needs is not installed; names the command that installs it."""

    def __init__(self, what: str, package: str) -> None:
        super().__init__(f"{what} was not found; install it with: {package}")
        self.what = what
        self.package = package


class PhaseFailed(SandboxError):
    """A step of starting a pod or container failed: which, after how long, and the guest console's tail."""

    def __init__(self, phase: str, elapsed_s: float, reason: str, console: str = "") -> None:
        text = f"{phase} failed after {elapsed_s:.2f} s: {reason}"
        super().__init__(text + (f"\nguest console, last lines:\n{console}" if console else ""))
        self.phase = phase
        self.elapsed_s = elapsed_s
        self.reason = reason
        self.console = console


class VmmError(SandboxError):
    """The hypervisor or one of its helpers could not be started, or failed."""


class VmmGone(VmmError):
    """The VM has ended."""


class HelperGone(VmmGone):
    """A helper of the VM has ended, without which its guest can do nothing; the VMM may still run."""


class BeyondNode(SandboxError):
    """A limit is more than this node, or a VM on it, can have; nothing was changed."""

    def __init__(self, what: str, wanted: str, has: str) -> None:
        super().__init__(f"{what}: {wanted} asked for; {has}")
        self.what = what
        self.wanted = wanted
        self.has = has


class DeviceBusy(SandboxError):
    """A device of the host is in use by something that excludes the requested use."""

    def __init__(self, field: str, path: str, problem: str) -> None:
        super().__init__(f"{field}: {path!r} is busy: {problem}")
        self.field = field
        self.path = path
        self.problem = problem


class RootfsUnusable(SandboxError):
    """A root filesystem is of a kind that cannot be used where the container is to run."""


class PlanUnreadable(SandboxError):
    """A container's saved plan is missing, damaged or of another release, so nothing can be run in it."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"plan {path}: {problem}; remove the container and create it again")
        self.path = path
        self.problem = problem


class GuestError(SandboxError):
    """A request was refused where the container runs: `step` failed with `errno` (0: no system call did)."""

    def __init__(self, step: str, errno: int, message: str) -> None:
        super().__init__(f"{step}: {message}")
        self.step = step
        self.errno = errno
        self.message = message


class InvalidContainerConfig(GuestError):
    """A request that cannot be satisfied where the container runs: its program, directory, limits or sysctls.

    The request or the image is the cause, not Husk: retrying is useless.
    """


class GuestUnreachable(SandboxError):
    """There is no connection to the agent, or it was lost during a request. Retrying may help."""


class ProtocolError(GuestUnreachable):
    """The guest violated the protocol; the connection is closed."""


class VersionMismatch(GuestUnreachable):
    """The agent and Husk have no protocol version in common: the VM runs another release's guest image.

    Both are ranges, lowest and highest version.
    """

    def __init__(self, agent: tuple[int, int], husk: tuple[int, int]) -> None:
        super().__init__(
            f"the agent speaks protocol {_versions(agent)}, Husk speaks {_versions(husk)}; "
            f"the pod can only be stopped and removed"
        )
        self.agent = agent
        self.husk = husk


def _versions(spoken: tuple[int, int]) -> str:
    lowest, highest = spoken
    return f"version {lowest}" if lowest == highest else f"versions {lowest} to {highest}"


class FellBehind(SandboxError):
    """A subscriber did not read its events as fast as they came."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"more than {waiting} events were unread; list the state and subscribe again")
        self.waiting = waiting


class StreamReset(SandboxError):
    """The reader at the other end has closed this stream."""
