"""What can go wrong in `network`, named for what a caller can do about it; the facts are in fields."""

from __future__ import annotations

from collections.abc import Sequence


class NetworkError(Exception):
    """Base of all errors of this package."""


class NetworkNotReady(NetworkError):
    """There is no usable CNI configuration: pods wait until an administrator supplies one."""

    def __init__(self, message: str, reason: str = "NetworkPluginNotReady") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class Unsatisfiable(NetworkError):
    """A field of the wish cannot be handed to a plug-in; nothing was changed."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class CniError(NetworkError):
    """A plug-in failed. `code` is the one of the CNI specification; None: it gave no error result.

    Codes below 100 are the specification's (7: invalid configuration, 11: try again later), the
    others the plug-in's own.
    """

    def __init__(
        self,
        plugin: str,
        verb: str,
        message: str,
        *,
        code: int | None = None,
        details: str = "",
        stderr: str = "",
    ) -> None:
        text = f"CNI plug-in {plugin} failed to {verb}: {message}"
        text += f" (code {code})" if code is not None else ""
        text += f"; {details}" if details else ""
        text += f"; it wrote: {stderr}" if stderr else ""
        super().__init__(text)
        self.plugin = plugin
        self.verb = verb
        self.message = message
        self.code = code
        self.details = details
        self.stderr = stderr


class NetnsError(NetworkError):
    """A network namespace could not be made, entered or removed."""

    def __init__(self, path: str, step: str, problem: str) -> None:
        super().__init__(f"network namespace {path}: {step}: {problem}")
        self.path = path
        self.step = step
        self.problem = problem


class TapError(NetworkError):
    """A tap device could not be made or joined to its CNI interface."""

    def __init__(self, interface: str, step: str, problem: str) -> None:
        super().__init__(f"interface {interface}: {step}: {problem}")
        self.interface = interface
        self.step = step
        self.problem = problem


class TeardownFailed(NetworkError):
    """Not everything of a pod's network could be released; what could be was. Trying again is right."""

    def __init__(self, pod_id: str, problems: Sequence[Exception]) -> None:
        super().__init__(f"network of pod {pod_id}: " + "; ".join(map(str, problems)))
        self.pod_id = pod_id
        self.problems = tuple(problems)
