"""What the steps of `husk guest build` share: programs that must succeed, packages, and the build lock.

Packages are the distribution's: found and verified by apt, and unpacked without being installed.
"""

# ruff: noqa: ASYNC240 -- runs as a command, with nothing else on its event loop

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

from sandbox.errors import MissingProgram, SandboxError
from sandbox.host import process

Progress = Callable[[str], None]

_LOCK_STEP_S = 0.1


class BuildFailed(SandboxError):
    """A program of the build failed; `output` is the end of what it printed."""

    def __init__(self, what: str, output: str) -> None:
        super().__init__(f"{what}: {output}")
        self.what = what
        self.output = output


async def checked(
    argv: Sequence[str],
    *,
    timeout_s: float,
    cwd: str = "/",
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a program and return its stdout. Raises BuildFailed unless its status is 0."""
    done = await process.run(argv, timeout_s=timeout_s, cwd=cwd, environment=environment)
    if done.status != 0:
        printed = (done.stdout[-2000:] + done.stderr[-4000:]).decode(errors="replace").strip()
        raise BuildFailed(f"{' '.join(argv)} (status {done.status})", printed)
    return done.stdout.decode(errors="replace")


@contextlib.asynccontextmanager
async def alone(directory: Path, progress: Progress) -> AsyncIterator[None]:
    """Lock the directory against other builds, which would remove what this one uses. Waits for the lock.

    It is a flock(2) of the open directory, so it ends with the process in any case.
    """
    holder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not _try_lock(holder):
            progress("waiting for another build to end")
            while not _try_lock(holder):  # noqa: ASYNC110 -- another process holds it
                await asyncio.sleep(_LOCK_STEP_S)
        yield
    finally:
        os.close(holder)


def _try_lock(holder: int) -> bool:
    try:
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def hash_of(*parts: bytes) -> str:
    """Hash the parts, whose boundaries count, to 32 hex digits."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:32]


# ------------------------------------------------------------------------------------ packages


def need_apt(instead: str) -> None:
    """Raise MissingProgram where packages cannot be downloaded; `instead` says what works without apt."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise MissingProgram("apt-get", f"a Debian or Ubuntu host, or: {instead}")


async def show(package: str) -> str:
    """Return what apt knows of a package's newest version; "" for a name that it does not know."""
    done = await process.run(["apt-cache", "show", "--no-all-versions", "--", package], timeout_s=60)
    return done.stdout.decode(errors="replace") if done.status == 0 else ""


def field(paragraph: str, name: str) -> str:
    """Return a field of what `show` returned; "" where it is absent."""
    found = re.search(rf"^{name}: (.*)$", paragraph, re.MULTILINE)
    return found[1] if found else ""


async def download(packages: Path, name: str, version: str, progress: Progress) -> Path:
    """Download a package to `packages` unless it is there, and remove older versions. Raises BuildFailed."""
    wanted = packages / f"{name}_{version.replace(':', '%3a')}.deb"
    if wanted.exists():
        return wanted
    progress(f"downloading {name} {version}")
    packages.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=packages, prefix=".download-") as scratch:
        # By default apt downloads as user _apt, who cannot write here, and warns about it.
        command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", f"{name}={version}"]
        await checked(command, timeout_s=900, cwd=scratch)
        (got,) = Path(scratch).glob("*.deb")
        got.rename(wanted)
    for other in packages.glob(f"{re.split(r'[0-9]', name, maxsplit=1)[0]}*.deb"):
        if other != wanted:
            other.unlink()  # an older version of the same
    return wanted


async def unpack(package: Path, directory: Path) -> None:
    """Unpack a package's files below `directory`. Raises BuildFailed."""
    await checked(["dpkg", "-x", str(package), str(directory)], timeout_s=300)
