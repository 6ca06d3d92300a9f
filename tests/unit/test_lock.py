"""One daemon to a directory, until its process ends in whatever way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cri.lock import DirectoryTaken, hold

HOLD = """
import sys
from pathlib import Path
from cri.lock import hold
with hold([Path(sys.argv[1])]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_one_is_told_and_the_first_keeps_it(tmp_path: Path) -> None:
    root, run = tmp_path / "root", tmp_path / "run"
    with hold([root, run]):
        for taken in ([root], [run], [tmp_path / "other", run]):
            with pytest.raises(DirectoryTaken, match="another daemon"), hold(taken, wait_s=0):
                pass
        with hold([tmp_path / "other"], wait_s=0):
            assert (tmp_path / "other").is_dir()
    with hold([root, run], wait_s=0):
        pass


def test_a_killed_holder_leaves_it_free_and_its_children_do_not_keep_it(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(DirectoryTaken), hold([tmp_path], wait_s=0):
            pass
        holder.kill()
        holder.wait(10)
    with hold([tmp_path]), subprocess.Popen(["sleep", "60"]) as child:
        pass_on = Path(f"/proc/{child.pid}/fd")
        assert str(tmp_path) not in {str(link.readlink()) for link in pass_on.iterdir()}
        child.kill()
