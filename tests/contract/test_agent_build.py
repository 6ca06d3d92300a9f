"""The agent's program: one static file, and the same bytes from the same sources."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.kit.agent import TREE, build

ELF_DYNAMIC, ELF_INTERPRETER, ELF_NOTE = 2, 3, 4


def program_headers(program: bytes) -> set[int]:
    """Return the types of an x86-64 ELF file's segments (elf(5))."""
    offset = int.from_bytes(program[32:40], "little")
    count = int.from_bytes(program[56:58], "little")
    return {int.from_bytes(program[at : at + 4], "little") for at in range(offset, offset + 56 * count, 56)}


def test_agent_program_is_static_and_small() -> None:
    program = build("husk-agent").read_bytes()
    assert program_headers(program).isdisjoint({ELF_DYNAMIC, ELF_INTERPRETER})
    assert len(program) < 1_500_000, "every pod's VM holds it in memory"


def test_agent_build_is_reproducible(tmp_path: Path) -> None:
    """It contains neither the path of the sources nor that of the output."""
    for part in ("agent", "guest"):
        shutil.copytree(
            TREE / "sandbox" / part, tmp_path / part, ignore=shutil.ignore_patterns("build", "__pycache__")
        )
    out = tmp_path / "out"
    argv = ["nice", "make", "-s", "-C", str(tmp_path / "agent"), f"OUT={out}"]
    subprocess.run(argv, check=True, timeout=300)
    assert (out / "husk-agent").read_bytes() == build("husk-agent").read_bytes()


def test_agent_with_wrong_arguments_prints_usage() -> None:
    for argv in ([], ["--help"], ["--listen", "tcp:1"]):
        done = subprocess.run([build("husk-agent"), *argv], capture_output=True, text=True, timeout=10)
        assert done.returncode == 2
        assert "usage: husk-agent" in done.stderr
