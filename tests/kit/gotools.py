"""The pinned Go programs that the node tests drive."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

BUILD = Path(__file__).resolve().parents[1] / "node/build-tool"


@cache
def tool(name: str) -> Path:
    """Where it is; built first where the cache has none. Raises CalledProcessError; stderr tells why."""
    done = subprocess.run([str(BUILD), name], check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.strip())


def version(name: str) -> str:
    return tool(name).name.removeprefix(f"{name}-")
