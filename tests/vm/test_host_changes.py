"""What host and containers see of each other's changes, beyond copies of configuration: files that both
write, and how stale any other volume may be (docs/limits.md)."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.kit import images
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
SLEEP = ("sleep", "3600")
LIVE_S = 2.0  # of 0.1: a test machine is emulated and busy
STALE_S = 1.0  # virtiofsd with cache=auto
LOAD_S = 1.0


def mounted(path: Path, at: str, **fields: Any) -> api.Mount:
    return api.Mount(container_path=at, host_path=str(path), **fields)


def tools() -> api.Mount:
    path = scratch_dir("tools")
    for name in ("watch", "map", "meet"):
        (path / name).write_bytes(images.helper(name))
        (path / name).chmod(0o755)
    return mounted(path, "/tools", readonly=True)


def seen_within(cri: Cri, container: str, script: str, wanted: str, limit_s: float) -> float:
    """Return how long it took until the container saw it, in seconds."""
    began = time.monotonic()
    eventually_sync(
        lambda: cri.exec(container, "sh", "-c", script).stdout,
        until=lambda text: text == wanted,
        timeout_s=limit_s,
    )
    return time.monotonic() - began


def log_has(cri: Cri, container: str, enough: Callable[[Sequence[str]], bool]) -> list[str]:
    return eventually_sync(lambda: [line.text for line in cri.log(container)], until=enough, timeout_s=10)


@pytest.mark.parametrize(
    ("name", "at"),
    [("etc-hosts", "/etc/hosts"), ("containers/main/0a1b2c3d", "/dev/termination-log")],
)
def test_file_that_host_and_container_write_is_seen_by_both(
    daemon: Daemon, cri: Cri, name: str, at: str
) -> None:
    pod = cri.run_pod("writes")
    file = scratch_dir("kubelet") / "pods" / "uid" / name
    file.parent.mkdir(parents=True)
    file.write_text("from the host\n")
    mounts = [tools(), mounted(file, at)]
    watcher = cri.run(pod, BUSYBOX, ["/tools/watch", at], mounts=mounts)
    log_has(cri, watcher, lambda lines: "ready" in lines)
    assert cri.exec(watcher, "cat", at).stdout == "from the host\n"
    for text in ("shorter\n", "as long\n", "much longer than before\n", ""):
        file.write_text(text)
        seen_within(cri, watcher, f"cat {at}", text, LIVE_S)
    seen = log_has(cri, watcher, lambda lines: "CLOSE_WRITE -" in lines)
    assert "MODIFY -" in seen
    cri.exec(watcher, "sh", "-c", f"echo from the container >{at}")
    assert file.read_text() == "from the container\n"
    file.chmod(0o600)
    seen_within(cri, watcher, f"stat -c %a {at}", "600\n", STALE_S + LOAD_S)
    daemon.kill()
    file.write_text("meanwhile\n")
    daemon.start()
    seen_within(cri, watcher, f"cat {at}", "meanwhile\n", LIVE_S)
    file.write_text("afterwards\n")
    seen_within(cri, watcher, f"cat {at}", "afterwards\n", LIVE_S)


def test_store_through_a_shared_mapping_reaches_the_host(cri: Cri, pod: Pod) -> None:
    folder = scratch_dir("mapped")
    for name in ("synced", "left"):
        (folder / name).write_bytes(b"." * 4096)
    script = "/tools/map /data/synced sync; /tools/map /data/left hold"
    container = cri.run(pod, BUSYBOX, ["sh", "-c", script], mounts=[tools(), mounted(folder, "/data")])
    log_has(cri, container, lambda lines: "synced" in lines)
    assert (folder / "synced").read_bytes()[:6] == b"stored"
    log_has(cri, container, lambda lines: "stored" in lines)
    eventually_sync(
        lambda: (folder / "left").read_bytes()[:6],
        until=lambda content: content == b"stored",
        timeout_s=STALE_S + LOAD_S,
    )
    assert cri.status(container).state == api.CONTAINER_RUNNING


def test_other_changes_of_the_host_are_seen_within_a_second(cri: Cri, pod: Pod) -> None:
    folder = scratch_dir("stale")
    file = folder / "file"
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=[mounted(folder, "/data")])
    bound_s = STALE_S + LOAD_S
    took = {}

    def check(what: str, change: Callable[[], object], script: str, wanted: str) -> None:
        cri.exec(container, "sh", "-c", f"ls -l /data; {script}")  # all of it is cached
        change()
        took[what] = seen_within(cri, container, script, wanted, bound_s)

    file.write_text("old")
    (folder / "gone").touch()
    (folder / "dir").mkdir()
    check("new content of the same size", lambda: file.write_text("new"), "cat /data/file", "new")
    check("longer content", lambda: file.write_text("longer"), "cat /data/file", "longer")
    check("shorter content", lambda: file.write_text("s"), "cat /data/file", "s")
    check("mode", lambda: file.chmod(0o640), "stat -c %a /data/file", "640\n")
    check("owner", lambda: os.chown(file, 7, 8), "stat -c %u:%g /data/file", "7:8\n")
    check("removed name", (folder / "gone").unlink, "ls /data/gone 2>&1 | grep -c No", "1\n")
    check("name that was missing", (folder / "new").touch, "ls /data/new 2>/dev/null", "/data/new\n")
    check("listing", (folder / "dir/more").touch, "ls /data/dir", "more\n")
    (folder / "replacement").write_text("replaced")
    check("replaced by rename", lambda: (folder / "replacement").rename(file), "cat /data/file", "replaced")
    print(", ".join(f"{what}: {s * 1000:.0f} ms" for what, s in took.items()))


def test_locks_end_at_the_pod(cri: Cri, pod: Pod) -> None:
    """A limit (docs/limits.md): containers of one pod exclude each other, pods and the host do not."""
    folder = scratch_dir("locks")
    mounts = [tools(), mounted(folder, "/data")]
    cri.run(pod, BUSYBOX, ["/tools/meet", "hold", "/data/lock"], mounts=mounts)
    eventually_sync(lambda: (folder / "lock").exists() and (folder / "lock").stat().st_size, timeout_s=10)
    other_pod = cri.run_pod("other")
    inside, outside = (cri.run(each, BUSYBOX, SLEEP, mounts=mounts) for each in (pod, other_pod))
    found = [cri.exec(each, "/tools/meet", "try", "/data/lock").stdout for each in (inside, outside)]
    assert found[0].splitlines()[:2] == ["flock", "fcntl"]
    assert not {"flock", "fcntl"} & set(found[1].splitlines())
    with (folder / "lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    cri.remove_pod(other_pod)
