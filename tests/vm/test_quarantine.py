"""Records that are damaged in every way beside a real VM: it runs on, is shown, and can be removed by its id.

tests/faults/test_record_faults.py has the same over a fake VM, with more fields, bits and combinations, and
with EIO and EMFILE.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

WEB = f"{HOST}/husk/web:1"


def flip(path: Path) -> None:
    """Flip one bit of a number: what is left is a valid record."""
    content = bytearray(path.read_bytes())
    content[content.index(b'"created_at_ns":') + 20] ^= 1
    path.write_bytes(content)


def change(path: Path, **fields: object) -> None:
    """Write another file, as another release would."""
    copy = path.with_suffix(".copy")
    copy.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    copy.rename(path)


def replace_by_a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:100]), "truncated"),
    "a flipped bit": (flip, "checksum"),
    "another id": (lambda path: change(path, id="0" * 64), "another id"),
    "version 99": (lambda path: change(path, version=99), "version 99"),
    "an unknown step": (lambda path: change(path, steps=["gpu"]), "gpu"),
    "an OSError": (replace_by_a_loop, "symbolic link"),
    "lost": (lambda path: path.unlink(), "does not exist"),
    "its directory lost": (lambda path: shutil.rmtree(path.parent), "does not exist"),
}


@pytest.fixture(scope="module")
def served(cri: Cri) -> tuple[Pod, str]:
    """A pod with a web server, whose records are damaged again and again."""
    cri.pull(WEB)
    pod = cri.run_pod("damaged")
    return pod, cri.run(pod, WEB, name="web")


def assert_serves(daemon: Daemon, site: Site, pod: Pod, ip: str, pids: list[int]) -> None:
    assert daemon.vmm_pids(pod.id) == pids != []
    assert site.namespace.fetch(ip, 80) == "hello from the pod\n"


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("kind", ["pod", "container"])
def test_vm_with_a_damaged_record_runs_on_until_the_record_is_repaired(
    daemon: Daemon,
    cri: Cri,
    site: Site,
    served: tuple[Pod, str],
    kind: str,
    damage: Callable[[Path], object],
    reason: str,
) -> None:
    pod, container = served
    ip, pids = cri.pod_ip(pod), daemon.vmm_pids(pod.id)
    record = daemon.root / f"{kind}s" / f"{pod.id if kind == 'pod' else container}.json"
    daemon.kill()
    kept = daemon.directory / "kept"
    shutil.copytree(record.parent, kept)
    damage(record)
    daemon.start()
    assert_serves(daemon, site, pod, ip, pids)
    shown = cri.call("Status", verbose=True).info["quarantined"]
    assert reason in json.loads(shown)[kind][record.stem]
    [item] = [each for each in cri.call("ListPodSandbox").items if each.id == pod.id]
    assert item.state == (api.SANDBOX_NOTREADY if kind == "pod" else api.SANDBOX_READY)
    state = cri.status(container).state
    assert state == (api.CONTAINER_RUNNING if kind == "pod" else api.CONTAINER_UNKNOWN)
    daemon.kill()
    shutil.rmtree(record.parent, ignore_errors=True)
    kept.rename(record.parent)
    daemon.start()
    assert_serves(daemon, site, pod, ip, pids)
    assert cri.pod_status(pod).status.state == api.SANDBOX_READY
    assert cri.exec(container, "true").code == 0


@pytest.mark.parametrize("damage", ["truncated", "a flipped bit", "an OSError", "its directory lost"])
def test_pod_with_a_damaged_record_is_removed_by_its_id(daemon: Daemon, cri: Cri, damage: str) -> None:
    before = daemon.census()
    pod = cri.run_pod("removed")
    container = cri.run(pod, WEB, name="web")
    daemon.kill()
    kept = daemon.directory / "kept"
    shutil.copytree(daemon.root / "pods", kept)
    record = daemon.root / "pods" / f"{pod.id}.json"
    DAMAGES[damage][0](record)
    if not record.parent.exists():  # other pods of this module keep theirs
        shutil.copytree(kept, record.parent)
        record.unlink()
    shutil.rmtree(kept)
    daemon.start()
    cri.stop_pod(pod)
    assert daemon.vmm_pids(pod.id) == []
    assert cri.status(container).state == api.CONTAINER_EXITED
    cri.remove_pod(pod)
    assert not record.is_symlink() and not record.exists()
    assert daemon.leaks_since(before, 20) == []
