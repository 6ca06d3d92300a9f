"""Readers of /proc."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from sandbox.host.proc import boot_id, read_stat
from tests.kit.eventually import eventually_sync


def test_boot_id_is_a_uuid() -> None:
    assert boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert len(boot_id()) == 36


def test_stat_of_a_running_process() -> None:
    stat = read_stat(os.getpid())
    assert stat is not None
    assert (stat.parent, stat.session) == (os.getppid(), os.getsid(0))
    assert stat.state == "R"
    assert stat.user_ticks + stat.system_ticks > 0


def test_name_with_blanks_and_parentheses_is_skipped(tmp_path: Path) -> None:
    program = tmp_path / "a) Z 1 ("
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"], start_new_session=True) as child:
        stat = read_stat(child.pid)
        child.kill()
    assert stat is not None
    assert (stat.parent, stat.session) == (os.getpid(), child.pid)


def test_zombie_has_a_state_and_a_reaped_process_none() -> None:
    with subprocess.Popen(["true"]) as child:
        eventually_sync(lambda: (stat := read_stat(child.pid)) is not None and stat.state == "Z")
        child.wait()
        assert read_stat(child.pid) is None
