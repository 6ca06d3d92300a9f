"""Which Husk this is: its version, the commit that it was made from, and the versions that it speaks.

A wheel carries the commit in `cri/commit.txt`, which setup.py writes while it builds; a checkout asks git.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import msgspec

from sandbox.guest import frames
from sandbox.spec import Value

CRI_VERSION = "v1"
UNKNOWN = "unknown"
GIT_TIMEOUT_S = 10
# a commit id, with the nearest tag before it where there is one, and -dirty after local changes
DESCRIBE = ("git", "describe", "--always", "--dirty", "--tags")


class Facts(Value, frozen=True, kw_only=True):
    """What `husk version` prints."""

    version: str
    commit: str
    python: str
    guest_protocol: tuple[int, int]  # lowest and highest version that the daemon speaks with an agent
    cri: str


def version() -> str:
    """Return the version of the installed package, or "unknown" in a tree that was never installed."""
    try:
        return metadata.version("husk")
    except metadata.PackageNotFoundError:
        return UNKNOWN


def commit(package: Path = Path(__file__).parent) -> str:
    """Return the commit that `package` was built from: of its commit.txt, else from git in a checkout.

    "unknown" when there is neither, or git fails.
    """
    try:
        return (package / "commit.txt").read_text().strip() or UNKNOWN
    except OSError:
        return describe(package.parent)


def describe(tree: Path) -> str:
    """Return what `git describe` prints in this checkout; "unknown" where it fails or is not a checkout."""
    if not (tree / ".git").exists():  # without it, git would describe a repository further up
        return UNKNOWN
    try:
        done = subprocess.run(
            DESCRIBE, cwd=tree, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return done.stdout.strip() or UNKNOWN


def facts() -> Facts:
    """Gather what `husk version` prints. May run git."""
    return Facts(
        version=version(),
        commit=commit(),
        python=platform.python_version(),
        guest_protocol=(frames.MIN_VERSION, frames.VERSION),
        cri=CRI_VERSION,
    )


def as_text(facts: Facts) -> Iterator[str]:
    """Yield one line per fact; the first is "husk VERSION"."""
    lowest, highest = facts.guest_protocol
    yield f"husk {facts.version}"
    yield f"commit {facts.commit}"
    yield f"python {facts.python}"
    yield f"guest protocol {highest}" if lowest == highest else f"guest protocol {lowest} to {highest}"
    yield f"cri {facts.cri}"


def as_json(facts: Facts) -> str:
    """Return the facts as one JSON object with the field names of `Facts`."""
    return msgspec.json.format(msgspec.json.encode(facts), indent=2).decode()
