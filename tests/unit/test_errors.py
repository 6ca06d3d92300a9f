"""Status codes of errors: every class has the one that a kubelet expects."""

from __future__ import annotations

import errno

import grpc
import pytest

from cri.errors import CODES, MESSAGE_MAX, NotImplementedRpc, failure_of
from cri.fields import renamed
from image import errors as image
from network import errors as network
from sandbox import errors as sandbox
from sandbox.host.flights import ShuttingDown

Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (sandbox.NotFound("container", "x"), Code.NOT_FOUND),
        (image.ImageNotFound("busybox"), Code.NOT_FOUND),
        (image.ManifestNotFound("busybox:1", "host"), Code.NOT_FOUND),
        (sandbox.InvalidSpec("config.x", "bad"), Code.INVALID_ARGUMENT),
        (image.InvalidReference("::", "bad"), Code.INVALID_ARGUMENT),
        (network.Unsatisfiable("host_ip", "bad"), Code.INVALID_ARGUMENT),
        (sandbox.Reserved("web", "sandbox 1"), Code.FAILED_PRECONDITION),
        (sandbox.WrongState("container", "x", "exited", "running"), Code.FAILED_PRECONDITION),
        (sandbox.MissingProgram("QEMU", "apt-get install it"), Code.FAILED_PRECONDITION),
        (sandbox.DeadlineExceeded("exec", 1), Code.DEADLINE_EXCEEDED),
        (sandbox.FellBehind(1000), Code.RESOURCE_EXHAUSTED),
        (image.PullDeadline("busybox", 1), Code.DEADLINE_EXCEEDED),
        (image.RegistryUnavailable("host", "get", "no answer"), Code.UNAVAILABLE),
        (network.NetworkNotReady("no CNI configuration"), Code.UNAVAILABLE),
        (sandbox.VmmGone("gone"), Code.UNAVAILABLE),
        (sandbox.ProtocolError("bytes"), Code.UNAVAILABLE),
        (ShuttingDown(), Code.UNAVAILABLE),
        (image.DiskFull("/var/lib", "pulling"), Code.RESOURCE_EXHAUSTED),
        (image.Unauthorized("busybox", "host", 401), Code.UNAUTHENTICATED),
        (OSError(errno.ENOSPC, "No space left on device", "/var/lib/husk"), Code.RESOURCE_EXHAUSTED),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/var/lib/husk"), Code.RESOURCE_EXHAUSTED),
        (sandbox.VmmError("broke"), Code.INTERNAL),
        (sandbox.GuestError("mount /proc", 1, "not permitted"), Code.INTERNAL),
        (sandbox.InvalidContainerConfig("exec", 2, "no such program"), Code.FAILED_PRECONDITION),
        (NotImplementedRpc("CheckpointPod"), Code.UNIMPLEMENTED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_error_has_its_code(error: Exception, code: grpc.StatusCode) -> None:
    failure = failure_of(error)
    assert failure.code is code
    assert failure.expected
    assert failure.message == str(error)


@pytest.mark.parametrize("tree", [sandbox.SandboxError, image.ImageError, network.NetworkError])
def test_new_subclass_is_internal_and_expected(tree: type[Exception]) -> None:
    class Newer(tree):  # type: ignore[misc, valid-type]
        pass

    assert failure_of(Newer("x")).code is Code.INTERNAL
    assert failure_of(Newer("x")).expected


def test_failed_phase_has_the_code_of_its_cause() -> None:
    def phase(cause: Exception | None) -> grpc.StatusCode:
        error = sandbox.PhaseFailed("network", 1.5, "no", "panic")
        error.__cause__ = cause
        return failure_of(error).code

    assert phase(sandbox.InvalidSpec("config.x", "bad")) is Code.INVALID_ARGUMENT
    assert phase(image.ImageNotFound("x")) is Code.NOT_FOUND
    assert phase(OSError("disk")) is Code.INTERNAL
    assert phase(OSError(errno.ENOSPC, "full", "/var")) is Code.RESOURCE_EXHAUSTED
    assert phase(None) is Code.INTERNAL


def test_not_found_is_used_for_nothing_else() -> None:
    gone = {kind for kind, code in CODES.items() if code is Code.NOT_FOUND}
    assert gone == {sandbox.NotFound, image.ImageNotFound, image.ManifestNotFound}


def test_unexpected_error_is_internal_with_a_tag() -> None:
    first, second = failure_of(KeyError("k")), failure_of(KeyError("k"))
    assert (first.code, first.expected) == (Code.INTERNAL, False)
    assert first.message.startswith("internal error ")
    assert first.message != second.message


def test_long_message_keeps_its_beginning_and_its_end() -> None:
    console = "\n".join(f"line {number}" for number in range(9000))
    failure = failure_of(sandbox.PhaseFailed("vm", 1, "gone", console))
    assert len(failure.message) < MESSAGE_MAX + 20
    assert failure.message.startswith("vm failed after 1.00 s: gone")
    assert failure.message.endswith("line 8999")
    assert failure.full.count("\n") > 8999


def test_field_is_named_as_in_the_current_request() -> None:
    ours = sandbox.InvalidSpec("config.linux.resources.cpu_period", "is bad", "better")
    with pytest.raises(sandbox.InvalidSpec) as caught, renamed("config.linux.resources", "linux"):
        raise ours
    assert str(caught.value) == "linux.cpu_period: is bad; accepted: better"
    assert caught.value.__cause__ is ours
    with pytest.raises(sandbox.InvalidSpec, match="other: bad"), renamed("config.linux.resources", "linux"):
        raise sandbox.InvalidSpec("other", "bad")
