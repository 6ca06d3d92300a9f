"""The pinned Go programs that the node tests drive."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

BUILD = Path(__file__).resolve().parents[1] / "node/build-tool"


@cache
def tool(name: str) -> Path:
    """Return the path of a program, building it if it is not cached.

    Raises CalledProcessError; the reason is on stderr.
    """
    done = subprocess.run([str(BUILD), name], check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.strip())


def version(name: str) -> str:
    """Return the pinned version of a program, building it if it is not cached."""
    return tool(name).name.removeprefix(f"{name}-")
