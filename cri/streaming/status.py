"""How a remote command ended, as its client wants to read it on the error channel."""

from __future__ import annotations

import json


def success() -> bytes:
    return _encoded({"metadata": {}, "status": "Success"})


def exit_status(code: int) -> bytes:
    """metav1.Status; clients take the exit code out of its causes."""
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
    """For clients of the protocols before v4, which read plain text."""
    return f"command terminated with exit code {code}"


def _encoded(status: dict[str, object]) -> bytes:
    return json.dumps(status, separators=(",", ":")).encode()
