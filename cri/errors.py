"""Errors as gRPC status codes: the only place that knows them.

The codes of "gone", "reserved", "not offered" and the like are the ones that kubelets rely on; where
the CRI fixes none, the nearest code of gRPC's own list is given (never NOT_FOUND, which a kubelet
takes as "gone").
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import grpc

from cri.streaming.tokens import TooManyTokens
from image import errors as image
from network import errors as network
from sandbox import errors as sandbox
from sandbox.host.flights import ShuttingDown
from sandbox.spec import Value

Code = grpc.StatusCode

# The status travels in a trailer, and clients take about 8 KiB of them. The log has it whole.
MESSAGE_MAX = 3000

CODES: Mapping[type[BaseException], grpc.StatusCode] = {
    sandbox.NotFound: Code.NOT_FOUND,
    sandbox.InvalidSpec: Code.INVALID_ARGUMENT,
    sandbox.Reserved: Code.FAILED_PRECONDITION,
    sandbox.WrongState: Code.FAILED_PRECONDITION,
    sandbox.MissingProgram: Code.FAILED_PRECONDITION,
    sandbox.InvalidContainerConfig: Code.FAILED_PRECONDITION,
    sandbox.DeadlineExceeded: Code.DEADLINE_EXCEEDED,
    sandbox.FellBehind: Code.RESOURCE_EXHAUSTED,
    sandbox.GuestUnreachable: Code.UNAVAILABLE,
    sandbox.VmmGone: Code.UNAVAILABLE,
    sandbox.SandboxError: Code.INTERNAL,
    image.InvalidReference: Code.INVALID_ARGUMENT,
    image.ImageNotFound: Code.NOT_FOUND,
    image.ManifestNotFound: Code.NOT_FOUND,
    image.Unauthorized: Code.UNAUTHENTICATED,
    image.RegistryUnavailable: Code.UNAVAILABLE,
    image.DigestMismatch: Code.DATA_LOSS,
    image.UnsupportedMedia: Code.FAILED_PRECONDITION,
    image.ManifestInvalid: Code.FAILED_PRECONDITION,
    image.LayerRejected: Code.FAILED_PRECONDITION,
    image.ArchiveInvalid: Code.INVALID_ARGUMENT,
    image.DiskFull: Code.RESOURCE_EXHAUSTED,
    image.PullDeadline: Code.DEADLINE_EXCEEDED,
    image.MirrorConfigInvalid: Code.FAILED_PRECONDITION,
    image.ImageError: Code.INTERNAL,
    network.NetworkNotReady: Code.UNAVAILABLE,
    network.Unsatisfiable: Code.INVALID_ARGUMENT,
    network.NetworkError: Code.INTERNAL,
    ShuttingDown: Code.UNAVAILABLE,
    TooManyTokens: Code.RESOURCE_EXHAUSTED,
}

# Whose fault it is decides how loud the log is.
CLIENT_CODES = frozenset(
    {
        Code.NOT_FOUND,
        Code.INVALID_ARGUMENT,
        Code.FAILED_PRECONDITION,
        Code.UNAUTHENTICATED,
        Code.UNIMPLEMENTED,
        Code.CANCELLED,
        Code.DEADLINE_EXCEEDED,
    }
)


class NotOffered(Exception):
    """An rpc of the CRI that Husk does not serve."""

    def __init__(self, method: str) -> None:
        super().__init__(f"husk does not offer {method} yet")
        self.method = method


class Failure(Value, frozen=True, kw_only=True):
    """An error as a client sees it (`message`) and as the log keeps it (`full`)."""

    code: grpc.StatusCode
    message: str
    full: str
    expected: bool  # False: a bug, so its traceback is worth keeping


def failure_of(error: BaseException) -> Failure:
    code = _code(error)
    if code is None:
        tag = secrets.token_hex(4)
        full = f"internal error {tag}: {type(error).__name__}: {error}"
        return Failure(code=Code.INTERNAL, message=_short(full), full=full, expected=False)
    full = str(error) or type(error).__name__
    return Failure(code=code, message=_short(full), full=full, expected=True)


def _code(error: BaseException) -> grpc.StatusCode | None:
    if isinstance(error, NotOffered):
        return Code.UNIMPLEMENTED
    if isinstance(error, sandbox.PhaseFailed) and error.__cause__ is not None:
        # the phase says where, its cause says what a client can do about it
        return _code(error.__cause__) or Code.INTERNAL
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return None


def _short(text: str) -> str:
    """The beginning and, as a console's last lines are the telling ones, more of the end."""
    if len(text) <= MESSAGE_MAX:
        return text
    head = MESSAGE_MAX // 3
    return f"{text[:head]}\n[...]\n{text[-(MESSAGE_MAX - head) :]}"
