"""Writes the commit of the tree into the wheel; everything else about the package is in pyproject.toml."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithCommit(build_py):
    """`build_py` that adds cri/commit.txt, the output of `git describe`, to what it builds.

    An editable install gets none: its code changes with the checkout, which `husk version` asks itself.
    """

    def run(self) -> None:
        """Build as setuptools does, then write the file. Without git the wheel has no commit."""
        super().run()
        if self.editable_mode:
            return
        command = ["git", "describe", "--always", "--dirty", "--tags"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return
        (Path(self.build_lib) / "cri" / "commit.txt").write_text(done.stdout)


setup(cmdclass={"build_py": BuildWithCommit})
