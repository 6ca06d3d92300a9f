"""Errors of `network`, named for what a caller can do about them; the facts are in fields."""

from __future__ import annotations

from collections.abc import Sequence

# Error codes that the CNI SPEC reserves (section "Error"): what they mean, and what to do.
_RESERVED_CODES = {
    1: "incompatible CNI version: the plug-in does not support the cniVersion of the configuration",
    2: "unsupported field in the network configuration: correct the file",
    3: "the container is unknown: the plug-in holds nothing for it",
    4: "an invalid CNI_ environment variable",
    5: "an I/O error of the plug-in",
    6: "the plug-in could not decode its input",
    7: "an invalid network configuration: correct the file",
    11: "the plug-in asks to try again later: the kubelet does",
    50: "the plug-in is not available: it cannot ADD now",
    51: "the plug-in is not available, and pods that run may have limited connectivity",
}


class NetworkError(Exception):
    """Base of all errors of this package."""


class NetworkNotReady(NetworkError):
    """There is no usable CNI configuration: pods wait until an administrator supplies one."""

    def __init__(self, message: str, reason: str = "NetworkPluginNotReady") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class Unsatisfiable(NetworkError):
    """A field of the request cannot be passed to a plug-in; nothing was changed."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class CniError(NetworkError):
    """A plug-in failed in a phase (`verb`: ADD, DEL, CHECK, STATUS, GC).

    `code` is the one of its error result, None if it printed none. Codes below 100 are reserved by the CNI
    SPEC (7: invalid configuration, 11: try again later), the others are the plug-in's own. `stderr` is the
    tail of what it wrote there.
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
        if code is not None:
            meaning = _RESERVED_CODES.get(code)
            text += f" (code {code}, {meaning})" if meaning else f" (code {code})"
        text += f"; {details}" if details else ""
        text += f"; its stderr: {stderr}" if stderr else ""
        super().__init__(text)
        self.plugin = plugin
        self.verb = verb
        self.message = message
        self.code = code
        self.details = details
        self.stderr = stderr


class NetnsError(NetworkError):
    """A network namespace could not be created, entered or removed (`step`)."""

    def __init__(self, path: str, step: str, problem: str) -> None:
        super().__init__(f"network namespace {path}: {step}: {problem}")
        self.path = path
        self.step = step
        self.problem = problem


class TapError(NetworkError):
    """A tap device could not be created or connected to its CNI interface."""

    def __init__(self, interface: str, step: str, problem: str) -> None:
        super().__init__(f"interface {interface}: {step}: {problem}")
        self.interface = interface
        self.step = step
        self.problem = problem


class TeardownFailed(NetworkError):
    """Part of a pod's network could not be released, the rest was. To be retried: what that needs is kept."""

    def __init__(self, pod_id: str, problems: Sequence[Exception]) -> None:
        whose = f"the network of pod {pod_id}" if pod_id else "the networks of former pods"
        super().__init__(f"could not release {whose}, to be retried: " + "; ".join(map(str, problems)))
        self.pod_id = pod_id
        self.problems = tuple(problems)
