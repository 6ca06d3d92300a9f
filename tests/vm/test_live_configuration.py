"""Configuration that the kubelet changes while containers read and watch it: content, atomicity, events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.kit import images
from tests.kit.atomic_writer import write_volume
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
SLEEP = ("sleep", "3600")
BOUND_S = 2.0  # of 0.1: a test machine is emulated and busy

# Both files of one state are the same. One link is resolved once, so a state is read whole.
READER = """
echo ready
while :; do
  cd -P /conf/..data || { echo no data; continue; }
  a=$(cat a 2>/dev/null) b=$(cat b 2>/dev/null)
  [ -e a ] && [ -e b ] || continue # one is removed since: a later state is in force
  [ "$a" = "$b" ] || echo "mixed $a $b"
  [ "$a" = last ] && { echo done; exit 0; }
done
"""


@pytest.fixture(scope="module")
def tools() -> api.Mount:
    path = scratch_dir("tools")
    (path / "watch").write_bytes(images.helper("watch"))
    (path / "watch").chmod(0o755)
    return api.Mount(container_path="/tools", host_path=str(path), readonly=True)


@pytest.fixture
def kubelet() -> Iterator[Path]:
    """The kubelet's directory of a pod."""
    yield scratch_dir("kubelet") / "pods" / "uid"


def volume_of(kubelet: Path, kind: str = "configmap", name: str = "conf") -> Path:
    return kubelet / "volumes" / f"kubernetes.io~{kind}" / name


def mounted(path: Path, at: str = "/conf", **fields: Any) -> api.Mount:
    return api.Mount(**{"container_path": at, "host_path": str(path), "readonly": True, **fields})


def within_bound(read: Callable[[], str], expected: str) -> None:
    eventually_sync(read, until=lambda text: text == expected, timeout_s=BOUND_S)


def is_copied(cri: Cri, container: str, at: str = "/conf") -> bool:
    lines = cri.exec(container, "grep", f" {at} ", "/proc/self/mounts").stdout.splitlines()
    return lines[-1].split()[2] == "tmpfs"


def watch(cri: Cri, pod: Pod, tools: api.Mount, mount: api.Mount, path: str) -> str:
    container = cri.run(pod, BUSYBOX, ["/tools/watch", path], mounts=[tools, mount])
    events(cri, container, lambda lines: "ready" in lines)
    return container


def events(cri: Cri, container: str, enough: Callable[[Sequence[str]], bool]) -> list[str]:
    return eventually_sync(lambda: [line.text for line in cri.log(container)], until=enough, timeout_s=10)


@pytest.mark.parametrize("kind", ["configmap", "secret", "projected", "downward-api"])
def test_update_is_seen_with_its_owner_and_mode(cri: Cri, pod: Pod, kubelet: Path, kind: str) -> None:
    path = volume_of(kubelet, kind)
    write_volume(path, {"key": "old", "gone": "x", "sub/file": "1"}, mode=0o640)
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=[mounted(path)])
    other = cri.run(pod, BUSYBOX, SLEEP, mounts=[mounted(path, "/elsewhere")])
    assert is_copied(cri, container)
    assert cri.exec(container, "stat", "-L", "-c", "%a %u:%g", "/conf/key").stdout == "640 0:0\n"
    assert "Read-only" in cri.exec(container, "touch", "/conf/x").stderr
    write_volume(path, {"key": "new", "added": "y", "sub/file": "2"}, mode=0o600)
    for each, at in ((container, "/conf"), (other, "/elsewhere")):
        within_bound(lambda each=each, at=at: cri.exec(each, "cat", f"{at}/key").stdout, "new")  # type: ignore[misc]
        assert cri.exec(each, "cat", f"{at}/added", f"{at}/sub/file").stdout == "y2"
        within_bound(lambda each=each, at=at: cri.exec(each, "ls", at).stdout, "added\nkey\nsub\n")  # type: ignore[misc]
    assert cri.exec(container, "stat", "-L", "-c", "%a", "/conf/key").stdout == "600\n"


def test_reader_never_sees_a_mixed_state(cri: Cri, pod: Pod, kubelet: Path) -> None:
    path = volume_of(kubelet)
    write_volume(path, {"a": "0", "b": "0"})
    reader = cri.run(pod, BUSYBOX, ["sh", "-c", READER], mounts=[mounted(path)])
    events(cri, reader, lambda lines: "ready" in lines)
    for number in range(300):
        write_volume(path, {"a": str(number) * 20, "b": str(number) * 20})
    write_volume(path, {"a": "last", "b": "last"})
    cri.wait_exited(reader)
    assert [line.text for line in cri.log(reader)] == ["ready", "done"]


def test_update_causes_the_events_of_a_bind_mount(
    cri: Cri, pod: Pod, kubelet: Path, tools: api.Mount
) -> None:
    path = volume_of(kubelet)
    write_volume(path, {"key": "old"})
    old = (path / "..data").readlink()
    watcher = watch(cri, pod, tools, mounted(path), "/conf")
    write_volume(path, {"key": "new", "more": "x"})
    new = (path / "..data").readlink()
    seen = events(cri, watcher, lambda lines: f"DELETE {old}" in lines)
    wanted = [
        f"CREATE {new}",
        "CREATE ..data_tmp",
        "MOVED_FROM ..data_tmp",
        "MOVED_TO ..data",
        "CREATE more",
        f"DELETE {old}",
    ]
    assert [line for line in seen if line in wanted] == wanted


def test_rewritten_hosts_file_is_seen_and_reported(
    cri: Cri, pod: Pod, kubelet: Path, tools: api.Mount
) -> None:
    kubelet.mkdir(parents=True)
    hosts = kubelet / "etc-hosts"
    hosts.write_text("127.0.0.1 localhost of-the-kubelet\n")
    mount = mounted(hosts, "/etc/hosts")
    watcher = watch(cri, pod, tools, mount, "/etc/hosts")
    assert is_copied(cri, watcher, "/etc/hosts")
    hosts.write_text("127.0.0.1 localhost\n")
    within_bound(lambda: cri.exec(watcher, "cat", "/etc/hosts").stdout, "127.0.0.1 localhost\n")
    seen = events(cri, watcher, lambda lines: "CLOSE_WRITE -" in lines)
    assert "MODIFY -" in seen
    # a bind mount shows the file that was there, whatever takes its place
    other = kubelet / "other"
    other.write_text("another file\n")
    other.rename(hosts)
    fresh = cri.run(pod, BUSYBOX, SLEEP, mounts=[mount])
    assert cri.exec(fresh, "cat", "/etc/hosts").stdout == "another file\n"
    assert cri.exec(watcher, "cat", "/etc/hosts").stdout == "127.0.0.1 localhost\n"


def test_token_is_refreshed_within_the_bound(cri: Cri, pod: Pod, kubelet: Path) -> None:
    path = volume_of(kubelet, "projected", "kube-api-access")
    write_volume(path, {"token": "0", "ca.crt": "ca", "namespace": "default"}, mode=0o600)
    script = "while :; do t=$(cat /conf/token); [ $t = $n ] || { n=$t; echo $n; }; done"
    container = cri.run(pod, BUSYBOX, ["sh", "-c", f"n=x; {script}"], mounts=[mounted(path)])
    delays = []
    for number in range(5):
        events(cri, container, lambda lines, number=number: str(number) in lines)  # type: ignore[misc]
        begin = time.monotonic()
        write_volume(path, {"token": str(number + 1), "ca.crt": "ca", "namespace": "default"}, mode=0o600)
        events(cri, container, lambda lines, number=number: str(number + 1) in lines)  # type: ignore[misc]
        delays.append(time.monotonic() - begin)
    print("until the log shows a new token:", " ".join(f"{delay * 1000:.0f} ms" for delay in delays))
    assert min(delays) < BOUND_S


def test_a_thousand_files_are_copied_and_updated(cri: Cri, pod: Pod, kubelet: Path) -> None:
    path = volume_of(kubelet, "projected", "many")
    write_volume(path, {f"key-{number:04}": f"old {number}" for number in range(1000)})
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=[mounted(path)])
    assert is_copied(cri, container)
    count = ("sh", "-c", "cat /conf/key-* | grep -o '[a-z]*' | sort | uniq -c | tr -s ' '")
    assert cri.exec(container, *count).stdout == " 1000 old\n"
    write_volume(path, {f"key-{number:04}": f"new {number}\n" for number in range(1000)})
    eventually_sync(
        lambda: cri.exec(container, *count).stdout, until=lambda text: text == " 1000 new\n", timeout_s=10
    )


@pytest.mark.parametrize("again", ["changed before the start", "changed while the daemon was down"])
def test_update_is_seen_after_a_restart_of_the_daemon(
    daemon: Daemon, cri: Cri, kubelet: Path, again: str
) -> None:
    pod = cri.run_pod("restarted")
    path = volume_of(kubelet)
    write_volume(path, {"key": "old", "gone": "x"})
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=[mounted(path)])
    daemon.kill()
    if "down" in again:
        write_volume(path, {"key": "meanwhile"})
    daemon.start()
    if "down" in again:
        within_bound(lambda: cri.exec(container, "cat", "/conf/key").stdout, "meanwhile")
        assert cri.exec(container, "ls", "/conf").stdout == "key\n"
    write_volume(path, {"key": "after"})
    within_bound(lambda: cri.exec(container, "cat", "/conf/key").stdout, "after")
    third = cri.run(pod, BUSYBOX, SLEEP, mounts=[mounted(path)])
    cri.stop(container, timeout=0)
    cri.remove(container)
    write_volume(path, {"key": "last"})
    within_bound(lambda: cri.exec(third, "cat", "/conf/key").stdout, "last")


def test_what_cannot_be_copied_is_exported(cri: Cri, pod: Pod, kubelet: Path) -> None:
    """Writable mounts, parts of a volume that the kubelet binds elsewhere, and what is too large."""
    path = volume_of(kubelet)
    write_volume(path, {"key": "value"})
    part = kubelet / "volume-subpaths/conf/c/0"
    part.parent.mkdir(parents=True)
    part.write_text("part")
    large = volume_of(kubelet, name="large")
    write_volume(large, {"key": "x" * (3 << 20)})
    mounts = [mounted(path, readonly=False), mounted(part, "/part"), mounted(large, "/large")]
    container = cri.run(pod, BUSYBOX, SLEEP, mounts=mounts)
    for at, file, size in (
        ("/conf", "/conf/key", 5),
        ("/part", "/part", 4),
        ("/large", "/large/key", 3 << 20),
    ):
        assert not is_copied(cri, container, at)
        assert cri.exec(container, "sh", "-c", f"wc -c <{file}").stdout == f"{size}\n"
