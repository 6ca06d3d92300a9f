"""The daemon starts, and reattaches to its pods, on a filesystem without space or inodes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from cri.config import Config
from cri.daemon import Daemon
from sandbox.records import PodState
from tests.fakes.daemon import FakeHost, RestartableDaemon
from tests.fakes.disk import small_disk
from tests.faults.test_pod_faults import container_spec, pod_spec


@dataclass
class SplitHost(FakeHost):
    """A host whose `root` is a small disk, with `run` on another one, as /var/lib and /run are."""

    run: Path = Path()

    def config(self) -> Config:
        return msgspec.structs.replace(
            super().config(), run=str(self.run), socket=str(self.run / "husk.sock")
        )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "root", 1 << 20, inodes=200) as point:
        yield point


def fill(disk: Path, what: str) -> None:
    """Use up all space or all inodes."""
    with contextlib.suppress(OSError):
        if what == "space":
            with (disk / "filling").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        (disk / "many").mkdir()
        for number in range(1000):
            (disk / "many" / str(number)).touch()


def empty(disk: Path) -> None:
    """Free what `fill` used."""
    (disk / "filling").unlink(missing_ok=True)
    for file in (disk / "many").glob("*"):
        file.unlink()


@pytest.mark.parametrize("what", ["space", "inodes"])
async def test_start_on_full_disk_reattaches_to_pods(disk: Path, tmp_path: Path, what: str) -> None:
    host = SplitHost(disk, run=tmp_path / "run")
    daemon = RestartableDaemon(host)
    await daemon.built.start()
    pod = await daemon.pods.run(pod_spec())
    container = await daemon.containers.create(pod, container_spec())
    await daemon.kill()
    await daemon.built.server.stop(0)
    fill(disk, what)

    restarted: Daemon = host.build()
    await restarted.start()

    assert restarted.pods.find(pod).state is PodState.READY
    assert restarted.containers.find(container).id == container
    features = restarted.node.features
    assert features.user_namespaces or "space" in features.user_namespace_obstacle
    await restarted.pods.stop(pod)
    await restarted.pods.remove(pod)
    assert host.ledger.held == set()
    empty(disk)
    await restarted.stop()
