"""The lock on a directory: one process at a time, released however it ends."""

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


def test_lock_held_by_another_is_refused_and_kept(tmp_path: Path) -> None:
    root, run = tmp_path / "root", tmp_path / "run"
    with hold([root, run]):
        for taken in ([root], [run], [tmp_path / "other", run]):
            with pytest.raises(DirectoryTaken, match="another daemon"), hold(taken, wait_s=0):
                pass
        with hold([tmp_path / "other"], wait_s=0):
            assert (tmp_path / "other").is_dir()
    with hold([root, run], wait_s=0):
        pass


def test_lock_of_a_killed_process_is_free_and_not_inherited(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(DirectoryTaken), hold([tmp_path], wait_s=0):
            pass
        holder.kill()
        holder.wait(10)
    waits = ["sh", "-c", "echo ready; read line"]  # opens nothing more once it is ready
    with hold([tmp_path]), subprocess.Popen(waits, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        descriptors = Path(f"/proc/{child.pid}/fd")
        assert str(tmp_path) not in {str(link.readlink()) for link in descriptors.iterdir()}
        child.kill()
