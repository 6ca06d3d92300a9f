"""Start of a daemon with many pods' records: the time until it answers, and its memory.

Most of the records are copies of one stopped pod's; some pods run, and are recovered.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from tests.bench.figures import Figures
from tests.bench.memory import MIB, rss_mib
from tests.bench.subjects import IMAGE, SLEEP, Site, settle
from tests.kit.cri import Cri
from tests.kit.daemon import Daemon


def restarts(site: Site, figures: Figures, rounds: int, records: int, running: int) -> None:
    """Restart the daemon with this many records, of which `running` are of running pods."""
    daemon = site.husk
    if daemon is None:
        return
    subject = next(each for each in site.subjects if each.runtime is daemon)
    cri = daemon.cri
    pods = [cri.run_pod(f"kept-{n}", handler=subject.handler) for n in range(running)]
    for pod in pods:
        cri.run(pod, IMAGE, SLEEP, name="main")
    model = cri.run_pod("copied", handler=subject.handler)
    cri.run(model, IMAGE, SLEEP, name="main")
    cri.stop_pod(model)
    daemon.terminate()
    copies = copy_records(daemon.root, model.id, records - running - 1)
    for _ in range(rounds):
        settle()
        figures.add("daemon's start with many records", subject.name, 1000 * timed_start(daemon))
        found = len(daemon.cri.call("ListPodSandbox").items)
        assert found >= records, f"{found} pods of {records}"
        assert all(cri.pod_status(pod).status.state == 0 for pod in pods), "a running pod was not recovered"
        settle()
        figures.add("daemon's memory with many records", subject.name, rss_mib(daemon.pid), MIB)
        daemon.terminate()
    remove_records(daemon.root, copies)
    daemon.start()
    daemon.remove_all()


def accepts(path: Path) -> bool:
    """Return whether a server accepts connections on this unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def timed_start(daemon: Daemon) -> float:
    """Return the seconds from exec to the answer of the first call, on a new connection."""
    begin = time.monotonic()
    daemon.launch()
    # the pauses of `eventually_sync` grow to 50 ms, too coarse for a figure
    while not accepts(daemon.socket):
        daemon.require_alive()
        if time.monotonic() > begin + 60:
            raise RuntimeError(f"husk serve did not start:\n{daemon.log_text()[-4000:]}")
        time.sleep(0.002)
    fresh = Cri(daemon.socket, daemon.directory / "logs")
    fresh.call("Version")
    took = time.monotonic() - begin
    fresh.close()
    return took


def copy_records(root: Path, pod_id: str, count: int) -> list[Path]:
    """Write `count` copies of a stopped pod's record and of its containers' records; returns the files."""
    pod = json.loads((root / "pods" / f"{pod_id}.json").read_bytes())
    containers = [json.loads(path.read_bytes()) for path in (root / "containers").glob("*.json")]
    containers = [each for each in containers if each["pod_id"] == pod_id]
    made = []
    for number in range(count):
        name = f"copy-{number}"
        spec = pod["spec"] | {"name": name, "uid": f"uid-{name}"}
        copy = pod | {"id": secrets.token_hex(32), "spec": spec}
        made.append(write_record(root / "pods", copy))
        for each in containers:
            own = {"id": secrets.token_hex(32), "pod_id": copy["id"], "steps": []}
            made.append(write_record(root / "containers", each | own))
    return made


def write_record(directory: Path, record: dict[str, Any]) -> Path:
    path = directory / f"{record['id']}.json"
    path.write_text(json.dumps(record))
    return path


def remove_records(root: Path, paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
