"""Files of Debian packages that are not installed: some would start services, some conflict with others.

Downloaded from the machine's package archive, unpacked once, and kept in the tests' cache.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory


def cache_directory() -> Path:
    """Return the directory of what the tests keep between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "husk-tests"


@cache
def unpacked(package: str) -> Path:
    """Return the tree of files of a package. Raises CalledProcessError if the archive does not have it."""
    release = platform.freedesktop_os_release()["VERSION_ID"]
    place = cache_directory() / f"packages-{release}" / package
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=place.parent, prefix=".new-") as made:
        directory = Path(made)
        subprocess.run(
            ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package],
            cwd=directory,
            check=True,
            timeout=300,
        )
        (archive,) = directory.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive.name, "tree"], cwd=directory, check=True, timeout=300)
        shutil.move(directory / "tree", place)
    return place


def libraries_of(program: Path) -> dict[str, Path]:
    """Return the shared libraries and the loader of a program: the path where each is searched for, and file.

    ldd(1) asks the machine's own loader: what it cannot find is a package that tests/packages.txt lacks.
    """
    lines = subprocess.run(
        ["ldd", str(program)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    found = {}
    for line in lines:
        words = line.split()
        if "not found" in line:
            raise FileNotFoundError(f"{words[0]}, which {program} needs")
        path = words[2] if "=>" in words else words[0]
        if path.startswith("/"):
            found[path] = Path(path).resolve()
    return found
