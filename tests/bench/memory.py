"""Memory of runtimes: the daemon's RSS, and the PSS of the processes that serve one pod.

Guest RAM is distinguished from a VMM's other memory by the name of its mapping (a memfd or a file in shared
memory). Pss in /proc/PID/smaps counts a page shared by two processes half in each (proc(5)), so the sum
over QEMU and virtiofsd counts guest RAM once.
"""

from __future__ import annotations

from pathlib import Path

from tests.bench.figures import Figures
from tests.bench.subjects import IMAGE, SLEEP, Site, settle
from tests.kit.leaks import processes_naming
from tests.kit.scratch import scratch_root

GUEST_RAM = ("memfd:", "/dev/shm/", "/memory-backend")
SERVANTS = ("qemu-system", "virtiofsd", "containerd-shim")
MIB = "MiB"


def idle_pods(site: Site, figures: Figures, count: int) -> None:
    """Measure pods with one sleeping container each: the host's memory for each, and the daemon's share.

    Pooled VMs are not counted, as their number does not depend on the number of pods.
    """
    for subject in site.mains:
        settle()
        before = rss_mib(subject.runtime.pid)
        pods = [subject.cri.run_pod(f"idle-{n}", handler=subject.handler) for n in range(count)]
        for pod in pods:
            subject.cri.run(pod, IMAGE, SLEEP, name="main")
        settle()
        ids = [pod.id for pod in pods]
        guest, rest = {}, {}
        for pid in (pid for pid in servants() if of_pod(pid, ids)):
            guest[pid], rest[pid] = pss_mib(pid)
        figures.add("guest RAM of an idle pod", subject.name, sum(guest.values()) / count, MIB)
        share = max(0.0, rss_mib(subject.runtime.pid) - before) / count
        figures.add("daemon's memory for each pod", subject.name, share, MIB)
        total = sum(rest.values()) / count + share
        figures.add("memory of an idle pod besides guest RAM", subject.name, total, MIB)
        for pod in pods:
            subject.cri.stop_pod(pod)
            subject.cri.remove_pod(pod)


def rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return round(int(line.split()[1]) / 1024, 1)
    return 0.0


def pss_mib(pid: int) -> tuple[float, float]:
    """(guest RAM, everything else) of one process; zeros when it has gone."""
    guest = other = 0
    mapping = ""
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text(errors="replace").splitlines()
    except OSError:
        return 0.0, 0.0
    for line in lines:
        word, _, rest = line.partition(" ")
        if not word.endswith(":"):
            mapping = line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) == 6 else ""
        elif word == "Pss:":
            size = int(rest.split()[0])
            if any(name in mapping for name in GUEST_RAM):
                guest += size
            else:
                other += size
    return round(guest / 1024, 1), round(other / 1024, 1)


def servants() -> set[int]:
    """Return the pids of this run's processes that serve pods."""
    found = (each.split(" ", 2) for each in processes_naming(scratch_root().name))
    return {int(pid) for pid, program, *_ in found if any(name in program for name in SERVANTS)}


def of_pod(pid: int, ids: list[str]) -> bool:
    """Return whether a process serves one of these pods, by its command line or cgroup."""
    try:
        entry = Path(f"/proc/{pid}")
        said = (entry / "cmdline").read_text(errors="replace") + (entry / "cgroup").read_text()
    except OSError:
        return False
    return any(id in said for id in ids)
