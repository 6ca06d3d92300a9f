"""What is left of an exec's output that is too long for a response."""

from __future__ import annotations

import pytest

from cri.proto import runtime_v1_pb2 as api
from cri.server import MESSAGE_MAX
from sandbox.session import OUTPUT_MAX, ExecResult, within_limit

MORE = OUTPUT_MAX + 1


@pytest.mark.parametrize(
    ("stdout", "stderr", "kept", "said"),
    [
        (0, 0, (0, 0), ""),
        (OUTPUT_MAX, 0, (OUTPUT_MAX, 0), ""),
        (10, OUTPUT_MAX - 10, (10, OUTPUT_MAX - 10), ""),
        (MORE, 0, (OUTPUT_MAX, 0), "stdout is"),
        (0, MORE, (0, OUTPUT_MAX), "stderr is"),
        (MORE, 10, (OUTPUT_MAX - 10, 10), "stdout is"),
        (10, MORE, (10, OUTPUT_MAX - 10), "stderr is"),
        (MORE, MORE, (OUTPUT_MAX // 2, OUTPUT_MAX - OUTPUT_MAX // 2), "both outputs are"),
    ],
)
def test_output_above_the_limit_is_cut_and_said_so(
    stdout: int, stderr: int, kept: tuple[int, int], said: str
) -> None:
    result = within_limit(ExecResult(3, b"o" * stdout, b"e" * stderr))
    assert result.exit_code == 3
    assert (result.stdout, result.stderr[: kept[1]]) == (b"o" * kept[0], b"e" * kept[1])
    line = result.stderr[kept[1] :].decode()
    assert line == (f"husk: {said} cut, as a response has at most 16 MiB of output\n" if said else "")
    message = api.ExecSyncResponse(stdout=result.stdout, stderr=result.stderr, exit_code=255)
    assert message.ByteSize() <= MESSAGE_MAX
