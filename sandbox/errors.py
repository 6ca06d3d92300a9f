"""What can go wrong in `sandbox`, named for what a caller can do about it.

Each error keeps its facts in fields; only `cri/errors.py` turns them into gRPC codes.
"""

from __future__ import annotations


class SandboxError(Exception):
    """Base of all errors of this package."""


class NotFound(SandboxError):
    """No pod or container answers to this id."""

    def __init__(self, kind: str, id: str) -> None:
        super().__init__(f"{kind} {id!r} does not exist")
        self.kind = kind
        self.id = id


class InvalidSpec(SandboxError):
    """A field of the request cannot be honoured; nothing was changed."""

    def __init__(self, field: str, problem: str, accepted: str = "") -> None:
        super().__init__(f"{field}: {problem}" + (f"; accepted: {accepted}" if accepted else ""))
        self.field = field
        self.problem = problem
        self.accepted = accepted


class Reserved(SandboxError):
    """The name is taken by another live object."""

    def __init__(self, name: str, owner: str) -> None:
        super().__init__(f"name {name!r} is reserved for {owner}")
        self.name = name
        self.owner = owner


class WrongState(SandboxError):
    """The object exists, and its state does not allow the call."""

    def __init__(self, kind: str, id: str, state: str, wanted: str) -> None:
        super().__init__(f"{kind} {id} is {state}, not {wanted}")
        self.kind = kind
        self.id = id
        self.state = state
        self.wanted = wanted


class DeadlineExceeded(SandboxError):
    """A bounded wait ended without its event."""

    def __init__(self, what: str, timeout_s: float) -> None:
        super().__init__(f"{what}: not done within {timeout_s:g} s")
        self.what = what
        self.timeout_s = timeout_s


class MissingProgram(SandboxError):
    """A program or file that Husk needs of the host is not there; says how to get it."""

    def __init__(self, what: str, package: str) -> None:
        super().__init__(f"{what} was not found; install it with: {package}")
        self.what = what
        self.package = package


class PhaseFailed(SandboxError):
    """A step of starting a pod or container failed: which, after how long, and the console's tail."""

    def __init__(self, phase: str, elapsed_s: float, reason: str, console: str = "") -> None:
        text = f"{phase} failed after {elapsed_s:.2f} s: {reason}"
        super().__init__(text + (f"\nguest console, last lines:\n{console}" if console else ""))
        self.phase = phase
        self.elapsed_s = elapsed_s
        self.reason = reason
        self.console = console


class VmmError(SandboxError):
    """The hypervisor or a helper of it could not be started, or broke."""


class VmmGone(VmmError):
    """The VM does not run any more."""


class RootfsUnusable(SandboxError):
    """A root filesystem is of a kind that cannot be used where the container is to run."""


class PlanUnreadable(SandboxError):
    """A container's saved plan is missing, damaged or of another release, so nothing can be run in it."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"plan {path}: {problem}; remove the container and create it again")
        self.path = path
        self.problem = problem


class GuestError(SandboxError):
    """The agent refused a request: `step` failed with `errno` (0: no system call failed)."""

    def __init__(self, step: str, errno: int, message: str) -> None:
        super().__init__(f"{step}: {message}")
        self.step = step
        self.errno = errno
        self.message = message


class InvalidContainerConfig(GuestError):
    """A client wished what cannot be had where the container runs: its program, directory, limits, sysctls.

    A matter of the request or of the image, not of Husk: asking again is of no use.
    """


class GuestUnreachable(SandboxError):
    """No connection to the agent, or it was lost while a request was under way."""


class ProtocolError(GuestUnreachable):
    """The guest sent bytes that make no sense; the connection is closed."""


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
    """A subscriber did not take its events as fast as they came."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"more than {waiting} events waited to be taken; see the state and subscribe anew")
        self.waiting = waiting


class StreamReset(SandboxError):
    """The reader at the other end wants no more of this stream."""
