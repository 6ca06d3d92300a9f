"""libFuzzer on the agent's frame parser: four seconds per run, from seeds that reach every state."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.kit.agent import TOKEN, build, frame

PREAMBLE = TOKEN + bytes(range(16))
SEEDS = {
    "greeting": PREAMBLE + frame(1, 0, b"\x08\x01"),
    "frames": PREAMBLE + b"".join(frame(kind, 7, bytes(4 * (kind == 7))) for kind in range(1, 10)),
    "resync": PREAMBLE + frame(6, 3, bytes(200))[:100] + PREAMBLE + frame(8, 3),
    "large": PREAMBLE + frame(3, 1, bytes(5000)),
    "too large": PREAMBLE + (1 << 31).to_bytes(4, "little") + bytes(8),
}


def test_agent_frame_parser_with_fuzzed_input_does_not_crash(tmp_path: Path) -> None:
    for name, seed in SEEDS.items():
        (tmp_path / name).write_bytes(seed)
    argv = [str(build("husk-agent-fuzz")), str(tmp_path), "-max_total_time=4", "-max_len=8192", "-seed=1"]
    done = subprocess.run(
        [*argv, f"-artifact_prefix={tmp_path}/"], timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done " in done.stderr
