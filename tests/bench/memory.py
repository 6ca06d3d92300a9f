"""What runtimes hold in memory: the daemon's RSS, and the PSS of what serves one pod.

Guest RAM is told apart from the rest of a VMM by the name of its mapping (a memfd or a file in shared
memory); Pss in /proc/PID/smaps counts a page shared by two processes half in each (proc(5)), so the sum
over QEMU and virtiofsd counts guest RAM once.
"""

from __future__ import annotations

from pathlib import Path

GUEST_RAM = ("memfd:", "/dev/shm/", "/memory-backend")


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


def processes_naming(*words: str) -> dict[int, str]:
    """Live processes whose command line has every one of these words: {pid: program}."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            line = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        if line and all(word in line for word in words):
            found[int(entry.name)] = Path(line.split("\0")[0]).name
    return found


def pod_memory(pod_id: str) -> dict[str, float]:
    """PSS of every process that serves this pod, in MiB, split into guest RAM and the rest by program."""
    result: dict[str, float] = {"guest_ram_mib": 0.0, "total_mib": 0.0}
    for pid, program in processes_naming(pod_id).items():
        guest, other = pss_mib(pid)
        result["guest_ram_mib"] = round(result["guest_ram_mib"] + guest, 1)
        key = f"{program}_rest_mib"
        result[key] = round(result.get(key, 0.0) + other, 1)
        result["total_mib"] = round(result["total_mib"] + guest + other, 1)
    return result
