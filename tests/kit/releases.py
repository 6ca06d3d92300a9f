"""Earlier releases of Husk, frozen out of git's history: sources, Python environment and guest image.

docs/releases.md lists them. Each is built once, by its own scripts, in the cache of the tests:

    CACHE/releases/COMMIT/           the tree, with its .venv
    CACHE/releases/COMMIT/state/     the root of its `husk guest build`
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.kit.daemon import GUEST_VARIABLE, REPOSITORY, Program


@dataclass(frozen=True)
class Release:
    """A release of docs/releases.md, by the commit that it was made of."""

    name: str
    commit: str
    records: int  # version of its records
    protocol: int  # highest version of its agent


RELEASES = (
    Release("first", "0c4b25c634a6", records=1, protocol=1),
    Release("previous", "2ebcdef6a712", records=2, protocol=2),
)


def release(name: str) -> Release:
    """Return the release of this name."""
    return next(each for each in RELEASES if each.name == name)


def freeze(made: Release) -> Program:
    """Build a release unless the cache has it. Raises AssertionError when the history lacks its commit, and
    CalledProcessError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "husk-tests" / "releases"
    tree = cache / made.commit
    ready = tree / ".ready"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{made.commit}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists():
            shutil.rmtree(tree, ignore_errors=True)
            _extract(made, tree)
            _run(tree, "deploy/make-venv", ".")
            _reuse_packages(tree / "state" / "guest" / "packages")
            _run(tree, ".venv/bin/python", "-m", "cri", "guest", "build", "--root", str(tree / "state"))
            ready.touch()
    return Program(tree, tree / ".venv" / "bin" / "python", tree / "state" / "guest")


def _extract(made: Release, tree: Path) -> None:
    known = subprocess.run(
        ["git", "-C", str(REPOSITORY), "cat-file", "-e", f"{made.commit}^{{commit}}"], capture_output=True
    )
    assert known.returncode == 0, (
        f"this clone has no commit {made.commit} (release {made.name!r}): the upgrade tests need git's "
        f"history; try `git fetch --unshallow` ({known.stderr.decode().strip()})"
    )
    tree.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(REPOSITORY), "archive", made.commit], check=True, capture_output=True
    )
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)


def _reuse_packages(packages: Path) -> None:
    """Save the download of what the current guest image was made from."""
    current = Path(os.environ.get(GUEST_VARIABLE, "/nonexistent"), "packages")
    if current.is_dir():
        shutil.copytree(current, packages)


def _run(tree: Path, *command: str) -> None:
    done = subprocess.run(
        ["nice", *command], cwd=tree, stdin=subprocess.DEVNULL, capture_output=True, timeout=600
    )
    assert done.returncode == 0, f"{command}: {(done.stdout + done.stderr).decode(errors='replace')[-3000:]}"
