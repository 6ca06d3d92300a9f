"""Readers of /proc (proc(5)): the id of this boot, and /proc/PID/stat."""

from __future__ import annotations

import functools
from pathlib import Path

import msgspec


@functools.cache
def boot_id() -> str:
    """Return the kernel's random UUID of this boot (random(4), /proc/sys/kernel/random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


class ProcessStat(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of /proc/PID/stat. Times are clock ticks, `os.sysconf("SC_CLK_TCK")` of them a second."""

    state: str  # R, S, D, Z (zombie), X (dead) ...
    parent: int
    session: int
    user_ticks: int
    system_ticks: int
    start_time: int  # after the boot

    @property
    def cpu_ticks(self) -> int:
        """User and system time together."""
        return self.user_ticks + self.system_ticks


def read_stat(pid: int) -> ProcessStat | None:
    """Read /proc/PID/stat; None when there is no such process. Zombies have one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Field 2 is the program's name in parentheses, and may itself hold blanks and parentheses.
    fields = text[text.rindex(b")") + 1 :].split()
    return ProcessStat(
        state=fields[0].decode(),
        parent=int(fields[1]),
        session=int(fields[3]),
        user_ticks=int(fields[11]),
        system_ticks=int(fields[12]),
        start_time=int(fields[19]),
    )


def oom_score_adj(pid: int) -> int | None:
    """Return a process's oom_score_adj (proc(5)); None once it has ended. Blocking."""
    try:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return None


def effective_capabilities() -> int:
    """Return the capabilities of this process, as bits (capabilities(7)). Raises OSError."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0
