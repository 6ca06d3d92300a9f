"""The gRPC status code of every error; no other file knows status codes.

The codes for objects that do not exist, reserved names, unimplemented rpcs and the like are those that
kubelets rely on. Where the CRI specifies none, the closest code of gRPC's list is used, but never NOT_FOUND,
which a kubelet takes for "already removed".
"""

from __future__ import annotations

import errno
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

# Characters. The status is sent in a trailer, of which clients accept about 8 KiB. The log has the full text.
MESSAGE_MAX = 3000

CODES: Mapping[type[BaseException], grpc.StatusCode] = {
    sandbox.NotFound: Code.NOT_FOUND,
    sandbox.InvalidSpec: Code.INVALID_ARGUMENT,
    sandbox.Reserved: Code.FAILED_PRECONDITION,
    sandbox.WrongState: Code.FAILED_PRECONDITION,
    sandbox.PlanUnreadable: Code.FAILED_PRECONDITION,
    sandbox.MissingProgram: Code.FAILED_PRECONDITION,
    sandbox.InvalidContainerConfig: Code.FAILED_PRECONDITION,
    sandbox.BeyondNode: Code.RESOURCE_EXHAUSTED,
    sandbox.DeviceBusy: Code.FAILED_PRECONDITION,
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
    image.ImageRefused: Code.FAILED_PRECONDITION,
    image.ImagePinned: Code.FAILED_PRECONDITION,
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

# Errors of the client rather than of Husk; they are logged at a lower level.
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


# A full disk is not a bug of Husk, and a client can do something about it.
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class NotImplementedRpc(Exception):
    """An rpc of the CRI that Husk does not implement."""

    def __init__(self, method: str) -> None:
        super().__init__(f"husk does not implement {method}")
        self.method = method


class Failure(Value, frozen=True, kw_only=True):
    """An error as the client receives it (`code`, `message`) and as it is logged (`full`)."""

    code: grpc.StatusCode
    message: str
    full: str
    expected: bool  # False: a bug, so its traceback is logged too


def failure_of(error: BaseException) -> Failure:
    """Return the status for an error. One without a code is INTERNAL, with a tag to find it in the log by."""
    code = _code(error)
    if code is None:
        tag = secrets.token_hex(4)
        full = f"internal error {tag}: {type(error).__name__}: {error}"
        return Failure(code=Code.INTERNAL, message=_short(full), full=full, expected=False)
    full = str(error) or type(error).__name__
    return Failure(code=code, message=_short(full), full=full, expected=True)


def _code(error: BaseException) -> grpc.StatusCode | None:
    if isinstance(error, NotImplementedRpc):
        return Code.UNIMPLEMENTED
    if isinstance(error, sandbox.PhaseFailed) and error.__cause__ is not None:
        # the phase says where it failed; its cause decides what a client can do
        return _code(error.__cause__) or Code.INTERNAL
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return Code.RESOURCE_EXHAUSTED
    return None


def _short(text: str) -> str:
    """Cut the middle of a long text: the end may hold the last lines of a console, so it keeps two thirds."""
    if len(text) <= MESSAGE_MAX:
        return text
    head = MESSAGE_MAX // 3
    return f"{text[:head]}\n[...]\n{text[-(MESSAGE_MAX - head) :]}"
