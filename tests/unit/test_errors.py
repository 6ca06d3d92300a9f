"""Every error of the trees has the code that a kubelet understands."""

from __future__ import annotations

import grpc
import pytest

from cri.errors import CODES, MESSAGE_MAX, NotOffered, failure_of
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
        (sandbox.VmmError("broke"), Code.INTERNAL),
        (sandbox.GuestError("mount /proc", 1, "not permitted"), Code.INTERNAL),
        (sandbox.InvalidContainerConfig("exec", 2, "no such program"), Code.FAILED_PRECONDITION),
        (NotOffered("CheckpointPod"), Code.UNIMPLEMENTED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_codes(error: Exception, code: grpc.StatusCode) -> None:
    failure = failure_of(error)
    assert failure.code is code
    assert failure.expected
    assert failure.message == str(error)


@pytest.mark.parametrize("tree", [sandbox.SandboxError, image.ImageError, network.NetworkError])
def test_a_new_error_of_a_tree_has_a_code(tree: type[Exception]) -> None:
    class Newer(tree):  # type: ignore[misc, valid-type]
        pass

    assert failure_of(Newer("x")).code is Code.INTERNAL
    assert failure_of(Newer("x")).expected


def test_a_phase_takes_the_code_of_its_cause() -> None:
    def phase(cause: Exception | None) -> grpc.StatusCode:
        error = sandbox.PhaseFailed("network", 1.5, "no", "panic")
        error.__cause__ = cause
        return failure_of(error).code

    assert phase(sandbox.InvalidSpec("config.x", "bad")) is Code.INVALID_ARGUMENT
    assert phase(image.ImageNotFound("x")) is Code.NOT_FOUND
    assert phase(OSError("disk")) is Code.INTERNAL
    assert phase(None) is Code.INTERNAL


def test_gone_is_said_of_nothing_else() -> None:
    gone = {kind for kind, code in CODES.items() if code is Code.NOT_FOUND}
    assert gone == {sandbox.NotFound, image.ImageNotFound, image.ManifestNotFound}


def test_a_bug_gets_an_id_to_look_for() -> None:
    first, second = failure_of(KeyError("k")), failure_of(KeyError("k"))
    assert (first.code, first.expected) == (Code.INTERNAL, False)
    assert first.message.startswith("internal error ")
    assert first.message != second.message


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    console = "\n".join(f"line {number}" for number in range(9000))
    failure = failure_of(sandbox.PhaseFailed("vm", 1, "gone", console))
    assert len(failure.message) < MESSAGE_MAX + 20
    assert failure.message.startswith("vm failed after 1.00 s: gone")
    assert failure.message.endswith("line 8999")
    assert failure.full.count("\n") > 8999


def test_a_field_is_named_as_the_request_at_hand_names_it() -> None:
    ours = sandbox.InvalidSpec("config.linux.resources.cpu_period", "is bad", "better")
    with pytest.raises(sandbox.InvalidSpec) as caught, renamed("config.linux.resources", "linux"):
        raise ours
    assert str(caught.value) == "linux.cpu_period: is bad; accepted: better"
    assert caught.value.__cause__ is ours
    with pytest.raises(sandbox.InvalidSpec, match="other: bad"), renamed("config.linux.resources", "linux"):
        raise sandbox.InvalidSpec("other", "bad")
