"""What a test run has left behind: processes, mounts, cgroups, directories, leases, network devices.

Only ours: what names the run's scratch directory, or lives in the run's own namespace or cgroup. `Census`
is taken before and after a test and compared; `python -m tests.kit.leaks DIRECTORY` looks once for
anything at all that still names it, for the end of a run; with `--end` first it also ends and releases that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

from tests.kit.cni import BRIDGE, leases_in
from tests.kit.namespace import Namespace

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Census:
    processes: frozenset[str] = frozenset()
    mounts: frozenset[str] = frozenset()
    cgroups: frozenset[str] = frozenset()
    directories: frozenset[str] = frozenset()
    leases: frozenset[str] = frozenset()
    links: frozenset[str] = frozenset()

    def since(self, before: Census) -> list[str]:
        """What is here that was not there before, a line each."""
        return [
            f"{field.name}: {each}"
            for field in fields(self)
            for each in sorted(getattr(self, field.name) - getattr(before, field.name))
        ]


def processes_naming(mark: str) -> frozenset[str]:
    """Processes other than ourselves (and our parents) with `mark` in their command line or cgroup.

    A VMM opens nothing by name, so its command line has no path; its cgroup tells whose it is.
    """
    spared = {os.getpid(), os.getppid()}
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in spared:
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if mark in line or mark in (entry / "cgroup").read_text():
                found.add(f"{entry.name} {line[:200]}")
        except OSError:
            continue  # it ended meanwhile
    return frozenset(found)


def mounts_naming(mark: str, pid: int | str = "self") -> frozenset[str]:
    """Mount points (field 5 of /proc/PID/mountinfo, proc(5)) with `mark` in them, as that process sees."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return frozenset(point for point in (line.split()[4] for line in lines) if mark in point)


def cgroups_naming(mark: str) -> frozenset[str]:
    """Directories of any cgroup hierarchy with `mark` in their path."""
    paths = (f"{folder}/{name}" for folder, names, _ in os.walk(CGROUPS) for name in names)
    return frozenset(path for path in paths if mark in path)


def remove_cgroups(name: str) -> None:
    """Take away empty cgroups of this name in every hierarchy; one in use is left and will be reported."""
    for path in sorted(cgroups_naming(name), reverse=True):
        with contextlib.suppress(OSError):
            Path(path).rmdir()


def entries(*folders: Path) -> frozenset[str]:
    return frozenset(str(path) for folder in folders if folder.is_dir() for path in folder.iterdir())


def links_of(namespace: Namespace) -> frozenset[str]:
    """Network devices inside but for the bridge, which belongs to the network and stays."""
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
    """Everything that a daemon with this state and run directory holds; `ignore` are pids that may live."""
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
    """As `processes_naming`; a run's cgroup is called as its directory is, without what is before it."""
    return processes_naming(directory) | processes_naming(f"/{Path(directory).name}/")


def left_over(mark: str) -> list[str]:
    """Anything on the machine that still names `mark`, a run's directory."""
    return Census(
        processes=processes_of_run(mark), mounts=mounts_naming(mark), cgroups=cgroups_naming(Path(mark).name)
    ).since(Census())


def end_all(mark: str) -> None:
    """Kill what is left of a run that was broken off, and release its mounts and cgroups."""
    for each in processes_of_run(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(each.split()[0]), signal.SIGKILL)
    for point in sorted(mounts_naming(mark), reverse=True):
        subprocess.run(["umount", "--lazy", point], check=False)
    end = time.monotonic() + 5
    while processes_of_run(mark) and time.monotonic() < end:
        time.sleep(0.1)
    remove_cgroups(Path(mark).name)


def main(mark: str, patience_s: float = 10) -> int:
    """0 when nothing is left. Waits a little: the kernel takes a moment to end what was killed."""
    end = time.monotonic() + patience_s
    while (found := left_over(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    for each in found:
        print(f"left behind: {each}")
    return 1 if found else 0


if __name__ == "__main__":
    if sys.argv[1] == "--end":
        end_all(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1]))
