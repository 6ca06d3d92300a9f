"""The result of a remote command on the error channel, in the forms that clients parse."""

from __future__ import annotations

import json


def success() -> bytes:
    """Return metav1.Status for exit code 0."""
    return _encoded({"metadata": {}, "status": "Success"})


def exit_status(code: int) -> bytes:
    """Return metav1.Status for an exit code. Clients read the code from its causes."""
    if code == 0:
        return success()
    return _encoded(
        {
            "metadata": {},
            "status": "Failure",
            "message": exit_text(code),
            "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
        }
    )


def failure(message: str) -> bytes:
    """Return metav1.Status for a command that did not start, or whose session broke."""
    return _encoded(
        {
            "metadata": {},
            "status": "Failure",
            "message": f"Internal error occurred: {message}",
            "reason": "InternalError",
            "details": {"causes": [{"message": message}]},
            "code": 500,
        }
    )


def exit_text(code: int) -> str:
    """Return the message for a non-zero exit code; clients of protocols before v4 get it as plain text."""
    return f"command terminated with exit code {code}"


def _encoded(status: dict[str, object]) -> bytes:
    return json.dumps(status, separators=(",", ":")).encode()
