"""Find what a test run has left: processes, mounts, cgroups, directories, leases, network devices.

Only its own: what names the run's scratch directory, or is in the run's namespace or cgroup. A `Census` is
taken before and after a test and compared. `python -m tests.kit.leaks DIRECTORY` is for the end of a run and
reports anything that still names the directory; `--end DIRECTORY` kills and releases it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from sandbox.host.proc import read_stat
from tests.kit.cni import BRIDGE, leases_in
from tests.kit.eventually import eventually_sync
from tests.kit.loops import loops_naming
from tests.kit.namespace import Namespace

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Census:
    """What exists at one moment, as text by kind."""

    processes: frozenset[str] = frozenset()
    mounts: frozenset[str] = frozenset()
    cgroups: frozenset[str] = frozenset()
    directories: frozenset[str] = frozenset()
    leases: frozenset[str] = frozenset()
    links: frozenset[str] = frozenset()
    loops: frozenset[str] = frozenset()

    def since(self, before: Census) -> list[str]:
        """Return what exists now and did not in `before`, one line each.

        A process with another command line is the same one: a container's had not executed its program yet.
        """
        known = {each.partition(" ")[0] for each in before.processes}
        return [
            f"{field.name}: {each}"
            for field in fields(self)
            for each in sorted(getattr(self, field.name) - getattr(before, field.name))
            if field.name != "processes" or each.partition(" ")[0] not in known
        ]


def processes_naming(mark: str) -> frozenset[str]:
    """Return processes, except this one and its parent, with `mark` in their command line or cgroup.

    A VMM opens nothing by name, so its command line has no path of the run; its cgroup has. A zombie that
    belongs to init has ended: it is init that collects it, on some machines only once a minute.
    """
    spared = {os.getpid(), os.getppid()}
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in spared:
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            named = mark in line or mark in (entry / "cgroup").read_text()
            stat = read_stat(int(entry.name)) if named else None
            if stat is not None and not (stat.state == "Z" and stat.parent == 1):
                found.add(f"{entry.name} {line[:200]}")
        except OSError:
            continue  # it has exited
    return frozenset(found)


def mounts_naming(mark: str, pid: int | str = "self") -> frozenset[str]:
    """Return mount points (field 5 of /proc/PID/mountinfo, proc(5)) of a process with `mark` in them."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return frozenset(point for point in (line.split()[4] for line in lines) if mark in point)


def cgroups_naming(mark: str) -> frozenset[str]:
    """Return directories of all cgroup hierarchies with `mark` in their path."""
    paths = (f"{folder}/{name}" for folder, names, _ in os.walk(CGROUPS) for name in names)
    return frozenset(path for path in paths if mark in path)


def remove_cgroups(name: str) -> None:
    """Remove empty cgroups of this name in every hierarchy. One in use stays; the leak check reports it."""
    for path in sorted(cgroups_naming(name), reverse=True):
        with contextlib.suppress(OSError):
            Path(path).rmdir()


def entries(*folders: Path) -> frozenset[str]:
    """Return the paths of all entries of these directories; a missing directory has none."""
    return frozenset(str(path) for folder in folders if folder.is_dir() for path in folder.iterdir())


def links_of(namespace: Namespace) -> frozenset[str]:
    """Return the namespace's network devices except the bridge, which belongs to the network and stays."""
    lines = namespace.run("ip", "-o", "link").splitlines()
    return frozenset(line.split(": ")[1].split("@")[0] for line in lines) - {BRIDGE}


def take_census(
    namespace: Namespace,
    root: Path,
    run: Path,
    leases: Path,
    cgroup: str,
    ignore: frozenset[int] = frozenset(),
) -> Census:
    """Return everything that a daemon with these directories holds; `ignore` are pids that may run."""
    mark = str(root.parent)
    processes = processes_naming(mark) | processes_naming(f"{cgroup}/")
    return Census(
        processes=frozenset(each for each in processes if int(each.split()[0]) not in ignore),
        mounts=mounts_naming(mark, namespace.pid),
        cgroups=cgroups_naming(f"{cgroup}/"),
        directories=entries(
            *(root / name for name in ("pods", "containers", "rootfs", "cni")),
            *(root / "images" / name for name in ("staging", "trash")),
            *(run / name for name in ("pods", "netns")),
        ),
        leases=leases_in(leases),
        links=links_of(namespace),
    )


def processes_of_run(directory: str) -> frozenset[str]:
    """Return processes that name a run's directory, or whose cgroup has the directory's last part."""
    return processes_naming(directory) | processes_naming(f"/{Path(directory).name}/")


def left_over(mark: str) -> list[str]:
    """Return anything on the machine that names `mark`, a run's directory."""
    return Census(
        processes=processes_of_run(mark),
        mounts=mounts_naming(mark),
        cgroups=cgroups_naming(Path(mark).name),
        loops=loops_naming(mark),
    ).since(Census())


def end_all(mark: str) -> None:
    """Kill what is left of an interrupted run, and release its mounts and cgroups."""
    for each in processes_of_run(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(each.split()[0]), signal.SIGKILL)
    for point in sorted(mounts_naming(mark), reverse=True):
        subprocess.run(["umount", "--lazy", point], check=False)
    wait_for_leaks(lambda: sorted(processes_of_run(mark)), 5)
    for loop in loops_naming(mark):
        subprocess.run(["losetup", "--detach", f"/dev/{loop.partition(':')[0]}"], check=False)
    remove_cgroups(Path(mark).name)


def wait_for_leaks(find: Callable[[], list[str]], timeout_s: float) -> list[str]:
    """Poll `find` until it finds nothing, and return what it found last.

    Waits because the kernel takes a moment to end what was killed.
    """
    found: list[str] = []

    def none_left() -> bool:
        found[:] = find()
        return not found

    with contextlib.suppress(AssertionError):  # the caller reports what is left
        eventually_sync(none_left, timeout_s=timeout_s)
    return found


def main(mark: str, timeout_s: float = 10) -> int:
    """Print what is left of a run and return the exit status: 0 if nothing is."""
    found = wait_for_leaks(lambda: left_over(mark), timeout_s)
    for each in found:
        print(f"left over: {each}")
    return 1 if found else 0


if __name__ == "__main__":
    if sys.argv[1] == "--end":
        end_all(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1]))
